"""Compare the defences on the organism: ``python -m replib.organism.comparison``, about two hours of one core.

    python -m replib.organism.comparison --part 1 &  python -m replib.organism.comparison --part 2;  wait
    python -m replib.organism.comparison --pack

First each method of ``contenders`` is trained at every point of its grid (seed 0), and validation chooses the point.
Then the chosen ones are trained with five seeds and audited on the test split: seed 0 of all methods, then seed 1 of
all, so that an interrupted run can be packed too. Part 1 goes through this from the front, part 2 from the back, and
each leaves out what it finds done; part 1 alone does everything.

Validation prompts choose the step of a run as well, every tenth step, for every method alike: that of its highest score
is kept. Test prompts choose nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from replib.activations import versions
from replib.audit import Task
from replib.chat import ChatModel
from replib.errors import Diverged, ReplibError
from replib.keeper import default_choice
from replib.likelihood import SFT
from replib.mixtures import DefenceData, defence_data
from replib.models import attached, load, merged, merged_copy
from replib.objective import Objective
from replib.organism.contenders import BENIGN, CONTENDERS, for_rivals
from replib.prompting import safety_prompted
from replib.reinforced import Fit
from replib.repbend import RepBend
from replib.rerouting import RMU
from replib.rivals import Rival, train_rival
from replib.settings import Settings, data_dir
from replib.store import Rows, finished, key_of, write_text
from replib.study import Study
from replib.train import TrainResult, train

SEEDS = range(5)
PROBED, ASKED = 32, 64  # prompts of a validation task, and of a test task
TOKENS = 40  # of an answer at most
PROBING, AUDITING = 14, 15  # CPU seconds of a busy core: the probes of one run, one audit


@dataclass(frozen=True)
class Run:
    """One training, or the model itself where a method trains nothing."""

    method: str
    trial: int = 0
    """Which point of the method's grid."""
    seed: int = 0

    @property
    def rival(self) -> Rival | None:
        """What is trained, with this seed."""
        if not (grid := CONTENDERS[self.method].grid):
            return None
        objective, config = grid[self.trial]
        drawn = replace(objective, seed=self.seed) if isinstance(objective, RMU) else objective
        return Rival(drawn, replace(config, seed=self.seed))


