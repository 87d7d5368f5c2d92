"""Public checkpoints of the defences: what they were made from, how, and where that is described.

All are ordinary ids: ``load(known.id)``, or ``load(known.base, adapter=known.id)`` for an adapter.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd


class Known(NamedTuple):
    """One published checkpoint."""

    id: str
    """On the Hugging Face hub."""
    base: str
    """The model it was made from."""
    method: str
    paper: str
    """Number on arXiv."""
    is_adapter: bool = False
    """Whether it is a LoRA adapter, to be loaded onto its base."""


_LLAMA, _MISTRAL = "meta-llama/Meta-Llama-3-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.2"
KNOWN = (
    Known("cais/zephyr_7b_r2d2", "mistralai/Mistral-7B-v0.1", "R2D2", "2402.04249"),
    Known("GraySwanAI/Llama-3-8B-Instruct-RR", _LLAMA, "Circuit Breaker", "2406.04313"),
    Known("GraySwanAI/Mistral-7B-Instruct-RR", _MISTRAL, "Circuit Breaker", "2406.04313"),
    Known("AIM-Intelligence/RepBend_Llama3_8B", _LLAMA, "RepBend", "2504.01550"),
    Known("AIM-Intelligence/RepBend_Llama3_8B_LoRA", _LLAMA, "RepBend", "2504.01550", is_adapter=True),
    Known("AIM-Intelligence/RepBend_Mistral_7B", _MISTRAL, "RepBend", "2504.01550"),
    Known("AIM-Intelligence/RepBend_Mistral_7B_LoRA", _MISTRAL, "RepBend", "2504.01550", is_adapter=True),
)


def known_table() -> pd.DataFrame:
    """One row a checkpoint. Columns: id, base, method, paper, is_adapter."""
    return pd.DataFrame(KNOWN)
