"""The ``replib`` command: every verb of the suite without a notebook open."""

import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from replib import __version__
from replib.core.distributed import is_first
from replib.core.errors import ReplibError
from replib.core.settings import PREFIX, ROOT, Settings


def listed(what: str, example: str, kind: Callable[[str], Any] = str) -> Callable[[str], list]:
    """A list with commas between its members."""

    def read(text: str) -> list:
        try:
            return [kind(part) for part in _parts(text)]
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is no list of {what}: write for example {example}") from None

    return read


def positions(text: str) -> str | int | list[str | int]:
    """Names and integers with commas between them; a single one is no list."""
    try:
        found = [int(p) if re.fullmatch(r"-?\d+", p) else p for p in _parts(text)]
    except ValueError:
        raise ArgumentTypeError(f"{text!r} names no position: write for example last_prompt,-2") from None
    return found[0] if len(found) == 1 else found


def several_positions(text: str) -> list[str | int]:
    """The same, always a list."""
    found = positions(text)
    return found if isinstance(found, list) else [found]


def one_of(*choices: str) -> Callable[[str], str]:
    """One of a few words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ArgumentTypeError(f"{text!r} is not one of them: write {' or '.join(choices)}")
        return text

    return read


def at_least(least: int) -> Callable[[str], int]:
    """A whole number that is not too small."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return read


def assignment(text: str) -> tuple[str, str]:
    """NAME=VALUE as the variable and its value."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ArgumentTypeError(f"{text!r} is not NAME=VALUE, as in MODEL=planted")
    return PREFIX + name.upper().removeprefix(PREFIX), value


def joined(arguments: Sequence[str]) -> list[str]:
    """``--layers -1,5`` as ``--layers=-1,5``: argparse takes what begins with a minus for an option."""
    result: list[str] = []
    for text in arguments:
        if result and result[-1] in ("--layers", "--positions", "--fit-at") and re.match(r"-\d", text):
            result[-1] += "=" + text
        else:
            result.append(text)
    return result


def _parts(text: str) -> list[str]:
    """Raises ValueError where one is empty."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(text)
    return parts


