"""Prompts that fit edits and prompts that score them; edits of several blocks, fitted one after the other."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import pandas as pd

from replib.ablation.refusal_score import RefusalTokens, filtered_prompts
from replib.activations.capture import capture
from replib.activations.store import Activations
from replib.core.errors import ReplibError
from replib.core.storage import content_hash
from replib.data.prompts import Prompt
from replib.edits.apply import POSITIONS, applied, bound
from replib.edits.methods import Method, SiteEdits, fit_edit, method_of
from replib.models.chat_model import ChatModel, check_layers
from replib.models.tokens import Position, check_positions
from replib.transport.affine import check_strength

log = logging.getLogger(__name__)


Pair = tuple[Activations, Activations]  # harmful, harmless


@dataclass(frozen=True)
class AblationData:
    """Prompts that fit an edit, and others that score it."""

    harmful: Sequence[str]
    """Source of the transport: fit split."""
    harmless: Sequence[str]
    """Its target: fit split."""
    scored: Sequence[Prompt]
    """Harmful prompts on which attack success is counted: val to choose, test to report."""
    neutral: Sequence[str]
    """Harmless prompts on which the first-token KL to the unedited model is measured."""

    def __post_init__(self) -> None:
        for name in ("harmful", "harmless", "scored", "neutral"):
            if not getattr(self, name):
                raise ReplibError(f"No {name} prompts: an ablation needs both classes to fit and prompts to score.")
        if shared := {p.text for p in self.scored} & set(self.harmful):
            raise ReplibError(
                f"{len(shared)} scored prompts were used to fit, for example {min(shared)!r}: split them."
            )

    def kept(self, model: ChatModel, tokens: RefusalTokens) -> AblationData:
        """The same, fitted only on harmful prompts that the model refuses and harmless ones that it answers.

        Raises ReplibError where too few are left.
        """
        left = filtered_prompts(model, self.harmful, self.harmless, tokens)
        return replace(self, harmful=left.harmful, harmless=left.harmless)

    def resampled(self, seed: int) -> AblationData:
        """The same, fitted on as many prompts of each class drawn with replacement: what other prompts would give."""
        draw = random.Random(seed)
        harmful, harmless = (draw.choices(x, k=len(x)) for x in (self.harmful, self.harmless))
        return replace(self, harmful=harmful, harmless=harmless)

    def counts(self) -> dict[str, int]:
        """How many prompts a class fit the edit: fewer than were given, where some were filtered."""
        return {"n_harmful": len(self.harmful), "n_harmless": len(self.harmless)}

    def hashes(self) -> dict[str, str]:
        """What identifies the four lists in a table."""
        fit = content_hash([*self.harmful, "|", *self.harmless])
        return {"fit": fit, "scored": content_hash([*self.scored]), "neutral": content_hash([*self.neutral])}


@dataclass(frozen=True)
class Recipe:
    """An edit of one or several blocks, still to be fitted."""

    method: Method
    layers: tuple[int, ...]
    """Ascending."""
    k: int
    positions: str
    """Where it will act: later blocks are fitted with it acting there."""
    strength: float = 1.0


class Fitter:
    """Fits edits of one model; activations are read once for all blocks that may be asked for.

    Args:
        model: the model to edit.
        data: prompts of both classes.
        layers: blocks that may be asked for.
        batch_size: prompts in one forward pass at most.
        answer: tokens of the model's own answer, under the edits already in place, over which ``response`` is a mean.
            An integer position from 0 on is read of such answers too. Prompts whose answer ends before it do not fit:
            that is logged, and ``counts`` holds those that do.
    """

    def __init__(
        self, model: ChatModel, data: AblationData, layers: Sequence[int], *, batch_size: int = 64, answer: int = 24
    ):
        self.model, self.data, self.layers = model, data, check_layers(model, layers)
        self.batch_size, self.answer = batch_size, answer
        self._read: dict[tuple[Position, str], Pair] = {}
        self._under: tuple[Recipe | None, Pair | None] = (None, None)  # of edited models only the latest
        self.counts: dict[Recipe, dict[str, int]] = {}  # prompts a class behind the last block of each fit

    def on(self, data: AblationData) -> Fitter:
        """The same for other prompts."""
        return Fitter(self.model, data, self.layers, batch_size=self.batch_size, answer=self.answer)

    def edits(self, recipe: Recipe) -> SiteEdits:
        """The edits at strength, each block's fitted with the earlier ones active; not bound to the model.

        A method that is not ``sequential`` is fitted at all blocks on the unedited model.

        Raises ReplibError as ``fit_edit`` and ``capture``, and where the answers to fewer than two prompts of a class
        reach the position that is read.
        """
        *before, layer = recipe.layers
        earlier = replace(recipe, layers=tuple(before))
        edits = self.edits(earlier) if before else {}
        active = edits and recipe.method.sequential
        pair = self._edited(earlier, edits) if active else self.activations(recipe.method)
        source, target = (x[layer] for x in pair)
        self.counts[recipe] = {"n_harmful": len(source), "n_harmless": len(target)}
        found = fit_edit(recipe.method, source, target, layer, k=recipe.k, depth=self.model.n_layers)
        return edits | {key: edit * recipe.strength for key, edit in found.items()}

    def activations(self, method: Method) -> Pair:
        """Harmful and harmless activations of the unedited model, where a method reads."""
        if (method.read, method.site) not in self._read:
            self._read[method.read, method.site] = self._captured(method, self.layers)
        return self._read[method.read, method.site]

    def _edited(self, active: Recipe, edits: SiteEdits) -> Pair:
        known, pair = self._under
        if pair is None or known != active:
            with applied(self.model, edits, positions=active.positions):
                pair = self._captured(active.method, [i for i in self.layers if i > active.layers[-1]])
            self._under = active, pair
        return pair

    def _captured(self, method: Method, layers: Sequence[int]) -> Pair:
        span = method.read == "response"
        written = self.answer if span else max(0, method.read + 1) if isinstance(method.read, int) else 0
        options: dict[str, Any] = {"site": method.site, "layers": layers, "positions": method.read}
        options |= {"max_new_tokens": written, "batch_size": self.batch_size}
        options |= {"short": "leave_out" if written else "refuse"}
        harmful, harmless = (capture(self.model, x, **options) for x in (self.data.harmful, self.data.harmless))
        _check_reached("harmful", len(harmful), len(self.data.harmful), method.read)
        _check_reached("harmless", len(harmless), len(self.data.harmless), method.read)
        return harmful, harmless


def _check_reached(name: str, left: int, asked: int, position: Position) -> None:
    if left == asked:
        return
    said = f"The answers to {asked - left} of {asked} {name} prompts end before position {position!r}"
    if left < 2:
        raise ReplibError(f"{said}, so {left} are left to fit an edit, and two are needed: read an earlier position.")
    log.warning("%s: these prompts fit no edit.", said)


def fit_edits(
    model: ChatModel,
    method: str | Method,
    data: AblationData,
    layers: Sequence[int],
    *,
    k: int = 2,
    positions: str | None = None,
    strength: float = 1.0,
) -> SiteEdits:
    """Edits at several blocks, each fitted with the earlier ones active: it meets what it will be applied to.

    ``positions``: where they will act, by default as in the method's source. A method that is not ``sequential`` is
    fitted at all blocks at once, on the unedited model. ``strength`` scales each, also while later ones are fitted.

    Raises ReplibError as ``Fitter.edits``, and for a strength outside [0, 1].
    """
    check_strength(strength, "to go beyond, multiply the edits")
    method = method_of(method)
    blocks = sorted(set(check_layers(model, layers)))
    recipe = Recipe(method, tuple(blocks), k, positions or method.positions, strength)
    return bound(model, Fitter(model, data, blocks).edits(recipe))


KS = (1, 2, 4, 8, 16)


class Cell(NamedTuple):
    """One edit of a sweep."""

    method: str
    layers: tuple[int, ...]
    k: int
    """Principal components; 0 where the method has none."""
    positions: str
    """Tokens that are edited."""
    strength: float = 1.0
    read: Position | None = None
    """Position whose activations fit it; None is the choice of the method's source."""

    @property
    def how(self) -> Method:
        """The method, with the position it is fitted at."""
        method = method_of(self.method)
        return method if self.read is None else replace(method, read=self.read)

    @property
    def recipe(self) -> Recipe:
        """What a ``Fitter`` needs."""
        return Recipe(self.how, self.layers, max(self.k, 1), self.positions, self.strength)


