"""Presets of RepBend: published hyper-parameters (arXiv 2504.01550, Appendix A.4), and those of this suite.

| | llama3-8b | mistral-7b | gemma2-2b | qwen2.5-14b | organism | short |
|---|---|---|---|---|---|---|
| alpha / beta / gamma | 0.5 / 0.1 / 0.3 | same | same | same | 0.08 / 30 / 100 | 0.5 / 0.1 / 0.3 |
| steps | 450 | 300 | unknown | unknown | 40 | 30 |
| learning rate | 1e-5 | 1e-5 | unknown | unknown | 1e-3 | 1e-4 |
| target blocks | 19-29 of 32 | 19-29 of 32 | unknown | unknown | 7-11 of 12 | 60-95 % |
| fidelity | official | official | official | official | replib | replib |

An unknown value is None in ``published``; the value of Llama-3 stands in (for layers, its relative depth), and
``fitted`` notes it. The published step has 4 micro-batches of 4 examples, each of 5 sequences (two safe, two unsafe,
one retained). Here a micro-batch is four contrasts, four unpaired safe and four unpaired unsafe answers, and four
dialogues, from ``mixtures.repbend_mix``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from replib.core.errors import ReplibError
from replib.defences.repbend.config import BendConfig, Scope
from replib.training.config import TrainConfig

# Chosen on the validation split of the aligned organism.
ORGANISM_BEND = BendConfig(
    alpha=0.08,
    beta=30.0,
    gamma=100.0,
    temperature=1.0,
    target_layers=(7, 8, 9, 10, 11),
    max_distance=0.8,
    directional=True,
    decision=True,
    custom=Scope(kl_rows="safe"),
    anchored=True,
)
ORGANISM_TRAIN = TrainConfig(
    steps=40, contrasts=8, retain=40, dropout=0.0, learning_rate=1e-3, schedule="linear", probe_every=8
)
SHORT_TRAIN = TrainConfig(steps=30, contrasts=4, retain=4, learning_rate=1e-4, probe_every=15)
# The official configuration, which was read and not run, clips no gradients.
_PUBLISHED_TRAIN = TrainConfig(
    steps=450, learning_rate=1e-5, contrasts=4, retain=4, accumulation=4, max_grad_norm=0.0, probe_every=50
)
PUBLISHED_BEND = BendConfig(fidelity="official", target_layers=tuple(range(19, 30)))
_UNREPORTED = ("steps", "learning_rate", "target_layers")


class Fitted(NamedTuple):
    """A preset for a model of some depth."""

    bend: BendConfig
    train: TrainConfig
    notes: list[str]
    """Sentences on values that differ from the published ones."""


@dataclass(frozen=True)
class Preset:
    """Coefficients and schedule, and the names of unpublished values."""

    bend: BendConfig
    train: TrainConfig
    depth: int | None = None
    """Number of blocks of the published model; None fits any."""
    unknown: tuple[str, ...] = ()
    """Names of unpublished values, which have stand-ins."""

    @property
    def published(self) -> dict[str, Any]:
        """Coefficients, steps, rate and target blocks by name; None where unknown."""
        found = vars(self.bend) | vars(self.train)
        names = ("alpha", "beta", "gamma", *_UNREPORTED)
        return {name: None if name in self.unknown else found[name] for name in names}

    def fitted(self, depth: int) -> Fitted:
        """Preset for a model with ``depth`` blocks, with notes."""
        notes = [self._stand_in(name, depth) for name in self.unknown]
        if self.depth not in (None, depth) and "target_layers" not in self.unknown:
            notes.append(f"The target blocks are published for {self.depth} blocks, this model has {depth}; "
                         "they keep their relative depth.")  # fmt: skip
        elsewhere = "target_layers" in self.unknown or self.depth not in (None, depth)
        return Fitted(replace(self.bend, target_layers=()) if elsewhere else self.bend, self.train, notes)

    def _stand_in(self, name: str, depth: int) -> str:
        if name == "target_layers":
            layers = replace(self.bend, target_layers=()).layers(depth)
            return f"The target blocks are not published: {layers[0]} to {layers[-1]} of {depth}, by relative depth."
        return f"{name} is not published: {getattr(self.train, name):g}, that of Llama-3, unless another is given."


PRESETS = {
    "organism": Preset(ORGANISM_BEND, ORGANISM_TRAIN),
    "short": Preset(BendConfig(), SHORT_TRAIN),
    "llama3-8b": Preset(PUBLISHED_BEND, _PUBLISHED_TRAIN, depth=32),
    "mistral-7b": Preset(PUBLISHED_BEND, replace(_PUBLISHED_TRAIN, steps=300), depth=32),
    "gemma2-2b": Preset(PUBLISHED_BEND, _PUBLISHED_TRAIN, depth=26, unknown=_UNREPORTED),
    "qwen2.5-14b": Preset(PUBLISHED_BEND, _PUBLISHED_TRAIN, depth=48, unknown=_UNREPORTED),
}


def preset_named(name: str) -> Preset:
    """Preset by name.

    Raises:
        ReplibError: no preset has that name; the message lists all.
    """
    if name not in PRESETS:
        raise ReplibError(f"There is no preset {name!r}: use one of {', '.join(PRESETS)}.")
    return PRESETS[name]
