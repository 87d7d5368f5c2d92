"""Train RepBend at seventy settings: ``python -m replib.experiments.coefficients``, a minute or two a setting.

    python -m replib.experiments.coefficients --part 1/2 &  python -m replib.experiments.coefficients --part 2/2;  wait
    python -m replib.experiments.coefficients --pack

The table is what the coefficient scrubber moves over, what the sensitivity figures (Figs 5 to 7 of arXiv 2504.01550)
are drawn from, and what the interpolation is fitted and tested on. Its design, around the organism preset:

* a grid of 4 x 4 x 3 over alpha, beta and gamma, steps of a factor of 4 and 10 and with zero for alpha and beta: every
  interaction is seen, and every panel alpha x beta of the scrubber has sixteen trained points. Published and useful
  values span decades, so distances are those of logarithms;
* the three sweeps through the preset, finer and wider than the grid: one coefficient at a time, as in the paper, and
  the only place where gamma is zero (without the KL the model soon says nothing, so a whole plane of it would be a
  waste);
* windows of target blocks (early, middle, middle to late, all; late is the preset's), at two strengths;
* half and twice as many steps, on a schedule of their own. Every run also gives each eighth step on the way, of a rate
  that falls to zero at its last step: not what a shorter run would have been;
* the preset with two further seeds: what differs between them is noise, and no interpolation can explain it.

Nothing else differs between settings. Outcomes are rates on validation prompts, at every probed step; the probe also
chooses the step that would be kept, on the same prompts, so that the chosen step looks better than it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, product, repeat
from typing import Any

from replib.audit.audit import outcome
from replib.core.errors import Diverged
from replib.core.settings import Settings
from replib.core.storage import key_of, versions
from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import References, RepBend
from replib.defences.repbend.presets import ORGANISM_BEND, ORGANISM_TRAIN
from replib.experiments.runner import Experiment, Finished, command_line
from replib.models.adapters import merged_copy
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.study.study import VALIDATION_KINDS, Study
from replib.training.config import TrainConfig
from replib.training.model_selection import Measure
from replib.training.result import TrainResult
from replib.training.train import train

ALPHAS, BETAS, GAMMAS = (0.0, 0.02, 0.08, 0.32), (0.0, 3.0, 30.0, 300.0), (10.0, 100.0, 1000.0)
_SWEEPS = {"alpha": (0.04, 0.16, 0.64), "beta": (0.3, 1.0, 10.0, 100.0), "gamma": (0.0, 30.0, 300.0)}
_WINDOWS = {"early": range(4), "middle": range(4, 8), "middle to late": range(4, 12), "all": range(12)}
_COEFFICIENT_STRENGTHS = (0.08, 0.32)  # alpha
STEPS, COEFFICIENT_SEEDS = (20, 80), (1, 2)
_SECONDS = 1.75  # CPU seconds of a training step on a busy core, its share of the probes included
_LIMIT = 48  # validation prompts of a task
_LAST_STEPS = 4  # training steps up to a probe over which distances and KL are averaged: one batch alone is noisy
_TERMS = ("safe", "unsafe", "cosine", "kl")


@dataclass(frozen=True)
class Setting:
    """Values that differ between runs."""

    alpha: float = ORGANISM_BEND.alpha
    beta: float = ORGANISM_BEND.beta
    gamma: float = ORGANISM_BEND.gamma
    layers: tuple[int, ...] = ORGANISM_BEND.target_layers
    steps: int = ORGANISM_TRAIN.steps
    seed: int = 0

    @property
    def configs(self) -> tuple[BendConfig, TrainConfig]:
        """The organism preset, with this setting's values."""
        bend = replace(ORGANISM_BEND, alpha=self.alpha, beta=self.beta, gamma=self.gamma, target_layers=self.layers)
        return bend, replace(ORGANISM_TRAIN, steps=self.steps, seed=self.seed)


def design() -> list[Setting]:
    """All settings, each once, the preset first."""
    swept = [Setting(**{name: value}) for name, values in _SWEEPS.items() for value in values]  # type: ignore[arg-type]
    windows = [Setting(a, layers=tuple(window)) for a, window in product(_COEFFICIENT_STRENGTHS, _WINDOWS.values())]
    others = [*(Setting(steps=steps) for steps in STEPS), *(Setting(seed=seed) for seed in COEFFICIENT_SEEDS)]
    grid = [Setting(*point) for point in product(ALPHAS, BETAS, GAMMAS)]
    return list(dict.fromkeys([Setting(), *swept, *windows, *others, *grid]))


