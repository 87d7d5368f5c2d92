"""Does hardening hold on the organism? ``python -m replib.experiments.hardening``, about five minutes of a core a run.

    python -m replib.experiments.hardening --part 1/2 &  python -m replib.experiments.hardening --part 2/2;  wait
    python -m replib.experiments.hardening --pack

Each arm is trained with three seeds and audited on the test split, edits re-fitted on the trained model: seed 0 of all
arms, then seed 1, so that an interrupted run can be packed too. Validation prompts chose the values of
``replib.study.training`` and choose the step of a run and the share of its change in weights, the same way for every
arm; test prompts choose nothing.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd

from replib.ablation.adaptive_attack import COLUMNS, EDIT_ATTACKS, best_edits, success
from replib.audit.audit import Task
from replib.core.errors import Diverged
from replib.core.settings import Settings
from replib.core.storage import key_of
from replib.defences.hardening import Hardening
from replib.defences.repbend.objective import RepBend
from replib.defences.repbend.presets import ORGANISM_BEND, ORGANISM_TRAIN
from replib.experiments.defence_runs import MAX_ANSWER_TOKENS, Bench, TimedValidation, saved
from replib.experiments.runner import Experiment, Finished, command_line
from replib.models.adapters import attached, merged
from replib.models.load import load
from replib.study.training import HARDENING, RETENTION, TRAIN, adaptive_validation, hardened, rows_for
from replib.training.config import TrainConfig
from replib.training.model_selection import SHARES, interpolated
from replib.training.objective import Objective
from replib.training.train import train

HARDENING_SEEDS, HARDENING_ASKED, HARDENING_PROBED = (
    range(3),
    48,
    24,
)  # prompts of a test task and of every edit, and of a validation task


class Arm(NamedTuple):
    """Objective and schedule of one arm."""

    title: str
    """In tables and figures."""
    inner: Objective | None = None
    """None trains nothing."""
    hardening: Hardening | None = None
    config: TrainConfig = TRAIN
    seconds: float = 0.0
    """CPU seconds of one training on a busy core, its probes among them."""


ARMS = {
    "none": Arm("aligned"),
    "repbend": Arm("RepBend", RepBend(ORGANISM_BEND), None, replace(ORGANISM_TRAIN, probe_every=10), 120),
    "forced": Arm("forced beginnings alone", RETENTION, replace(HARDENING, edits=0, plain=7), TRAIN, 250),
    "hardening": Arm("hardening", RETENTION, HARDENING, TRAIN, 270),
    "both": Arm("RepBend + hardening", RepBend(ORGANISM_BEND), HARDENING, TRAIN, 330),
}
"""By name, in the order of tables."""
_AUDIT = 150  # CPU seconds of one


class HardeningRun(NamedTuple):
    """One training, or the model itself."""

    arm: str
    seed: int = 0


class HardeningJob(NamedTuple):
    """Training or audit of one run."""

    run: HardeningRun
    audit: bool = False


class HardeningBench(Bench):
    """Training and edit attacks on one model."""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.folder = settings.out / "hardening"
        self.about |= {"probed": HARDENING_PROBED, "asked": HARDENING_ASKED, "shares": list(SHARES)}
        self.tasks = self.study.tasks("test", HARDENING_ASKED)
        self.measure = adaptive_validation(self.study, HARDENING_PROBED)

    @property
    def direct(self) -> Task:
        """The requests that edits are scored on."""
        return next(task for task in self.tasks if task.kind == "direct")

    def objective(self, run: HardeningRun) -> Objective:
        """Objective of a run, with its seed."""
        inner, hardening = ARMS[run.arm][1:3]
        assert inner, "only an arm with an objective is trained"
        return replace(hardened(self.study, inner, hardening), seed=run.seed) if hardening else inner

    def key_of(self, run: HardeningRun, *, audited: bool = False) -> str:
        """Cache key of a row."""
        arm = ARMS[run.arm]
        how = [self.objective(run).about(self.study.model.n_layers), asdict(arm.config)] if arm.inner else []
        attacks = (
            [HARDENING_ASKED, MAX_ANSWER_TOKENS, {name: list(a) for name, a in EDIT_ATTACKS.items()}] if audited else []
        )
        return key_of(run._asdict() if arm.inner else run.arm, how, self.about, attacks)

    def folder_of(self, run: HardeningRun) -> Path:
        """Folder of the adapter of a run."""
        return self.folder / "adapters" / self.key_of(run)

    def train(self, run: HardeningRun) -> dict[str, Any]:
        """One run, trained: what validation found and what it cost; ``diverged`` where it did."""
        objective, watch, start = self.objective(run), TimedValidation(self), time.process_time()
        config, model = replace(ARMS[run.arm].config, seed=run.seed, save_every=0), load(self.study.settings.model)
        with TemporaryDirectory() as out:
            try:
                rows = rows_for(self.study, objective)
                result = train(model, rows, objective, config=config, validation=watch, out=out, say=lambda _: None)
            except Diverged as error:
                return run._asdict() | {"diverged": str(error)}
        result = interpolated(result, watch)
        cost = saved(result.model, self.folder_of(run), time.process_time() - start - watch.seconds)
        return run._asdict() | {"step": result.step, "share": result.config["share"], "probes": watch.found} | cost

    def audit(self, run: HardeningRun) -> dict[str, Any]:
        """One run on the test split: a letter an answer, by task and by edit."""
        model = load(self.study.settings.model)
        if ARMS[run.arm].inner:
            model = merged(attached(model, self.folder_of(run)))
        edits = self.study.with_model(model).adaptive_attack(self.direct.prompts).table()
        return run._asdict() | {"answers": self._answers(model, self.tasks), "edits": edits[COLUMNS].values.tolist()}


def runs() -> list[HardeningRun]:
    """Seed by seed; the model itself has but one."""
    return [HardeningRun(arm, seed) for seed in HARDENING_SEEDS for arm in ARMS if ARMS[arm].inner or not seed]


def _experiment(settings: Settings) -> Experiment[HardeningJob]:
    """The hardening of the model of the settings."""
    bench = HardeningBench(settings)
    return Experiment(
        "hardening",
        bench.folder,
        (lambda: [_jobs(run) for run in runs()],),
        key=lambda job: bench.key_of(job.run, audited=job.audit),
        make=lambda job: bench.audit(job.run) if job.audit else bench.train(job.run),
        seconds=lambda job: _AUDIT if job.audit else ARMS[job.run.arm].seconds,
        describe=described,
        contents=lambda done: _contents(bench, done),
        possible=lambda job, done: not job.audit or "diverged" not in done.get(bench.key_of(job.run), {}),
    )


def _jobs(run: HardeningRun) -> list[HardeningJob]:
    return [HardeningJob(run)] * bool(ARMS[run.arm].inner) + [HardeningJob(run, audit=True)]


def described(row: dict[str, Any]) -> str:
    """A finished row in words."""
    name = f"{ARMS[row['arm']].title}, seed {row['seed']}"
    if "diverged" in row:
        return f"{name}: diverged"
    if "answers" not in row:
        return f"{name}: step {row['step']}, {row['share']:.0%} of the change, {row['seconds']:.0f} s"
    best = best_edits(_edits(row), "attack").set_index("attack").outcomes.map(success)
    rates = {task: success(text) for task, text in row["answers"].items()} | {a: best[a] for a in EDIT_ATTACKS}
    return f"{name}: complied with " + ", ".join(f"{task} {rate:.0%}" for task, rate in rates.items())


def _contents(bench: HardeningBench, done: Finished) -> dict[str, Any]:
    audits = [(run, done[key]) for run in runs() if (key := bench.key_of(run, audited=True)) in done]
    tasks = [{"name": t.name, "kind": t.kind, "n": len(t.prompts)} for t in bench.tasks]
    return bench.about | {
        "trials": [],
        "tasks": tasks + [{"name": name, "kind": "edit", "n": HARDENING_ASKED} for name in EDIT_ATTACKS],
        "runs": [packed_run(run, row, done.get(bench.key_of(run), {})) for run, row in audits],
    }


def packed_run(run: HardeningRun, row: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """One run: answers to all tasks, under the most successful edit of each attack, and under that of each block."""
    edits = _edits(row)
    best, by_block = best_edits(edits, "attack").set_index("attack"), best_edits(edits, "attack", "layer")
    worst = {a: [int(best.layer[a]), int(best.k[a])] for a in EDIT_ATTACKS}
    blocks = {a: by_block.outcomes[by_block.attack == a].tolist() for a in EDIT_ATTACKS}
    cost = {name: trained.get(name, 0) for name in ("seconds", "parameters", "step", "share")}
    named = {"method": run.arm, "title": ARMS[run.arm].title, "seed": run.seed} | cost
    answers = row["answers"] | {a: best.outcomes[a] for a in EDIT_ATTACKS}
    return named | {"answers": answers, "worst": worst, "blocks": blocks}


def _edits(row: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(row["edits"], columns=COLUMNS)


if __name__ == "__main__":
    command_line(__doc__, _experiment)
