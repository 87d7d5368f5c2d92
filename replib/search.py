"""What `replib.tuning` searches over: trainings of a study, measured on validation prompts; and what mattered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd

from replib.bend import BendConfig
from replib.core.storage import key_of
from replib.models.load import load
from replib.references import References
from replib.repbend import RepBend
from replib.study import Study
from replib.training.config import TrainConfig
from replib.training.model_selection import Probe
from replib.training.train import train
from replib.tuning import MAXIMISE, MINIMISE, RANGES, Tuning, need_optuna

AVERAGED = 4  # training steps up to the kept one over which the KL is averaged: one batch alone is noisy


@dataclass(frozen=True)
class StudyObjective:
    """Trains RepBend at given coefficients, on a fresh copy of the study's model each time; all else as given."""

    study: Study
    bend: BendConfig
    config: TrainConfig

    def __call__(self, *, alpha: float, beta: float, gamma: float) -> dict[str, float]:
        """What the step that the probe keeps shows: rates on validation prompts, and the KL on training dialogues.

        Raises:
            Diverged: the loss is not finite.
        """
        s, out = self.study.settings, self.study.settings.out / "tune"
        model = load(s.model, adapter=s.adapter, device=s.device, dtype=s.dtype)
        bend = RepBend(replace(self.bend, alpha=alpha, beta=beta, gamma=gamma), References(out / "base"))
        data, scratch = self.study.bend_data, out / key_of(alpha, beta, gamma, asdict(self.config))
        found = train(model, data, bend, config=self.config, probe=self.probe, out=scratch, say=lambda _: None)
        kept = found.probes.set_index("step").loc[found.step].to_dict()
        recent = found.history[found.history.step.between(found.step - AVERAGED + 1, found.step)]
        rates = {"attack_success": kept.pop("attack"), "harmless_compliance": kept.pop("harmless")}
        return rates | {"kl": float(recent["kl"].mean())} | kept | {"step": float(found.step)}

    @cached_property
    def probe(self) -> Probe:
        """Made once: it holds the prompts."""
        return self.study.probe()


def study_objective(study: Study, bend: BendConfig | None = None, config: TrainConfig | None = None) -> StudyObjective:
    """The objective of a study for ``tune``: its preset, or the given configuration, at other coefficients."""
    preset = study.preset()
    return StudyObjective(study, bend or preset[0], config or preset[1])


def ranges_around(bend: BendConfig, factor: float = 10.0) -> dict[str, tuple[float, float]]:
    """From a ``factor`` below to a ``factor`` above a configuration; the default range where it has a zero."""
    values = {name: getattr(bend, name) for name in RANGES}
    return {name: (x / factor, x * factor) if x else RANGES[name] for name, x in values.items()}


def importances(tuning: Tuning, *, ranges: Mapping[str, tuple[float, float]] = RANGES, seed: int = 0) -> dict[str, Any]:
    """Share of each objective's variance by fANOVA (Hutter, Hoos and Leyton-Brown 2014), on Optuna's random forest.

    Returns:
        Objective -> a row a coefficient, with the share that it explains ``alone``; shares are scaled to add up to 1.
        Fewer than two trials, or trials that all ended alike, explain nothing: shares of 0.
    """
    optuna = need_optuna()
    spaces = {name: optuna.distributions.FloatDistribution(*ends, log=True) for name, ends in ranges.items()}
    found = {}
    for name in (*MINIMISE, *MAXIMISE):
        shares = dict.fromkeys(RANGES, 0.0)
        if tuning.table[name].nunique() > 1:
            search = optuna.create_study()
            for row in tuning.table.to_dict("records"):
                point = {c: row[c] for c in RANGES}
                search.add_trial(optuna.create_trial(params=point, distributions=spaces, value=row[name]))
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
            shares |= optuna.importance.get_param_importances(search, evaluator=evaluator)
        found[name] = pd.DataFrame({"alone": [shares[c] for c in RANGES]}, index=list(RANGES))
    return found
