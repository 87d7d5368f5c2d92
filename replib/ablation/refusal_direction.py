"""Refusal directions of every block and template token, and the selection among them (arXiv 2406.11717).

Ablated everywhere, a direction should undo refusal (bypass); added where it was read, it should make the model refuse
harmless prompts (induce); and answers to harmless prompts should stay (KL).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from replib.ablation.damage import token_kl
from replib.ablation.refusal_score import RefusalTokens, first_logits
from replib.activations.capture import capture
from replib.core.errors import ReplibError
from replib.core.progress import progress
from replib.edits.apply import applied
from replib.edits.methods import everywhere
from replib.models.chat_model import ChatModel
from replib.models.tokens import SPANS, Row
from replib.transport.affine import AffineEdit


@dataclass(frozen=True)
class Filters:
    """Conditions on a direction; defaults of arXiv 2406.11717."""

    kl: float | None = 0.1
    """Most nats on harmless prompts, under ablation."""
    induce: float | None = 0.0
    """Least refusal score of harmless prompts, under addition."""
    depth: float = 0.8
    """Share of the layers, from below, that are candidates."""

    def passed(self, table: pd.DataFrame) -> pd.Series:
        """Candidates that satisfy the filters; a NaN does not."""
        good = table[["bypass", "induce", "kl"]].notna().all(axis=1)
        good &= True if self.kl is None else table.kl <= self.kl
        return good & (True if self.induce is None else table.induce >= self.induce)


@dataclass(frozen=True)
class Direction:
    """The selected direction, and the scores of all candidates."""

    r: Float[Tensor, " d"]
    """Difference in means, harmful minus harmless, not normalised."""
    layer: int
    """It was read at the input of this block (``resid_pre``), as in its source."""
    position: int
    """Token, counted from where the response begins."""
    passed: bool
    """Whether it satisfies the filters."""
    table: pd.DataFrame
    """Layer, position, bypass, induce, kl and passed of every candidate."""


def selected_direction(
    model: ChatModel, harmful: Sequence[str], harmless: Sequence[str], layers: Sequence[int]
) -> Direction:
    """The direction selected among some blocks: four fifths of the prompts fit the candidates, the others choose.

    The source, too, fits on 128 prompts a class and selects on 32.

    Raises ReplibError as ``RefusalTokens.find`` and ``select_direction``.
    """
    tokens = RefusalTokens.find(model, harmful, harmless)
    (fit, val), (fit_harmless, val_harmless) = _held_out(harmful), _held_out(harmless)
    return select_direction(model, mean_gaps(model, fit, fit_harmless, layers), (val, val_harmless), tokens)


def selection_tokens(model: ChatModel, harmful: Sequence[str], harmless: Sequence[str], layers: Sequence[int]) -> int:
    """Prompt tokens that ``selected_direction`` reads at most: to find refusals, to fit, and for each candidate."""
    rows = model.tokenize([*harmful, *harmless])
    val, val_harmless = (sum(map(len, model.tokenize(_held_out(x)[1]))) for x in (harmful, harmless))
    candidates = sum(layer < int(Filters.depth * model.n_layers) for layer in layers) * len(_positions(rows))
    return 2 * sum(map(len, rows)) - val + candidates * (val + 2 * val_harmless)


def _held_out(prompts: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    n = max(1, len(prompts) // 5)
    return prompts[:-n], prompts[-n:]


def _positions(rows: Sequence[Row]) -> list[int]:
    """Template tokens behind the instruction, counted from where the response begins; without any, the last one."""
    return list(range(-max(1, min(len(SPANS["post_instruction"].of_row(row)) for row in rows)), 0))


def mean_gaps(
    model: ChatModel, harmful: Sequence[str], harmless: Sequence[str], layers: Sequence[int]
) -> dict[tuple[int, int], Float[Tensor, " d"]]:
    """Difference in means at the input of blocks, for each template token after the instruction, by layer, position.

    Means are float64. Without a template, the last prompt token is read.
    """
    positions = _positions(model.tokenize([*harmful, *harmless]))
    x, y = (
        capture(model, prompts, site="resid_pre", layers=layers, positions=positions) for prompts in (harmful, harmless)
    )
    gaps = x.values.double().mean(1) - y.values.double().mean(1)
    return {(layer, p): gaps[i, j].float() for i, layer in enumerate(x.layers) for j, p in enumerate(positions)}


def select_direction(
    model: ChatModel,
    candidates: dict[tuple[int, int], Float[Tensor, " d"]],
    val: tuple[Sequence[str], Sequence[str]],
    tokens: RefusalTokens,
    *,
    filters: Filters | None = None,
) -> Direction:
    """The candidate that bypasses refusal best among those that pass the filters.

    Where none passes, the best of all is returned with a warning and ``passed=False``: a finding about the model.

    Args:
        model: as it is to be audited.
        candidates: of ``mean_gaps``, by layer and position; those above ``filters.depth`` are left out.
        val: harmful and harmless prompts that fitted none of them.
        tokens: with which the model's refusals begin.
        filters: by default those of the source.

    Raises:
        ReplibError: no candidate, as all lie too deep or none has a length.
    """
    filters = filters or Filters()
    top = int(filters.depth * model.n_layers)
    # Embeddings of template tokens are equal in both classes: their difference is rounding.
    least = 1e-6 * max((float(r.norm()) for r in candidates.values()), default=0.0)
    shallow = {key: r for key, r in candidates.items() if key[0] < top and r.norm() > least}
    if not shallow:
        raise ReplibError(f"No candidate direction lies below block {top}, or all have length zero: give others.")
    trial = _Trial(model, tokens, *val, first_logits(model, val[1]))
    rows = [trial.scores(r, key) for key, r in progress(list(shallow.items()), "directions")]
    table = pd.DataFrame(rows)
    return _best(table.assign(passed=filters.passed(table)), shallow, model.name)


@dataclass(frozen=True)
class _Trial:
    """The model and the prompts on which each candidate is scored."""

    model: ChatModel
    tokens: RefusalTokens
    harmful: Sequence[str]
    harmless: Sequence[str]
    base: Float[Tensor, "prompts vocab"]
    """First-token logits of the unedited model on the harmless prompts."""

    def scores(self, r: Float[Tensor, " d"], key: tuple[int, int]) -> dict[str, float | int]:
        """Bypass, induce and KL of one direction."""
        with applied(self.model, everywhere(AffineEdit.ablation(r), self.model.n_layers), positions="all"):
            bypass = self.tokens.scores(first_logits(self.model, self.harmful)).mean().item()
            kl = token_kl(self.base, first_logits(self.model, self.harmless)).mean().item()
        with applied(self.model, {("resid_pre", key[0]): AffineEdit.shift(r)}, positions="all"):
            induce = self.tokens.scores(first_logits(self.model, self.harmless)).mean().item()
        return {"layer": key[0], "position": key[1], "bypass": bypass, "induce": induce, "kl": kl}


def _best(table: pd.DataFrame, shallow: dict[tuple[int, int], Tensor], name: str) -> Direction:
    among = table[table.passed]
    if among.empty:
        warnings.warn(
            f"None of {len(table)} directions of {name} passes the filters (least KL {table.kl.min():.2g}, most "
            f"induced {table.induce.max():.2g}): the best of all is returned. That one direction does not carry its "
            "refusal is a finding; that nothing else does is not shown.",
            stacklevel=3,
        )
        among = table[table.bypass.notna()]
    if among.empty:
        raise ReplibError(f"Every direction drives {name} to NaN: load it in bfloat16 or float32.")
    best = among.loc[among.bypass.idxmin()]
    layer, position = int(best.layer), int(best.position)
    return Direction(shallow[layer, position], layer, position, bool(best.passed), table)
