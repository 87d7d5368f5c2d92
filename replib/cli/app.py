"""The ``replib`` command: options of every command, exit codes, one line for each error."""

import os
import sys
from collections.abc import Callable, Sequence
from inspect import BoundArguments
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from replib import __version__
from replib.cli import commands
from replib.cli.capture_command import run_capture
from replib.core.errors import ReplibError
from replib.core.settings import Settings

app = App(
    name="replib",
    version=f"replib {__version__}",
    help="Look into a chat model, bend it, ablate it, audit it.",
    help_format="markdown",
    default_parameter=Parameter(negative=(), allow_repeating=True),
    exit_on_error=False,
    print_error=False,
    verbose=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app.command(commands.run_demo, name="demo")
app.command(commands.run_chosen, name="run")
app.command(run_capture, name="capture")
app.command(commands.run_audit, name="audit")
app.command(commands.run_bend, name="bend")
app.command(commands.run_defend, name="defend")
app.command(commands.run_harden, name="harden")
app.command(commands.run_tune, name="tune")
app.command(commands.run_sweep, name="sweep")
app.command(commands.run_report, name="report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 something to repair, 130 interrupted."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return app.meta(sys.argv[1:] if argv is None else argv) or 0
    except CycloptsError as error:
        command = " ".join(["replib", *(error.command_chain or ())])
        print(f"replib: {' '.join(str(error).split())} `{command} --help` lists the options.", file=sys.stderr)
    except ReplibError as error:
        print(f"replib: {error}", file=sys.stderr)
    return 2


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    model: str | None = None,
    adapter: str | None = None,
    harmful: str | None = None,
    harmless: str | None = None,
    out: Path | None = None,
    seed: int | None = None,
    limit: int | None = None,
) -> int:
    """Run the command that the tokens name, under the settings of the environment and of the common options.

    Args:
        tokens: command and its own options.
        model: model folder, Hugging Face id, or organism variant (base, aligned, planted, deep).
        adapter: LoRA folder trained on that model.
        harmful: set name or file of harmful prompts.
        harmless: set name or file of harmless prompts.
        out: output folder.
        seed: seed of every random choice.
        limit: prompts per set, 0 for the default.
    """
    if not tokens:
        raise ReplibError("a command is missing: `replib --help` lists them, `replib demo` runs every notebook.")
    command, bound, _ = app.parse_args(tokens)
    settings = Settings.from_env(
        os.environ | dict(bound.arguments.get("assignments", ())),
        model=model,
        adapter=adapter,
        harmful=harmful,
        harmless=harmless,
        out=out,
        seed=seed,
        limit=limit,
    )
    return _run(command, bound, settings)


def _run(command: Callable[..., Path | None], bound: BoundArguments, settings: Settings) -> int:
    try:
        path = command(*bound.args, **bound.kwargs, settings=settings)
    except KeyboardInterrupt:
        if _speaks():
            kept = f"What was finished is kept in {settings.out}; the same command goes on from there."
            print(f"\nreplib: stopped. {kept}", file=sys.stderr)
        return 130
    if path and _speaks():
        print(f"wrote {path}", flush=True)
    return 0


def _speaks() -> bool:
    """Whether this process is the first of its launch; the import waits because torch comes with it."""
    from replib.core.distributed import is_first

    return is_first()
