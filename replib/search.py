"""What `replib.defences.tuning` searches over: trainings of a study, measured on validation prompts; and what mattered."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

from replib.core.storage import key_of
from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import References, RepBend
from replib.models.load import load
from replib.study import Study
from replib.training.config import TrainConfig
from replib.training.model_selection import Probe
from replib.training.train import train

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
