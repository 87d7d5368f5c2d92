"""Where in depth refusal is decided, by several methods, and how far each is off where the truth is planted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from replib.models.chat_model import ChatModel
from replib.refusals import RefusalTokens

Curve = Float[np.ndarray, " layers"]


def onset(curve: Curve, *, share: float = 0.5, least: float = 0.0) -> int | None:
    """The first block at which a curve reaches a share of its maximum; None where that is 0, or below ``least``."""
    known = np.nan_to_num(curve)
    top = float(known.max())
    return int(np.argmax(known >= share * top)) if top > 0 and top >= least else None


def steepest(curve: Curve) -> int | None:
    """The block that adds most to a curve; None where none adds anything."""
    rise = np.diff(curve, prepend=min(0.0, float(curve[0])))
    return int(rise.argmax()) if rise.max() > 0 else None


def error(found: int | None, planted: Sequence[int]) -> float:
    """Blocks from the nearest planted one: negative is too early, 0 inside, NaN where nothing was found."""
    if found is None:
        return float("nan")
    return float(min((found - block for block in planted), key=abs))


@torch.no_grad()
def lens_profile(
    model: ChatModel, harmful: Float[Tensor, "layers n d"], harmless: Float[Tensor, "layers m d"], tokens: RefusalTokens
) -> Curve:
    """Share of harmful prompts that the logit lens of each block would refuse, less that of harmless ones.

    Activations are those of the last prompt token; a prompt counts as refused where its refusal tokens are likelier
    than all others together.
    """
    refused = [[float((tokens.scores(model.decode(x)) > 0).double().mean()) for x in xs] for xs in (harmful, harmless)]
    return np.array(refused[0]) - np.array(refused[1])


def errors(found: Mapping[str, Mapping[str, int | None]], planted: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """Error of every method on every model, a row a pair: model, method, found, first and last planted block, error."""
    return pd.DataFrame(
        {"model": model, "method": method, "found": block, "first": min(planted[model]), "last": max(planted[model]),
         "error": error(block, planted[model])}
        for model, blocks in found.items()
        for method, block in blocks.items()
    )  # fmt: skip