def cells_of(table: pd.DataFrame) -> list[Cell]:
    """The cells of a table's rows."""
    columns = [table[name] for name in Cell._fields]
    return [Cell(m, tuple(map(int, ls)), int(k), p, float(s), r) for m, ls, k, p, s, r in zip(*columns, strict=True)]


def grid(
    methods: str | Sequence[str],
    layers: Sequence[int],
    *,
    ks: Sequence[int] = (2,),
    positions: Sequence[str | None] = (None,),
    strengths: Sequence[float] = (1.0,),
    reads: Sequence[Position | None] = (None,),
) -> list[Cell]:
    """Every combination once, an edit of one block each; K where a method has one, None the choice of its source."""
    names = [methods] if isinstance(methods, str) else methods
    cells = [
        Cell(name, (layer,), k, where or how.positions, strength, read)
        for name, how in zip(names, map(method_of, names), strict=True)
        for where, read, strength, layer, k in product(positions, reads, strengths, layers, ks if how.ranked else [0])
    ]
    return list(dict.fromkeys(cells))


def checked(cells: Sequence[Cell], model: ChatModel, data: AblationData, *, extrapolate: bool = False) -> list[Cell]:
    """The same cells with layers from 0 upwards, before anything is paid for them.

    ``extrapolate`` allows strengths outside [0, 1], where an edit moves activations back or beyond its target.

    Raises:
        ReplibError: unknown method, positions or layer; K above the rank that the prompts give, or of a method that
            has none; a strength outside [0, 1]; several blocks for a method that acts at all of them.
    """
    most = min(len(data.harmful) - 1, len(data.harmless) - 1, model.d_model)
    for cell in cells:
        _check_method(cell, most)
        check_strength(cell.strength, "extrapolate=True goes beyond, finitely far", extrapolate=extrapolate)
    return [cell._replace(layers=tuple(sorted(set(check_layers(model, cell.layers))))) for cell in cells]


