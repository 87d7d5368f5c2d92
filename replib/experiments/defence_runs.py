"""Runs of defences on the organism: trained with a seed, scored on validation, audited on test."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from replib.audit.audit import Task
from replib.audit.judges import encode_outcomes
from replib.core.errors import Diverged
from replib.core.settings import Settings
from replib.core.storage import key_of, versions
from replib.data.mixtures import DefenceData, defence_data
from replib.defences.catalogue import Baseline, prepares, safety_prompted, train_baseline
from replib.defences.organism_grid import BENIGN, CONTENDERS
from replib.defences.repbend.objective import RepBend
from replib.defences.rmu import RMU
from replib.models.adapters import attached, merged, merged_copy
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.study.study import Study
from replib.training.model_selection import default_choice
from replib.training.objective import Objective
from replib.training.result import TrainResult
from replib.training.train import FitDefence, train

PROBED, ASKED = 32, 64  # prompts of a validation task, and of a test task
MAX_ANSWER_TOKENS = 40  # of an answer at most


@dataclass(frozen=True)
class Run:
    """One training, or the model itself where a method trains nothing."""

    method: str
    trial: int = 0
    """Point of the method's grid."""
    seed: int = 0

    @property
    def rival(self) -> Baseline | None:
        """Objective and configuration with this seed."""
        if not (grid := CONTENDERS[self.method].grid):
            return None
        objective, config = grid[self.trial]
        drawn = replace(objective, seed=self.seed) if isinstance(objective, RMU) else objective
        return Baseline(drawn, replace(config, seed=self.seed))


class TimedValidation:
    """Validation of one run: its rates and its CPU time."""

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
        """Highest score of a probed step."""
        return max(default_choice(found, self.found[0]) for found in self.found[1:])


class Bench:
    """Trains and audits on one model: what does not depend on the run is made once."""

    def __init__(self, settings: Settings):
        self.study = Study.open(settings)
        self.folder = settings.out / "comparison"
        self.about: dict[str, Any] = self.study.model.provenance() | versions() | {"probed": PROBED, "benign": BENIGN}
        self.tasks = self.study.tasks("test", ASKED)
        self.measure = self.study.validation_measure(PROBED)

    @cached_property
    def rivals(self) -> DefenceData:
        """Training data of the rivals."""
        return defence_data(self.study.bend_data, benign=BENIGN)

    @cached_property
    def before(self) -> dict[str, float]:
        """Validation rates of the untrained model."""
        return self.measure(self.study.model)

    def measured(self, model: ChatModel) -> dict[str, float]:
        """Validation rates of a model in training."""
        return self.measure(merged_copy(model))

    def key(self, run: Run, *, audited: bool = False) -> str:
        """Cache key of a row."""
        rival = run.rival
        how = [repr(rival.objective), asdict(rival.config)] if rival else [run.method, run.seed]
        return key_of(how, self.about, [ASKED, MAX_ANSWER_TOKENS] if audited else None)

    def adapter(self, run: Run) -> Path:
        """Folder of the adapter of a run."""
        return self.folder / "adapters" / self.key(run)

    def trained(self, run: Run) -> dict[str, Any]:
        """One run, trained: its validation score and what it cost; no score where it diverged."""
        rival, watch, data = run.rival, TimedValidation(self), self.rivals
        assert rival, "only a method with a grid is trained"
        start = time.process_time()
        with TemporaryDirectory() as out:
            try:
                model, fit = load(self.study.settings.model), self._fit(rival, watch, Path(out))
                model = train_baseline(rival.objective, model, data, fit, validation=watch, out=out).model
            except Diverged as error:
                return asdict(run) | {"score": None, "diverged": str(error)}
        seconds = time.process_time() - start - watch.seconds
        return asdict(run) | {"score": watch.score, "probes": watch.found} | saved(model, self.adapter(run), seconds)

    def _fit(self, rival: Baseline, watch: TimedValidation, out: Path) -> FitDefence:
        """Trains an objective; what only prepares another is taken as it ends."""

        def fit(model: ChatModel, data: DefenceData, objective: Objective) -> TrainResult:
            given = self.study.bend_data if isinstance(objective, RepBend) else data
            validation = None if prepares(objective, rival.objective) else watch
            return train(
                model, given, objective, config=rival.config, validation=validation, out=out / "run", say=lambda _: None
            )

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
        answers = model.generate(asked, max_new_tokens=MAX_ANSWER_TOKENS, prefills=prefills, batch_size=256)
        letters = iter(encode_outcomes(self.study.judge(prompts, answers)))
        return {t.name: "".join(next(letters) for _ in t.prompts) for t in tasks}


def saved(model: ChatModel, folder: Path, seconds: float) -> dict[str, float]:
    """Write an adapter, and say what it cost."""
    model.model.save_pretrained(folder)
    size = sum(p.numel() for name, p in model.model.named_parameters() if ".lora_" in name)
    return {"seconds": round(seconds, 1), "parameters": size}


def _prompted(task: Task, seed: int) -> Task:
    return replace(task, prompts=safety_prompted(task.prompts, seed))