Kinds = dict[str, Callable[[str], Any]]
COMMON: Kinds = {
    "model": str,
    "adapter": str,
    "harmful": str,
    "harmless": str,
    "out": Path,
    "seed": int,
    "limit": int,
}
COEFFICIENTS: Kinds = {
    "preset": str,
    "alpha": float,
    "beta": float,
    "gamma": float,
    "steps": int,
    "save-every": at_least(0),
}
CAPTURE: Kinds = {
    "prompts": str,
    "name": str,
    "site": listed("site names", "resid_mid,mlp_out"),
    "layers": listed("whole numbers", "0,5,-1", int),
    "positions": positions,
    "pool": one_of("mean", "none"),
    "max-new-tokens": at_least(0),
    "system": str,
    "overflow": one_of("refuse", "truncate"),
    "shard": at_least(1),
    "stored-dtype": one_of("float32", "bfloat16"),
}
SCHEDULE: Kinds = {"steps": int, "learning-rate": float, "save-every": at_least(0)}
SWEEP: Kinds = {
    "methods": listed("methods", "pca_ot,rfa"),
    "layers": CAPTURE["layers"],
    "ks": listed("whole numbers", "1,2,8", at_least(1)),
    "edit-at": listed("edited positions", "last_prompt,all"),
    "fit-at": several_positions,
    "strengths": listed("numbers", "0.25,0.5,1", float),
    "best": at_least(1),
    "fits": at_least(0),
    "texts": str,
}
OPTIONS = {
    "bend": COEFFICIENTS,
    "defend": SCHEDULE
    | {
        "mix": one_of("repbend", "circuit_breaker"),
        "mix-files": listed("files by name", "breakers=circuit_breakers_train.json"),
    },
    "harden": SCHEDULE | {"inner": one_of("repbend", "retention")},
    "capture": CAPTURE,
    "sweep": SWEEP,
    "tune": {"trials": at_least(1)},
}
HELP = {
    "model": "model folder, Hugging Face id, or organism variant (base, aligned, planted, deep)",
    "adapter": "LoRA folder trained on that model",
    "harmful": "set name or file of harmful prompts",
    "harmless": "set name or file of harmless prompts",
    "out": "output folder",
    "seed": "seed of every random choice",
    "limit": "prompts per set, 0 for the default",
    "preset": "organism, short, llama3-8b, mistral-7b, gemma2-2b or qwen2.5-14b; default by model",
    "alpha": "weight of pushing unsafe representations away (the paper's meaning)",
    "beta": "weight of aligning unsafe representations with each other",
    "gamma": "weight of staying close on benign text (KL)",
    "steps": "training steps",
    "learning-rate": "highest learning rate: of the first step, or after the warm-up; default by defence and model",
    "defence": "sft, dpo, npo, npo_rt, npo_kl, rmu, circuit_breaker, whp or task_arithmetic; on other models than the "
    "organism whp_retain too",
    "mix": "training mix of a paper: repbend or circuit_breaker; the default is the rows that `replib bend` trains on",
    "mix-files": "files of that mix by name, e.g. breakers=circuit_breakers_train.json (the organism needs none)",
    "inner": "what hardening is trained beside: repbend (the default), or retention, which holds the model in place",
    "save-every": "steps between checkpoints, from which the same command goes on; default 25, 0 for none",
    "trials": "trainings that the search holds in the end, default 20; those that are there are kept",
    "prompts": "a set or a file instead of the harmful and the harmless set; its own labels are kept",
    "name": "name of the folder in <out>/activations, default that of the model",
    "site": "one or several of resid_pre, attn_in, attn_out, resid_mid, mlp_in, mlp_out, resid_post (the default)",
    "layers": "block indices, negative ones from the end, as 0,5,-1; default all",
    "positions": "last_prompt (the default), instruction, post_instruction, prompt, response, all, or integers counted "
    "from where the response begins; several as last_prompt,-2",
    "pool": "mean: one vector a span (the default); none: every token of one span",
    "max-new-tokens": "let the model write that many tokens first and read them as the response",
    "system": "system prompt before each prompt",
    "overflow": "a prompt longer than the context: refuse (the default) or truncate",
    "shard": "prompts a file, default 1024",
    "stored-dtype": "of the values on disk: float32 (the default) or bfloat16, half the size",
    "methods": "edits to fit, as pca_ot,rfa,ace; default PCA-OT and the baselines",
    "ks": "numbers of principal components, default those of 1,2,4,8,16 that the prompts can fit",
    "edit-at": "edited tokens: last_prompt, all_prompt, response, decode, all; default as in each method's source",
    "fit-at": "positions whose activations fit the edits, as last_prompt,0; default as in each method's source",
    "strengths": "shares of each edit, from 0 to 1, default 1",
    "best": "edits of each method and edited position whose answers are written, best by cheap score; default 8",
    "fits": "fits of each method's best edit on resampled prompts, default 3",
    "texts": "set or file of neutral text for perplexity",
    "set": "any setting, as REPLIB_NAME=VALUE would give it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 something to repair, 130 interrupted."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    args = _parser().parse_args(joined(sys.argv[1:] if argv is None else argv))
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
        if is_first():
            print(f"\nreplib: stopped. What was finished is kept in {settings.out}; {again}.", file=sys.stderr)
        return 130
    return 0


def _demo(_: Namespace, settings: Settings) -> None:
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not paths:
        raise ReplibError(f"{ROOT} holds no notebooks/*.ipynb: run the demo from a checkout of replib.")
    cost = "about 8 minutes on 2 cores, less where work is kept"
    print(f"Running {len(paths)} notebooks on {settings.model}: {cost}.", flush=True)
    _export(_execute(paths, settings, {}), settings)


def _notebooks(args: Namespace, settings: Settings) -> None:
    for path in _execute(args.notebooks, settings, dict(args.set)):
        print(f"wrote {path}")


def _execute(paths: list[Path], settings: Settings, extra: dict[str, str]) -> list[Path]:
    from replib.cli.notebooks import run_notebooks

    return run_notebooks(paths, settings.out, env=extra | settings.environ())


def _report(_: Namespace, settings: Settings) -> None:
    executed = sorted((settings.out / "notebooks").glob("*.ipynb"))
    if not executed:
        raise ReplibError(f"{settings.out / 'notebooks'} holds no executed notebook: run `replib demo` first.")
    _export(executed, settings)


def _export(executed: list[Path], settings: Settings) -> None:
    report = settings.out / "report.html"
    import_module("replib.figures.report").export_html(executed, report, title=f"replib: {settings.model}")
    print(f"Report, to open in any browser without a network: {report.absolute()}")


def _verb(args: Namespace, settings: Settings) -> None:
    given = {name.replace("-", "_") for name in (*OPTIONS.get(args.command, {}), "defence")}
    extra = {name: value for name, value in vars(args).items() if name in given and value is not None}
    path = getattr(import_module("replib.cli.commands"), f"run_{args.command}")(settings, **extra)
    if is_first():
        print(f"wrote {path}", flush=True)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="replib", description="Look into a chat model, bend it, ablate it, audit it.")
    parser.add_argument("--version", action="version", version=f"replib {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, verb, summary in (
        ("demo", _demo, "run every notebook and write one offline HTML report"),
        ("run", _notebooks, "run chosen notebooks"),
        ("capture", _verb, "write activations of prompts to a folder; under torchrun several processes share the work"),
        ("audit", _verb, "attack a model and judge what it answers, as one table"),
        ("bend", _verb, "train a RepBend adapter"),
        ("defend", _verb, "train a defence that RepBend is compared with"),
        ("harden", _verb, "train refusals that hold while edits act on the model"),
        ("tune", _verb, "search alpha, beta and gamma: a training a trial, resumable"),
        ("sweep", _verb, "ablate refusal layer by layer, against the baselines"),
        ("report", _report, "write the HTML report of notebooks already run"),
    ):
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.set_defaults(verb=verb, set=[])
        for option, kind in (COMMON | OPTIONS.get(name, {})).items():
            command.add_argument(f"--{option}", type=kind, help=HELP[option])
        if name == "defend":
            command.add_argument("defence", help=HELP["defence"])
        if name == "run":
            command.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
            command.add_argument("--set", action="append", type=assignment, metavar="NAME=VALUE", help=HELP["set"])
    return parser
