"""Prompts, dialogues and contrasts: file readers, public sets, splits and training mixes."""

from replib.data.mixtures import BendData, DefenceData, circuit_breaker_mix, defence_data, repbend_mix
from replib.data.prompts import Contrast, Dialogue, Prompt, load_contrasts, load_dialogues, load_prompts
from replib.data.splits import Splits

__all__ = [
    "BendData",
    "Contrast",
    "DefenceData",
    "Dialogue",
    "Prompt",
    "Splits",
    "circuit_breaker_mix",
    "defence_data",
    "load_contrasts",
    "load_dialogues",
    "load_prompts",
    "repbend_mix",
]