class Watch:
    """The validation probe of one run: what it found, and the time that it took."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.found: list[dict[str, float]] = []
        self.seconds = 0.0

    def __call__(self, model: ChatModel) -> dict[str, float]:
        """Measure a model; before training every run has the same one."""
        start = time.process_time()
        self.found.append(self.bench.measured(model) if self.found else self.bench.before)
        self.seconds += time.process_time() - start
        return self.found[-1]

    @property
    def score(self) -> float:
        """That of what was kept: the highest."""
        return max(default_choice(found, self.found[0]) for found in self.found[1:])


class Bench:
    """Trains and audits on one model: what does not depend on the run is made once."""

    def __init__(self, settings: Settings):
        self.study = Study.open(settings)
        self.folder = settings.out / "comparison"
        self.about = self.study.model.provenance() | versions() | {"probed": PROBED, "benign": BENIGN}
        self.tasks = self.study.tasks("test", ASKED)
        self.measure = self.study.probe(PROBED)

    @cached_property
    def rivals(self) -> DefenceData:
        """What the rivals train on."""
        return for_rivals(defence_data(self.study.bend_data))

    @cached_property
    def before(self) -> dict[str, float]:
        """What validation finds in the model itself."""
        return self.measure(self.study.model)

    def measured(self, model: ChatModel) -> dict[str, float]:
        """What validation finds in a model in training."""
        return self.measure(merged_copy(model))

    def key(self, run: Run, *, audited: bool = False) -> str:
        """What a row depends on."""
        rival = run.rival
        how = [repr(rival.objective), asdict(rival.config)] if rival else [run.method, run.seed]
        return key_of(how, self.about, [ASKED, TOKENS] if audited else None)

    def adapter(self, run: Run) -> Path:
        """Where the adapter of a run lies."""
        return self.folder / "adapters" / self.key(run)

    def trained(self, run: Run) -> dict[str, Any]:
        """One run, trained: its validation score and what it cost; no score where it diverged."""
        rival, watch, data = run.rival, Watch(self), self.rivals
        assert rival, "only a method with a grid is trained"
        start = time.process_time()
        with TemporaryDirectory() as out:
            try:
                model, fit = load(self.study.settings.model), self._fit(rival, watch, Path(out))
                model = train_rival(rival.objective, model, data, fit, probe=watch, out=out)
            except Diverged as error:
                return asdict(run) | {"score": None, "diverged": str(error)}
        seconds = time.process_time() - start - watch.seconds
        model.model.save_pretrained(self.adapter(run))
        size = sum(p.numel() for name, p in model.model.named_parameters() if ".lora_" in name)
        cost = {"seconds": round(seconds, 1), "parameters": size}
        return asdict(run) | {"score": watch.score, "probes": watch.found} | cost

    def _fit(self, rival: Rival, watch: Watch, out: Path) -> Fit:
        """Trains an objective. Models that only prepare another are taken as they end: nothing is to choose there."""

        def fit(model: ChatModel, data: DefenceData, objective: Objective) -> TrainResult:
            given = self.study.bend_data if isinstance(objective, RepBend) else data
            prepares = isinstance(objective, SFT) and not isinstance(rival.objective, SFT)
            probe = None if prepares else watch
            return train(model, given, objective, config=rival.config, probe=probe, out=out / "run", say=lambda _: None)

        return fit

    def audited(self, run: Run) -> dict[str, Any]:
        """One run on the test split: a letter an answer, r(efusal), c(ompliance) or d(egenerate), by task."""
        tasks = [_prompted(task, run.seed) for task in self.tasks] if run.method == "prompting" else self.tasks
        model = load(self.study.settings.model)
        if run.rival:
            model = merged(attached(model, self.adapter(run)))
        return asdict(run) | {"answers": self._answers(model, tasks)}

    def _answers(self, model: ChatModel, tasks: Sequence[Task]) -> dict[str, str]:
        prompts = [p for t in tasks for p in t.prompts]
        prefills = [text for t in tasks for text in t.prefills or [""] * len(t.prompts)]
        asked = [p.text for p in prompts]
        answers = model.generate(asked, max_new_tokens=TOKENS, prefills=prefills, batch_size=256)
        letters = iter(outcome.value[0] for outcome in self.study.judge(prompts, answers))
        return {t.name: "".join(next(letters) for _ in t.prompts) for t in tasks}


def _prompted(task: Task, seed: int) -> Task:
    return replace(task, prompts=safety_prompted(task.prompts, seed))


# --------------------------------------------------------------------------------------------- the design
def trials() -> list[Run]:
    """Every point of every grid, where there is something to choose."""
    return [Run(name, i) for name, (_, grid, _) in CONTENDERS.items() for i in range(len(grid)) if len(grid) > 1]


def finals(bench: Bench) -> list[Run]:
    """What is audited: five seeds of what validation chose, seed by seed; the model itself has but one."""
    chosen = choice(bench)
    runs = [Run(name, chosen[name], seed) for seed in SEEDS for name in CONTENDERS]
    return [run for run in runs if run.method != "none" or not run.seed]


def choice(bench: Bench) -> dict[str, int]:
    """The point of each grid with the highest validation score; the first where none is known yet."""
    done, best = finished(bench.folder), dict.fromkeys(CONTENDERS, (float("-inf"), 0))
    for run in trials():
        score = done.get(bench.key(run), {}).get("score")
        if score is not None and score > best[run.method][0]:
            best[run.method] = (score, run.trial)
    return {name: trial for name, (_, trial) in best.items()}


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


# --------------------------------------------------------------------------------------------- the program
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
    if "answers" not in row:
        return f"{name}: " + (
            "diverged" if row["score"] is None else f"score {row['score']:.2f}, {row['seconds']:.0f} s"
        )
    rates = {task: text.count("c") / len(text) for task, text in row["answers"].items()}
    return f"{name}: complied with " + ", ".join(f"{task} {rate:.0%}" for task, rate in rates.items())


def pack(bench: Bench) -> Path:
    """Write what is done to ``data/organism/comparison.json``, a line a run."""
    done, runs = finished(bench.folder), finals(bench)
    audits = [done[key] | _paid(done, bench, r) for r in runs if (key := bench.key(r, audited=True)) in done]
    if not audits:
        raise ReplibError(f"Nothing of the comparison is audited in {bench.folder}: run the parts first.")
    tasks = [{"name": t.name, "kind": t.kind, "n": len(t.prompts)} for t in bench.tasks]
    tried = [_point(r) | done[key] for r in trials() if (key := bench.key(r)) in done]
    parts = {"tasks": tasks, "trials": tried, "runs": audits}
    lists = ",\n".join(f' "{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in parts.items())
    head = json.dumps({"about": bench.about, "chosen": choice(bench)}, indent=1)[:-2]
    path = write_text(data_dir() / "organism" / "comparison.json", f"{head},\n{lists}\n}}\n")
    print(f"{len(audits)} of {len(runs)} audits, {path.stat().st_size / 1e3:.0f} kB: {path}")
    return path


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
