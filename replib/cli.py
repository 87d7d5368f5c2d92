"""The ``replib`` command: every verb of the suite without a notebook open."""

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from replib import __version__
from replib.errors import ReplibError
from replib.settings import PREFIX, ROOT, Settings

COMMON = {
    "model": str,
    "adapter": str,
    "harmful": str,
    "harmless": str,
    "out": Path,
    "seed": int,
    "limit": int,
}
COEFFICIENTS = {"alpha": float, "beta": float, "gamma": float, "steps": int}
HELP = {
    "model": "model folder, Hugging Face id, or organism variant (base, aligned, planted, deep)",
    "adapter": "LoRA folder trained on that model",
    "harmful": "set name or file of harmful prompts",
    "harmless": "set name or file of harmless prompts",
    "out": "output folder",
    "seed": "seed of every random choice",
    "limit": "prompts per set, 0 for the default",
    "alpha": "weight of pushing unsafe representations away (the paper's meaning)",
    "beta": "weight of aligning unsafe representations with each other",
    "gamma": "weight of staying close on benign text (KL)",
    "steps": "training steps",
    "set": "any setting, as REPLIB_NAME=VALUE would give it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 something to repair, 130 interrupted."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    args = _parser().parse_args(argv)
    try:
        settings = Settings.from_env(os.environ | dict(args.set), **{name: getattr(args, name) for name in COMMON})
        return _run(args, settings)
    except ReplibError as error:
        print(f"replib: {error}", file=sys.stderr)
        return 2


def _run(args: Namespace, settings: Settings) -> int:
    try:
        args.verb(args, settings)
    except KeyboardInterrupt:
        again = "the same command goes on from there"
        print(f"\nreplib: stopped. What was finished is kept in {settings.out}; {again}.", file=sys.stderr)
        return 130
    return 0


def _demo(_: Namespace, settings: Settings) -> None:
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not paths:
        raise ReplibError(f"{ROOT} holds no notebooks/*.ipynb: run the demo from a checkout of replib.")
    cost = "about 6 minutes on 2 cores, less where work is kept"
    print(f"Running {len(paths)} notebooks on {settings.model}: {cost}.", flush=True)
    _export(_execute(paths, settings, {}), settings)


def _notebooks(args: Namespace, settings: Settings) -> None:
    for path in _execute(args.notebooks, settings, dict(args.set)):
        print(f"wrote {path}")


def _execute(paths: list[Path], settings: Settings, extra: dict[str, str]) -> list[Path]:
    from replib.run import run_notebooks

    return run_notebooks(paths, settings.out, env=extra | settings.environ())


def _report(_: Namespace, settings: Settings) -> None:
    executed = sorted((settings.out / "notebooks").glob("*.ipynb"))
    if not executed:
        raise ReplibError(f"{settings.out / 'notebooks'} holds no executed notebook: run `replib demo` first.")
    _export(executed, settings)


def _export(executed: list[Path], settings: Settings) -> None:
    report = settings.out / "report.html"
    import_module("replib.export").export_html(executed, report, title=f"replib: {settings.model}")
    print(f"Report, to open in any browser without a network: {report.absolute()}")


def _verb(args: Namespace, settings: Settings) -> None:
    extra = {name: value for name, value in vars(args).items() if name in COEFFICIENTS and value is not None}
    verb = getattr(import_module("replib.commands"), f"run_{args.command}")
    print(f"wrote {verb(settings, **extra)}")


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ArgumentTypeError(f"{text!r} is not NAME=VALUE, as in MODEL=planted")
    return PREFIX + name.upper().removeprefix(PREFIX), value


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="replib", description="Look into a chat model, bend it, ablate it, audit it.")
    parser.add_argument("--version", action="version", version=f"replib {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, verb, summary in (
        ("demo", _demo, "run every notebook and write one offline HTML report"),
        ("run", _notebooks, "run chosen notebooks"),
        ("audit", _verb, "attack a model and judge what it answers, as one table"),
        ("bend", _verb, "train a RepBend adapter"),
        ("sweep", _verb, "ablate refusal layer by layer, against the baselines"),
        ("report", _report, "write the HTML report of notebooks already run"),
    ):
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.set_defaults(verb=verb, set=[])
        for option, kind in (COMMON | (COEFFICIENTS if name == "bend" else {})).items():
            command.add_argument(f"--{option}", type=kind, help=HELP[option])
        if name == "run":
            command.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
            command.add_argument("--set", action="append", type=_assignment, metavar="NAME=VALUE", help=HELP["set"])
    return parser
