"""Refusal directions: one for each layer and token, the choice among them, and the plane that angular steering turns.

The choice is that of arXiv 2406.11717 and its code: removed everywhere, a direction should undo refusal (bypass);
added where it was found, it should make harmless prompts refused (induce); and harmless answers should stay (KL).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from replib.ablation.damage import token_kl
from replib.ablation.refusal_score import RefusalTokens, first_logits
from replib.activations.capture import capture
from replib.core.errors import ReplibError
from replib.core.progress import progress
from replib.edits.apply import applied, bound
from replib.edits.methods import SiteEdits, everywhere
from replib.models.chat_model import ChatModel
from replib.models.tokens import SPANS
from replib.transport.affine import AffineEdit, Rotation


@dataclass(frozen=True)
class Filters:
    """What a direction must satisfy; defaults of arXiv 2406.11717."""

    kl: float | None = 0.1
    """Most nats on harmless prompts, under ablation."""
    induce: float | None = 0.0
    """Least refusal score of harmless prompts, under addition."""
    depth: float = 0.8
    """Share of the layers, from below, that are candidates."""

    def passed(self, table: pd.DataFrame) -> pd.Series:
        """Which candidates do; one without a number does not."""
        good = table[["bypass", "induce", "kl"]].notna().all(axis=1)
        good &= True if self.kl is None else table.kl <= self.kl
        return good & (True if self.induce is None else table.induce >= self.induce)


@dataclass(frozen=True)
class Direction:
    """The chosen direction, and the scores of all that there were."""

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

    def ablation(self, model: ChatModel) -> SiteEdits:
        """Remove it everywhere, at every block: to be applied at all positions."""
        return bound(model, everywhere(AffineEdit.ablation(self.r), model.n_layers))

    def addition(self, model: ChatModel, coefficient: float = -1.0) -> SiteEdits:
        """Add a multiple of it where it was read: -1 bypasses refusal, +1 induces it."""
        return bound(model, {("resid_pre", self.layer): AffineEdit.shift(coefficient * self.r)})


def mean_gaps(
    model: ChatModel, harmful: Sequence[str], harmless: Sequence[str], layers: Sequence[int]
) -> dict[tuple[int, int], Float[Tensor, " d"]]:
    """Difference in means at the input of blocks, for each template token after the instruction, by layer, position.

    Means are float64. Where no such token is, as without a template, the last prompt token is read.
    """
    rows = model.tokenize([*harmful, *harmless])
    positions = list(range(-max(1, min(len(SPANS["post_instruction"].of_row(row)) for row in rows)), 0))
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
    # Tokens of one template are embedded alike: no direction, but for rounding.
    least = 1e-6 * max((float(r.norm()) for r in candidates.values()), default=0.0)
    kept = {key: r for key, r in candidates.items() if key[0] < top and r.norm() > least}
    if not kept:
        raise ReplibError(f"No candidate direction lies below block {top}, or all have length zero: give others.")
    trial = _Trial(model, tokens, *val, first_logits(model, val[1]))
    rows = [trial.scores(r, key) for key, r in progress(list(kept.items()), "directions")]
    table = pd.DataFrame(rows)
    return _best(table.assign(passed=filters.passed(table)), kept, model.name)


@dataclass(frozen=True)
class _Trial:
    """What each candidate is put through."""

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


def _best(table: pd.DataFrame, kept: dict[tuple[int, int], Tensor], name: str) -> Direction:
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
    return Direction(kept[layer, position], layer, position, bool(best.passed), table)


def angular_edits(
    model: ChatModel, harmful: Sequence[str], harmless: Sequence[str], *, angle: float = 180.0, adaptive: bool = True
) -> SiteEdits:
    """Angular steering (arXiv 2510.26243): what enters each sublayer is turned in one plane, at all positions.

    Candidates are differences of the mean directions of the classes at each norm's input, last prompt token. The plane
    is spanned by the candidate most like the others, and by the first principal axis of all of them. 0 degrees points
    to harmful, 180 away from it.

    Raises:
        ReplibError: an architecture without ``resid_mid``, or candidates that span no plane.
    """
    found = [
        gap
        for pair in zip(*(_gaps(model, harmful, harmless, site) for site in ("resid_pre", "resid_mid")), strict=True)
        for gap in pair
    ]
    turn = Rotation(steering_plane(torch.stack(found)), angle, adaptive)
    return bound(model, {(site, i): turn for i in range(model.n_layers) for site in ("attn_in", "mlp_in")})


def _gaps(model: ChatModel, harmful: Sequence[str], harmless: Sequence[str], site: str) -> Float[Tensor, "layers d"]:
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731
    x, y = (capture(model, prompts, site=site).values.double() for prompts in (harmful, harmless))
    return unit(unit(x).mean(1)) - unit(unit(y).mean(1))


def steering_plane(candidates: Float[Tensor, "n d"]) -> Float[Tensor, "d 2"]:
    """Orthonormal ``b1, b2``: the candidate of greatest mean cosine with all, and their first principal axis."""
    unit = torch.nn.functional.normalize(candidates, dim=-1)
    first = unit[(unit @ unit.mT).mean(1).argmax()]
    _, spread, axes = torch.linalg.svd(candidates - candidates.mean(0), full_matrices=False)
    second = axes[0] - (axes[0] @ first) * first
    if not (spread[0] > 1e-6 * candidates.norm() and second.norm() > 1e-6):
        raise ReplibError("The directions of all layers are one: they span no plane to turn in. Ablate that one.")
    return torch.stack([first, second / second.norm()], 1).float()
