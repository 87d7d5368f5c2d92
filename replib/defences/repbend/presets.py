"""Named hyper-parameters of RepBend: the published ones (arXiv 2504.01550, Appendix A.4), and those of this suite.

| | llama3-8b | mistral-7b | gemma2-2b | qwen2.5-14b | organism | short |
|---|---|---|---|---|---|---|
| alpha / beta / gamma | 0.5 / 0.1 / 0.3 | same | same | same | 0.08 / 30 / 100 | 0.5 / 0.1 / 0.3 |
| steps | 450 | 300 | unknown | unknown | 40 | 30 |
| learning rate | 1e-5 | 1e-5 | unknown | unknown | 1e-3 | 1e-4 |
| target blocks | 19-29 of 32 | 19-29 of 32 | unknown | unknown | 7-11 of 12 | 60-95 % |
| fidelity | official | official | official | official | replib | replib |

Where a value is unknown, ``published`` says None, that of Llama-3 is taken (for layers, its relative depth), and
``fitted`` says so. The published step has 4 micro-batches of 4 examples, each of 5 sequences: two safe, two unsafe and
one retained: four contrasts, four unpaired safe and unsafe answers each and four dialogues, as `mixtures.repbend_mix`
gives them. Without unpaired answers the contrasts are all there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from replib.core.errors import ReplibError
from replib.defences.repbend.config import BendConfig, Scope
from replib.training.config import TrainConfig

# Found on the validation split of the aligned organism.
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
# A micro-batch is four of each group of `mixtures.repbend_mix`: pairs, unpaired safe and unsafe answers, dialogues.
# Clipping is none in the shipped configuration, as far as it can be read: it was not run.
PUBLISHED_TRAIN = TrainConfig(
    steps=450, learning_rate=1e-5, contrasts=4, retain=4, accumulation=4, max_grad_norm=0.0, probe_every=50
)
PUBLISHED_BEND = BendConfig(fidelity="official", target_layers=tuple(range(19, 30)))
UNKNOWN = ("steps", "learning_rate", "target_layers")


class Fitted(NamedTuple):
    """A preset for a model of some depth."""

    bend: BendConfig
    train: TrainConfig
    notes: list[str]
    """What is not as published, as sentences."""


@dataclass(frozen=True)
class Preset:
    """Coefficients and schedule, and what of them is not published."""

    bend: BendConfig
    train: TrainConfig
    depth: int | None = None
    """Blocks of the model that it was published for; None fits any."""
    unknown: tuple[str, ...] = ()
    """Names of values that are not published: stand-ins are taken."""

    @property
    def published(self) -> dict[str, Any]:
        """Coefficients, steps, rate and target blocks by name; None where unknown."""
        found = vars(self.bend) | vars(self.train)
        names = ("alpha", "beta", "gamma", *UNKNOWN)
        return {name: None if name in self.unknown else found[name] for name in names}

    def fitted(self, depth: int) -> Fitted:
        """The preset for a model with ``depth`` blocks, and what is to be said about it."""
        notes = [self._stand_in(name, depth) for name in self.unknown]
        if self.depth not in (None, depth) and "target_layers" not in self.unknown:
            notes.append(f"The target blocks are published for {self.depth} blocks, this model has {depth}: "
                         "the same relative depth is taken.")  # fmt: skip
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
    "llama3-8b": Preset(PUBLISHED_BEND, PUBLISHED_TRAIN, depth=32),
    "mistral-7b": Preset(PUBLISHED_BEND, replace(PUBLISHED_TRAIN, steps=300), depth=32),
    "gemma2-2b": Preset(PUBLISHED_BEND, PUBLISHED_TRAIN, depth=26, unknown=UNKNOWN),
    "qwen2.5-14b": Preset(PUBLISHED_BEND, PUBLISHED_TRAIN, depth=48, unknown=UNKNOWN),
}


def preset_named(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ReplibError: there is none; the message lists them.
    """
    if name not in PRESETS:
        raise ReplibError(f"There is no preset {name!r}: use one of {', '.join(PRESETS)}.")
    return PRESETS[name]
