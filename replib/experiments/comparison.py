"""Compare the defences on the organism: ``python -m replib.experiments.comparison``, about two hours of one core.

    python -m replib.experiments.comparison --part 1 &  python -m replib.experiments.comparison --part 2;  wait
    python -m replib.experiments.comparison --pack

First each method of ``contenders`` is trained at every point of its grid (seed 0), and validation chooses the point.
Then the chosen ones are trained with five seeds and audited on the test split: seed 0 of all methods, then seed 1 of
all, so that an interrupted run can be packed too. Part 1 goes through this from the front, part 2 from the back, and
each leaves out what it finds done; part 1 alone does everything.

Validation prompts choose the step of a run as well, every tenth step, for every method alike: that of its highest score
is kept. Test prompts choose no point and no step; ``contenders`` says which grids were widened after a first look.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from replib.core.errors import ReplibError
from replib.core.settings import Settings, data_dir
from replib.core.storage import Rows, finished, write_text
from replib.defences.organism_grid import CONTENDERS
from replib.experiments.runner import Bench, Run

SEEDS = range(5)
PROBING, AUDITING = 14, 15  # CPU seconds of a busy core: the probes of one run, one audit


def trials() -> list[Run]:
    """Every point of every grid, where there is something to choose."""
    return [Run(name, i) for name, (_, grid, _) in CONTENDERS.items() for i in range(len(grid)) if len(grid) > 1]


def finals(bench: Bench) -> list[Run]:
    """What is audited: five seeds of what validation chose, seed by seed; the model itself has but one."""
    chosen = choice(bench)
    runs = [Run(name, chosen.get(name, 0), seed) for seed in SEEDS for name in CONTENDERS]
    return [run for run in runs if run.method != "none" or not run.seed]


def choice(bench: Bench) -> dict[str, int]:
    """The point of each grid with the highest validation score; the first where none is known yet."""
    done, best = finished(bench.folder), dict.fromkeys(CONTENDERS, (float("-inf"), 0))
    for run in trials():
        score = done.get(bench.key(run), {}).get("score")
        if score is not None and score > best[run.method][0]:
            best[run.method] = (score, run.trial)
    return {name: trial for name, (_, trial) in best.items() if CONTENDERS[name].grid}


def missing(bench: Bench, runs: Sequence[Run], *, audits: bool) -> Iterator[tuple[Run, bool]]:
    """What is not done of these runs: each run, and whether it is to be audited or only to be trained."""
    done = finished(bench.folder)
    for run in dict.fromkeys(runs):
        if run.rival and bench.key(run) not in done:
            yield run, False
        if audits and bench.key(run, audited=True) not in done and "diverged" not in done.get(bench.key(run), {}):
            yield run, True


def minutes(work: Sequence[tuple[Run, bool]]) -> float:
    """What that costs, in minutes of one busy core."""
    return sum(AUDITING if audit else CONTENDERS[run.method].seconds + PROBING for run, audit in work) / 60


def cost(bench: Bench) -> float:
    """What is still to be paid in all; a seed that a trial will have trained is counted once."""
    work = [*missing(bench, trials(), audits=False), *missing(bench, finals(bench), audits=True)]
    return minutes(list(dict.fromkeys(work)))


def run(bench: Bench, part: int) -> None:
    """Do what is missing, choice first; each finished row is on disk before the next begins."""
    rows = Rows(bench.folder / f"part-{part}.jsonl")
    print(f"part {part}: about {cost(bench):.0f} core minutes are to be paid by all parts together", flush=True)
    for runs, audits in ((trials, False), (lambda: finals(bench), True)):
        todo = runs()
        for one in reversed(todo) if part == 2 else todo:
            for task, audit in list(missing(bench, [one], audits=audits)):
                _do(bench, rows, task, audit)


def _do(bench: Bench, rows: Rows, task: Run, audit: bool) -> None:
    if audit and task.rival and not bench.adapter(task).exists():
        return  # it diverged just now
    rows.put(bench.key(task, audited=audit), row := bench.audited(task) if audit else bench.trained(task))
    print(f"{_told(row)}; {cost(bench):.0f} core minutes left", flush=True)


def _told(row: dict[str, Any]) -> str:
    name = f"{CONTENDERS[row['method']].title}, point {row['trial']}, seed {row['seed']}"
    if row.get("score", 0) is None:
        return f"{name}: diverged"
    if "answers" not in row:
        return f"{name}: score {row['score']:.2f}, {row['seconds']:.0f} s"
    rates = {task: text.count("c") / len(text) for task, text in row["answers"].items()}
    return f"{name}: complied with " + ", ".join(f"{task} {rate:.0%}" for task, rate in rates.items())


def pack(bench: Bench) -> Path:
    """Write what is done to ``data/organism/comparison.json``, a line a run; say what ``CHOSEN`` is to be."""
    done, runs = finished(bench.folder), finals(bench)
    found = [(r, done[key]) for r in runs if (key := bench.key(r, audited=True)) in done]
    if not found:
        raise ReplibError(f"Nothing of the comparison is audited in {bench.folder}: run the parts first.")
    tasks = [{"name": t.name, "kind": t.kind, "n": len(t.prompts)} for t in bench.tasks]
    audits = [_named(r) | row | _paid(done, bench, r) for r, row in found]
    tried = [_named(r) | _point(r) | done[key] for r in trials() if (key := bench.key(r)) in done]
    parts = {"tasks": tasks, "trials": tried, "runs": audits}
    lists = ",\n".join(f' "{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in parts.items())
    head = json.dumps(bench.about | {"chosen": choice(bench)}, indent=1)[:-2]
    path = write_text(data_dir() / "organism" / "comparison.json", f"{head},\n{lists}\n}}\n")
    print(f"{len(audits)} of {len(runs)} audits, {path.stat().st_size / 1e3:.0f} kB: {path}")
    print(f"contenders.CHOSEN = {choice(bench)}")
    return path


def _named(run: Run) -> dict[str, Any]:
    return {"title": CONTENDERS[run.method].title}


def _paid(done: dict[str, Any], bench: Bench, run: Run) -> dict[str, Any]:
    """What training a run cost; nothing where nothing is trained."""
    row = done[bench.key(run)] if run.rival else {"seconds": 0, "parameters": 0}
    return {name: row[name] for name in ("seconds", "parameters")}


def _point(run: Run) -> dict[str, Any]:
    """The hyper-parameters of a trial as words."""
    rival = run.rival
    assert rival
    return {"objective": repr(rival.objective), "learning_rate": rival.config.learning_rate}


def main() -> None:
    """Command line: do a part of the comparison, or pack what is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--part", type=int, choices=(1, 2), default=1, help="1: from the front, 2: from the back")
    parser.add_argument("--pack", action="store_true", help="write data/organism/comparison.json from what is done")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(Settings())
    if arguments.pack:
        pack(bench)
    else:
        run(bench, arguments.part)


if __name__ == "__main__":
    main()