def check_names(
    methods: Sequence[str], positions: Sequence[str | None] = (), reads: Sequence[Position | None] = ()
) -> None:
    """Raise ReplibError for an unknown method, edited position or fit position; None is a method's own choice."""
    for method in methods:
        method_of(method)
    for place in positions:
        if place is not None and place not in POSITIONS:
            raise ReplibError(f"Unknown edit positions {place!r}: use one of {', '.join(POSITIONS)}.")
    if given := [read for read in reads if read is not None]:
        check_positions(given)


def _check_method(cell: Cell, most: int) -> None:
    method = cell.how
    check_names([cell.method], [cell.positions], [cell.read])
    if method.everywhere and len(cell.layers) > 1:
        raise ReplibError(f"{cell.method} acts at every block, wherever it was fitted: give it one block, not several.")
    if not method.ranked and cell.k:
        raise ReplibError(f"{cell.method} has no K, but {cell.k} was given: K = 0 says so.")
    if method.ranked and not 1 <= cell.k <= most:
        raise ReplibError(
            f"K = {cell.k} of {cell.method}: these prompts and this width fit 1 to {most} axes. "
            "Give more prompts of both classes, or a lower K."
        )


def possible_ks(model: ChatModel, data: AblationData) -> list[int]:
    """Those of 1, 2, 4, 8 and 16 that the prompts can fit."""
    return [k for k in KS if k < min(len(data.harmful), len(data.harmless), model.d_model)]


def window(depth: int) -> tuple[int, int] | None:
    """First and last block between 40 and 60 % of the depth, where arXiv 2603.04355 chose its blocks; None if none."""
    first, last = -(-2 * depth // 5), 3 * depth // 5
    return (first, last) if first <= last else None
