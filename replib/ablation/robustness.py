"""How many tokens deep refusal is: edits fitted at the prompt's end, at answer tokens, or at both.

What fits an edit at answer token t: harmful prompts and harmless ones, each with a compliant answer that it is made
to read, the activation of the t-th token of the answer. Both classes read answers of one kind, so that what the map
carries over is the class and not the wording; with the model's own answers it would carry refusing words to
complying ones, and in front of any other word it leaves the model without sense.

Where it acts: at the block it was fitted at, on every answer token as it is written (``response``). An edit fitted at
the last prompt token acts there, once, as the published audit has it. ``prompt + …`` do both; the two are fitted
independently, on the unedited model.
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

TOKENS = (1, 2, 4, 5, 8)  # of an answer, the first is 1
PROMPT, ON_ANSWER, SPAN = "prompt", "prompt, on the answer", "mean of the answer"
States = Float[Tensor, "layers _ d"]


def answer_states(
    model: ChatModel, dialogues: Sequence[Dialogue], tokens: Sequence[int] = TOKENS, **options: object
) -> dict[str, States]:
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
    """What tables call an answer token."""
    return f"token {token}"


def token_edits(
    harmful: Mapping[str, States], harmless: Mapping[str, States], method: str | Method = "pca_ot", *, k: int = 2
) -> dict[str, list[Edited]]:
    """Edits of one block each, block by block, for every place that fits one and every set of tokens it acts on."""
    at = {name: _by_block(harmful[name], harmless[name], method, k) for name in harmful}
    once = at.pop(PROMPT)
    found: dict[str, list[Edited]] = {PROMPT: [{"last_prompt": e} for e in once]}
    found |= {name: [{"response": e} for e in later] for name, later in ({ON_ANSWER: once} | at).items()}
    for name, later in at.items():
        found[f"{PROMPT} + {name}"] = [{"last_prompt": a, "response": b} for a, b in zip(once, later, strict=True)]
    return found


def _by_block(x: States, y: States, method: str | Method, k: int) -> list[SiteEdits]:
    return [fit_edit(method, a, b, i, k=k, depth=len(x)) for i, (a, b) in enumerate(zip(x, y, strict=True))]


STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0)


def scaled(edit: Edited, strengths: Sequence[float] = STRENGTHS) -> list[Edited]:
    """The same edit at each strength, on each of its tokens; beyond 1 it overshoots.

    Raises ReplibError unless strengths rise from zero or above.
    """
    if not strengths or strengths[0] < 0 or np.any(np.diff(strengths) <= 0):
        raise ReplibError(f"Strengths {list(strengths)} must rise, from 0 or above: give each once, upwards.")
    return [{where: {place: e * s for place, e in edits.items()} for where, edits in edit.items()} for s in strengths]


def least_strengths(
    complied: Bool[np.ndarray, "strengths prompts"], strengths: Sequence[float] = STRENGTHS
) -> Float[np.ndarray, " prompts"]:
    """The smallest strength at which each prompt was complied with; inf where it never was."""
    return np.where(complied.any(0), np.array(strengths)[complied.argmax(0)], np.inf)


def holding(least: Float[np.ndarray, "seeds prompts"], strengths: Sequence[float] = STRENGTHS) -> pd.DataFrame:
    """Share of prompts that no strength up to each has flipped: strength, value, low, high, n.

    The interval is ``audit.crossed_rate``'s, for other trainings and other prompts.
    """
    rows = []
    for s in strengths:
        held = (least > s).astype(float)
        rows.append((s, held.mean(), *two_way_rate_interval(held), held.size))
    return pd.DataFrame(rows, columns=["strength", "value", "low", "high", "n"])