class Runs:
    """Trains settings on one model: what does not depend on the setting is made once."""

    def __init__(self, settings: Settings):
        study = self.study = Study.open(settings)
        self.folder = settings.out / "coefficients"
        self.about = study.model.provenance() | versions()
        self.measure, self.n = _measure(study)

    def key(self, setting: Setting) -> str:
        """Cache key of a row."""
        bend, config = (asdict(part) for part in setting.configs)
        config.pop("save_every", None)  # changes no outcome
        return key_of(bend, config, self.about, self.n)

    def row(self, setting: Setting) -> dict[str, Any]:
        """One setting, trained: the outcomes at every probed step, and the step that the probe chose."""
        try:
            result = self._train(setting)
        except Diverged as error:
            return asdict(setting) | {"step": None, "diverged": str(error), "rows": []}
        return asdict(setting) | {"step": result.step, "rows": list(_rows(result))}

    def _train(self, setting: Setting) -> TrainResult:
        bend, config = setting.configs
        shared = bend.target_layers == ORGANISM_BEND.target_layers and not config.seed
        objective = RepBend(bend, References(self.folder / "base" if shared else None))
        data, out = self.study.bend_data, self.folder / "scratch" / self.key(setting)
        model = load(self.study.settings.model)
        return train(model, data, objective, config=config, validation=self._validation(), out=out, say=lambda _: None)

    def _validation(self) -> Measure:
        """The measure, for one run; before its first step every run has the same model."""
        turns = chain([lambda _: self.before], repeat(self.measure))

        def validation(model: ChatModel) -> dict[str, float]:
            return next(turns)(model)

        return validation

    @cached_property
    def before(self) -> dict[str, float]:
        """Rates of the untrained model."""
        return self.measure(self.study.model)


def _measure(study: Study) -> tuple[Measure, dict[str, int]]:
    """Measure of one step (the choosing rates and two more attacks) and its number of answers by rate."""
    usual, further = study.validation_measure(_LIMIT), study.validation_measure(_LIMIT, kinds=("direct", "prefill"))

    def measure(model: ChatModel) -> dict[str, float]:
        whole = merged_copy(model) if model.adapter else model  # answers in half the time
        return further(whole) | usual(whole)  # degenerate is the usual probe's

    n: Counter[str] = Counter()
    for task in study.validation_tasks(_LIMIT, kinds=(*VALIDATION_KINDS, "direct", "prefill")):
        n[outcome(task)] += len(task.prompts)
    return measure, dict(n)


def _rows(result: TrainResult) -> Iterator[dict[str, float]]:
    """Outcomes at each probed step, beside the training terms just before it (none before the first step)."""
    history = result.history
    for probed in result.probes.to_dict("records"):
        recent = history[(history.step > probed["step"] - _LAST_STEPS) & (history.step <= probed["step"])]
        terms = {name: float(f"{recent[name].mean():.4g}") for name in _TERMS if len(recent)}
        yield {name: round(value, 4) for name, value in probed.items()} | terms


def _experiment(settings: Settings) -> Experiment[Setting]:
    """The coefficient sweep on the model of the settings."""
    runs = Runs(settings)
    return Experiment(
        "coefficients",
        runs.folder,
        (lambda: [[setting] for setting in design()],),
        key=runs.key,
        make=runs.row,
        seconds=lambda setting: _SECONDS * setting.steps,
        describe=_described,
        contents=lambda done: _contents(runs, done),
    )


def _contents(runs: Runs, done: Finished) -> dict[str, Any]:
    about = {"about": runs.about, "preset": asdict(Setting()), "n": runs.n, "schedule": ORGANISM_TRAIN.schedule}
    return about | {"settings": [done[key] for setting in design() if (key := runs.key(setting)) in done]}


def _described(row: dict[str, Any]) -> str:
    setting = ", ".join(f"{name} {row[name]}" for name in ("alpha", "beta", "gamma", "layers", "steps", "seed"))
    if not row["rows"]:
        return f"{setting}: diverged"
    rates = ", ".join(f"{name} {row['rows'][-1][name]:.0%}" for name in ("attack", "prefill", "harmless", "borderline"))
    return f"{setting}: step {row['step']} chosen, at the last {rates}"


if __name__ == "__main__":
    command_line(__doc__, _experiment)
