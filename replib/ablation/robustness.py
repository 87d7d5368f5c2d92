"""Robustness of refusal: edits fitted at the end of the prompt, at answer tokens or at both, and least strengths.

An edit at answer token t is fitted on the activation of the t-th token of a forced, compliant answer to prompts of
both classes. Both classes read answers of one kind, so the map carries the class and not the wording; own answers
would map refusing words to complying ones, and the model degenerates in front of any other word.

The edit acts at its block on every answer token as it is written (``response``). An edit fitted at the last prompt
token acts there, once, as published. ``prompt + …`` do both, fitted independently on the unedited model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from replib.activations.capture import capture
from replib.core.errors import ReplibError
from replib.core.stats import two_way_rate_interval
from replib.data.prompts import Dialogue
from replib.edits.apply import Edited
from replib.edits.methods import Method, SiteEdits, fit_edit
from replib.models.chat_model import ChatModel
from replib.models.tokens import SPANS, Position

ANSWER_TOKENS = (1, 2, 4, 5, 8)  # of an answer, the first is 1
PROMPT, ON_ANSWER, SPAN = "prompt", "prompt, on the answer", "mean of the answer"
_LayerStates = Float[Tensor, "layers _ d"]


def token_states(
    model: ChatModel, dialogues: Sequence[Dialogue], tokens: Sequence[int] = ANSWER_TOKENS, **options: object
) -> dict[str, _LayerStates]:
    """Activations at the last prompt token, at some tokens of the answers, and their mean over each answer.

    Answers shorter than the last of the tokens are left out, everywhere. Options are those of ``capture``.

    Raises ReplibError where fewer than two answers are long enough.
    """
    rows = model.tokenize([d.prompt for d in dialogues], [d.response for d in dialogues])
    long = [d for d, row in zip(dialogues, rows, strict=True) if len(SPANS["response"].of_row(row)) >= max(tokens)]
    if len(long) < 2:
        raise ReplibError(
            f"{len(long)} of {len(dialogues)} answers have {max(tokens)} tokens: ask for earlier tokens, or give "
            "longer answers."
        )
    places: dict[str, Position] = {PROMPT: -1, **{token_name(t): t - 1 for t in tokens}, SPAN: "response"}
    texts = {"prompts": [d.prompt for d in long], "responses": [d.response for d in long]}
    found = capture(model, **texts, positions=list(places.values()), **options)  # type: ignore[arg-type]
    return {name: found.values[:, :, i] for i, name in enumerate(places)}


def token_name(token: int) -> str:
    """Title of an answer token in tables."""
    return f"token {token}"


def token_edits(
    harmful: Mapping[str, _LayerStates],
    harmless: Mapping[str, _LayerStates],
    method: str | Method = "pca_ot",
    *,
    k: int = 2,
) -> dict[str, list[Edited]]:
    """Edits of one block each, block by block, for every place that fits one and every set of tokens it acts on."""
    at = {name: _by_block(harmful[name], harmless[name], method, k) for name in harmful}
    once = at.pop(PROMPT)
    found: dict[str, list[Edited]] = {PROMPT: [{"last_prompt": e} for e in once]}
    found |= {name: [{"response": e} for e in later] for name, later in ({ON_ANSWER: once} | at).items()}
    for name, later in at.items():
        found[f"{PROMPT} + {name}"] = [{"last_prompt": a, "response": b} for a, b in zip(once, later, strict=True)]
    return found


def _by_block(x: _LayerStates, y: _LayerStates, method: str | Method, k: int) -> list[SiteEdits]:
    return [fit_edit(method, a, b, i, k=k, depth=len(x)) for i, (a, b) in enumerate(zip(x, y, strict=True))]


FLIP_STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0)


def least_strengths(
    complied: Bool[np.ndarray, "strengths prompts"], strengths: Sequence[float] = FLIP_STRENGTHS
) -> Float[np.ndarray, " prompts"]:
    """The smallest strength at which each prompt was complied with; inf without any."""
    return np.where(complied.any(0), np.array(strengths)[complied.argmax(0)], np.inf)


def holding(least: Float[np.ndarray, "seeds prompts"], strengths: Sequence[float] = FLIP_STRENGTHS) -> pd.DataFrame:
    """Share of prompts that hold at every strength up to each: columns strength, value, low, high, n.

    Intervals are those of ``two_way_rate_interval``, over trainings and prompts.
    """
    rows = []
    for s in strengths:
        held = (least > s).astype(float)
        rows.append((s, held.mean(), *two_way_rate_interval(held), held.size))
    return pd.DataFrame(rows, columns=["strength", "value", "low", "high", "n"])
