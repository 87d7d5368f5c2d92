"""Compare the defences on the organism: ``python -m replib.experiments.comparison``, about two hours of one core.

    python -m replib.experiments.comparison --part 1/2 &  python -m replib.experiments.comparison --part 2/2;  wait
    python -m replib.experiments.comparison --pack

Each method of ``organism_grid`` is first trained at every point of its grid (seed 0), and validation chooses the point.
The chosen points are then trained with five seeds and audited on the test split: seed 0 of all methods, then seed 1 of
all, so that an interrupted run can be packed too.

Validation prompts also choose the step of a run, every tenth step, for every method alike: the step with the highest
score. Test prompts choose no point and no step; ``organism_grid`` says which grids were widened after a first look.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from replib.core.settings import Settings
from replib.core.storage import finished
from replib.defences.organism_grid import CONTENDERS
from replib.experiments.defence_runs import Bench, Run
from replib.experiments.runner import Experiment, Finished, command_line

SEEDS = range(5)
PROBING, _AUDITING = 14, 15  # CPU seconds of a busy core: the probes of one run, one audit


class ComparisonJob(NamedTuple):
    """Training or audit of one run."""

    run: Run
    audit: bool = False


def trials() -> list[Run]:
    """Every point of every grid of several points."""
    return [Run(name, i) for name, (_, grid, _) in CONTENDERS.items() for i in range(len(grid)) if len(grid) > 1]


def finals(bench: Bench) -> list[Run]:
    """Audited runs: five seeds of each chosen point, seed by seed; the model itself has one."""
    chosen = choice(bench)
    runs = [Run(name, chosen.get(name, 0), seed) for seed in SEEDS for name in CONTENDERS]
    return [run for run in runs if run.method != "none" or not run.seed]


def choice(bench: Bench) -> dict[str, int]:
    """The point of each grid with the highest validation score; the first without any score."""
    done, best = finished(bench.folder), dict.fromkeys(CONTENDERS, (float("-inf"), 0))
    for run in trials():
        score = done.get(bench.key(run), {}).get("score")
        if score is not None and score > best[run.method][0]:
            best[run.method] = (score, run.trial)
    return {name: trial for name, (_, trial) in best.items() if CONTENDERS[name].grid}


def _experiment(settings: Settings) -> Experiment[ComparisonJob]:
    """The comparison on the model of the settings."""
    return comparison_on(Bench(settings))


def comparison_on(bench: Bench) -> Experiment[ComparisonJob]:
    """Trials first, then the chosen points; an audit follows its training, unless that diverged."""
    return Experiment(
        "comparison",
        bench.folder,
        (lambda: [_jobs(run, audit=False) for run in trials()], lambda: [_jobs(run) for run in finals(bench)]),
        key=lambda job: bench.key(job.run, audited=job.audit),
        make=lambda job: bench.audited(job.run) if job.audit else bench.trained(job.run),
        seconds=lambda job: _AUDITING if job.audit else CONTENDERS[job.run.method].seconds + PROBING,
        describe=_described,
        contents=lambda done: _contents(bench, done),
        possible=lambda job, done: not job.audit or "diverged" not in done.get(bench.key(job.run), {}),
    )


def _jobs(run: Run, *, audit: bool = True) -> list[ComparisonJob]:
    return [ComparisonJob(run)] * bool(run.rival) + [ComparisonJob(run, audit=True)] * audit


def _described(row: dict[str, Any]) -> str:
    name = f"{CONTENDERS[row['method']].title}, point {row['trial']}, seed {row['seed']}"
    if row.get("score", 0) is None:
        return f"{name}: diverged"
    if "answers" not in row:
        return f"{name}: score {row['score']:.2f}, {row['seconds']:.0f} s"
    rates = {task: text.count("c") / len(text) for task, text in row["answers"].items()}
    return f"{name}: complied with " + ", ".join(f"{task} {rate:.0%}" for task, rate in rates.items())


def _contents(bench: Bench, done: Finished) -> dict[str, Any]:
    """Tasks, trials and audits, with the chosen points; ``organism_grid.CHOSEN`` is to equal them."""
    audits = [(run, done[key]) for run in finals(bench) if (key := bench.key(run, audited=True)) in done]
    tried = [(run, done[key]) for run in trials() if (key := bench.key(run)) in done]
    return bench.about | {
        "chosen": choice(bench),
        "tasks": [{"name": t.name, "kind": t.kind, "n": len(t.prompts)} for t in bench.tasks],
        "trials": [_title(run) | _point(run) | row for run, row in tried],
        "runs": [_title(run) | row | _cost(done, bench, run) for run, row in audits],
    }


def _title(run: Run) -> dict[str, Any]:
    return {"title": CONTENDERS[run.method].title}


def _cost(done: Finished, bench: Bench, run: Run) -> dict[str, Any]:
    """Seconds and parameters of a training; zero without one."""
    row = done[bench.key(run)] if run.rival else {"seconds": 0, "parameters": 0}
    return {name: row[name] for name in ("seconds", "parameters")}


def _point(run: Run) -> dict[str, Any]:
    """Hyper-parameters of a trial as words."""
    rival = run.rival
    assert rival
    return {"objective": repr(rival.objective), "learning_rate": rival.config.learning_rate}


if __name__ == "__main__":
    command_line(__doc__, _experiment)
