"""Does hardening hold on the organism? ``python -m replib.experiments.hardening``, about five minutes of a core a run.

    python -m replib.experiments.hardening --part 1 &  python -m replib.experiments.hardening --part 2;  wait
    python -m replib.experiments.hardening --pack

Each arm is trained with three seeds and audited on the test split, edits re-fitted on the trained model: seed 0 of all
arms, then seed 1, so that an interrupted run can be packed too. Part 1 goes through this from the front, part 2 from
the back, and each leaves out what it finds done; part 1 alone does everything. Validation prompts chose the values of
``replib.study.training`` and choose the step of a run and the share of its change that is kept, the same way for every arm;
test prompts choose nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from replib.ablation.adaptive_attack import EDIT_ATTACKS, Cell, best_edit_by_block, success
from replib.audit.audit import Task
from replib.core.errors import Diverged, ReplibError
from replib.core.settings import Settings, data_dir
from replib.core.storage import Rows, finished, key_of, write_text
from replib.defences.hardening import Hardening
from replib.defences.repbend.objective import RepBend
from replib.defences.repbend.presets import ORGANISM_BEND, ORGANISM_TRAIN
from replib.experiments.runner import TOKENS, Bench, TimedValidation, saved
from replib.models.adapters import attached, merged
from replib.models.load import load
from replib.study.training import HARDENING, RETENTION, TRAIN, adaptive_validation, hardened, rows_for
from replib.training.config import TrainConfig
from replib.training.model_selection import SHARES, interpolated
from replib.training.objective import Objective
from replib.training.train import train

SEEDS, ASKED, PROBED = range(3), 48, 24  # prompts of a test task and of every edit, and of a validation task


class Arm(NamedTuple):
    """What is trained."""

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
AUDIT = 150  # CPU seconds of one


class Run(NamedTuple):
    """One training, or the model itself."""

    arm: str
    seed: int = 0


class HardeningBench(Bench):
    """Trains and besieges on one model."""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.folder = settings.out / "hardening"
        self.about |= {"probed": PROBED, "asked": ASKED, "shares": list(SHARES)}
        self.tasks = self.study.tasks("test", ASKED)
        self.measure = adaptive_validation(self.study, PROBED)

    @property
    def direct(self) -> Task:
        """The requests that edits are scored on."""
        return next(task for task in self.tasks if task.kind == "direct")

    def objective(self, run: Run) -> Objective:
        """What a run trains, with its seed."""
        inner, hardening = ARMS[run.arm][1:3]
        assert inner, "only an arm with an objective is trained"
        return replace(hardened(self.study, inner, hardening), seed=run.seed) if hardening else inner

    def key_of(self, run: Run, *, audited: bool = False) -> str:
        """What a row depends on."""
        arm = ARMS[run.arm]
        how = [self.objective(run).about(self.study.model.n_layers), asdict(arm.config)] if arm.inner else []
        siege = [ASKED, TOKENS, {name: list(a) for name, a in EDIT_ATTACKS.items()}] if audited else []
        return key_of(run._asdict() if arm.inner else run.arm, how, self.about, siege)

    def folder_of(self, run: Run) -> Path:
        """Where the adapter of a run lies."""
        return self.folder / "adapters" / self.key_of(run)

    def train(self, run: Run) -> dict[str, Any]:
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

    def audit(self, run: Run) -> dict[str, Any]:
        """One run on the test split: a letter an answer, by task and by edit."""
        model = load(self.study.settings.model)
        if ARMS[run.arm].inner:
            model = merged(attached(model, self.folder_of(run)))
        siege = self.study.with_model(model).adaptive_attack(self.direct.prompts)
        edits = [[*cell, letters] for cell, letters in siege.outcomes(siege.cells()).items()]
        return run._asdict() | {"answers": self._answers(model, self.tasks), "edits": edits}


def runs() -> list[Run]:
    """Seed by seed; the model itself has but one."""
    return [Run(arm, seed) for seed in SEEDS for arm in ARMS if ARMS[arm].inner or not seed]


def missing(bench: HardeningBench, run: Run) -> Iterator[bool]:
    """What is not done of a run: False is its training, True its audit."""
    done = finished(bench.folder)
    if ARMS[run.arm].inner and bench.key_of(run) not in done:
        yield False
    if bench.key_of(run, audited=True) not in done and "diverged" not in done.get(bench.key_of(run), {}):
        yield True


def minutes(bench: HardeningBench) -> float:
    """What is still to be paid, in minutes of one busy core."""
    return sum(AUDIT if audit else ARMS[r.arm].seconds for r in runs() for audit in missing(bench, r)) / 60


def work(bench: HardeningBench, part: int) -> None:
    """Do what is missing; each finished row is on disk before the next begins."""
    rows = Rows(bench.folder / f"part-{part}.jsonl")
    print(f"part {part}: about {minutes(bench):.0f} core minutes are to be paid by all parts together", flush=True)
    for run in reversed(runs()) if part == 2 else runs():
        for audit in missing(bench, run):
            rows.put(bench.key_of(run, audited=audit), row := bench.audit(run) if audit else bench.train(run))
            print(f"{told(row)}; {minutes(bench):.0f} core minutes left", flush=True)


def told(row: dict[str, Any]) -> str:
    """A finished row in words."""
    name = f"{ARMS[row['arm']].title}, seed {row['seed']}"
    if "diverged" in row:
        return f"{name}: diverged"
    if "answers" not in row:
        return f"{name}: step {row['step']}, {row['share']:.0%} of the change, {row['seconds']:.0f} s"
    worst = {a: max(success(letters) for b, _, _, letters in row["edits"] if b == a) for a in EDIT_ATTACKS}
    rates = {task: success(text) for task, text in row["answers"].items()} | worst
    return f"{name}: complied with " + ", ".join(f"{task} {rate:.0%}" for task, rate in rates.items())


def pack(bench: HardeningBench) -> Path:
    """Write what is done to ``data/organism/hardening.json``, a line a run."""
    done = finished(bench.folder)
    found = [(r, done[key]) for r in runs() if (key := bench.key_of(r, audited=True)) in done]
    if not found:
        raise ReplibError(f"Nothing is audited in {bench.folder}: run the parts first.")
    tasks = [{"name": t.name, "kind": t.kind, "n": len(t.prompts)} for t in bench.tasks]
    tasks += [{"name": name, "kind": "edit", "n": ASKED} for name in EDIT_ATTACKS]
    lines = ",\n".join(json.dumps(packed(r, row, done.get(bench.key_of(r), {}))) for r, row in found)
    head = json.dumps(bench.about | {"tasks": tasks, "trials": []}, indent=1)[:-2]
    path = write_text(data_dir() / "organism" / "hardening.json", f'{head},\n "runs": [\n{lines}\n]\n}}\n')
    print(f"{len(found)} of {len(runs())} audits, {path.stat().st_size / 1e3:.0f} kB: {path}")
    return path


def packed(run: Run, row: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """One run: answers to all tasks, under the worst edit of each assault, and under the worst of each block."""
    edits = {Cell(a, layer, k): letters for a, layer, k, letters in row["edits"]}
    worst = {a: max((c for c in edits if c.assault == a), key=lambda c: edits[c].count("c")) for a in EDIT_ATTACKS}
    blocks = {a: best_edit_by_block({c: text for c, text in edits.items() if c.assault == a}) for a in EDIT_ATTACKS}
    cost = {name: trained.get(name, 0) for name in ("seconds", "parameters", "step", "share")}
    named = {"method": run.arm, "title": ARMS[run.arm].title, "seed": run.seed} | cost
    answers = row["answers"] | {a: edits[cell] for a, cell in worst.items()}
    return named | {"answers": answers, "worst": {a: list(c[1:]) for a, c in worst.items()}, "blocks": blocks}


def main() -> None:
    """Command line: do a part, or pack what is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--part", type=int, choices=(1, 2), default=1, help="1: from the front, 2: from the back")
    parser.add_argument("--pack", action="store_true", help="write data/organism/hardening.json from what is done")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = HardeningBench(Settings())
    if arguments.pack:
        pack(bench)
    else:
        work(bench, arguments.part)


if __name__ == "__main__":
    main()
