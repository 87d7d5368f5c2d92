"""Sweeps of edits over layers: Gaussian transport beside the one-direction baselines, each scored the same way.

The methods themselves are in ``methods``, what is asked of a direction before it is trusted in ``directions``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from replib.activations import Activations, capture, versions
from replib.audit import rates
from replib.bend import kl_divergence
from replib.chat import ChatModel
from replib.edits import applied
from replib.fitting import AblationData, fit_edits
from replib.judges import Judge
from replib.methods import SiteEdits, fit_edit, method_of
from replib.positions import Position
from replib.prefix import Prefix
from replib.progress import progress
from replib.reader import check_layers
from replib.store import Rows, key_of

log = logging.getLogger(__name__)
__all__ = ["AblationData", "Cell", "Sweeper", "best_of", "fit_edit", "fit_edits", "onset", "sweep_layers"]
KS = (1, 2, 4, 8, 16)


class Cell(NamedTuple):
    """One edit of a sweep: how it is fitted and where it acts."""

    method: str
    layers: tuple[int, ...]
    k: int
    """Principal components; 0 where the method has none."""
    positions: str


class Sweeper:
    """Scores edits of one model on one set of data, in a table that goes on where it stopped.

    Several edits share a pass of at most ``batch_size`` rows, each on its own copy of the prompts.
    """

    def __init__(
        self,
        model: ChatModel,
        data: AblationData,
        judge: Judge,
        *,
        name: str | None = None,
        store: Path | str | None = None,
        max_new_tokens: int = 24,
        batch_size: int = 128,
    ):
        self.model, self.data, self.judge = model, data, judge
        self.length, self.batch_size = max_new_tokens, batch_size
        self.rows = Rows(store)
        self._fitted: dict[tuple[Position, str], tuple[Activations, Activations]] = {}
        self.about = {"model": name or model.name, "judge": judge.name} | data.hashes()
        self.identity = model.provenance() | versions() | {"max_new_tokens": max_new_tokens}

    def fitted(self, read: Position = "last_prompt", site: str = "resid_post") -> tuple[Activations, Activations]:
        """Harmful and harmless activations at every block, read once a position and site."""
        if (read, site) not in self._fitted:
            harmful, harmless = (
                capture(self.model, x, site=site, positions=read, batch_size=self.batch_size)
                for x in (self.data.harmful, self.data.harmless)
            )
            self._fitted[read, site] = harmful, harmless
        return self._fitted[read, site]

    @cached_property
    def reference(self) -> Float[Tensor, "prompts vocab"]:
        """First-token logits of the unedited model on the neutral prompts."""
        return self._first_logits(1)[0]

    def layers(
        self,
        method: str = "pca_ot",
        *,
        ks: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
        positions: str | None = None,
    ) -> pd.DataFrame:
        """One edit at one block at a time, for every block and every K; see ``sweep_layers``.

        Without ``ks``, those of 1, 2, 4, 8 and 16 that the fit prompts are enough for; without ``positions``, the
        choice of the method's source.
        """
        positions = positions or method_of(method).positions
        if not method_of(method).ranked:
            ks = [0]
        elif ks is None:
            ks = self._possible()
        chosen = check_layers(self.model, range(self.model.n_layers) if layers is None else layers)
        return self.table([Cell(method, (layer,), k, positions) for layer in chosen for k in ks])

    def depths(
        self, best: int, *, others: Sequence[int] | None = None, k: int = 2, positions: str = "last_prompt"
    ) -> pd.DataFrame:
        """PCA-OT at one block, at that block with each of ``others``, and at all blocks, re-fitted in sequence.

        ``others`` defaults to every other block.
        """
        best, k = int(best), int(k)  # as they come out of a table
        others = [int(i) for i in (range(self.model.n_layers) if others is None else others) if i != best]
        sets = [(best,), *(tuple(sorted((best, i))) for i in others), tuple(range(self.model.n_layers))]
        return self.table([Cell("pca_ot", layers, k, positions) for layers in sets])

    def table(self, cells: Sequence[Cell]) -> pd.DataFrame:
        """One row a cell; those that the store holds are not scored again."""
        missing = [cell for cell in cells if self._key(cell) not in self.rows]
        for some in progress(self._passes(missing), self.about["model"]):
            for cell, row in zip(some, self.score(some), strict=True):
                self.rows.put(self._key(cell), row)
        return pd.DataFrame([self.rows[self._key(cell)] for cell in cells])

    def score(self, cells: Sequence[Cell]) -> list[dict]:
        """Outcomes on the scored prompts and KL on the neutral ones under each edit, in as few passes as fit."""
        edits, n, positions = [self._fit(cell) for cell in cells], len(self.data.scored), cells[0].positions
        prefixes = self._prefixes if positions == "last_prompt" else None  # read before anything is edited
        with applied(self.model, edits, positions=positions):
            answers = self._answers(len(cells), prefixes and prefixes[0])
            logits = self._first_logits(len(cells), prefixes and prefixes[1])
        counts = [rates(self.judge(self.data.scored, answers[i * n : (i + 1) * n])) for i in range(len(cells))]
        kls = [kl_divergence(self.reference, edited, 1.0).item() for edited in logits]
        return [
            self._facts(cell) | count | {"kl": kl, "n_kl": len(self.data.neutral)} | self.data.counts()
            for cell, count, kl in zip(cells, counts, kls, strict=True)
        ]

    def _passes(self, cells: Sequence[Cell]) -> list[Sequence[Cell]]:
        """Cells that share a pass: neighbours with the same positions, as many as the batch has room for."""
        room = max(1, self.batch_size // max(len(self.data.scored), len(self.data.neutral)))
        alike = [list(group) for _, group in groupby(cells, key=lambda cell: cell.positions)]
        return [group[i : i + room] for group in alike for i in range(0, len(group), room)]

    def _answers(self, groups: int, prefix: Prefix | None = None) -> list[str]:
        """Answers to the scored prompts, group after group."""
        texts = [p.text for p in self.data.scored]
        if prefix:
            return prefix.answers(groups, max_new_tokens=self.length)
        if groups == 1:
            return self.model.generate(texts, max_new_tokens=self.length, batch_size=self.batch_size)
        return self.model.complete(self.model.encode(texts * groups), self.length)

    @torch.no_grad()
    def _first_logits(self, groups: int, prefix: Prefix | None = None) -> Float[Tensor, "groups prompts vocab"]:
        if prefix:
            logits = prefix.first_logits(groups)
        else:
            logits = self.model.forward(self.model.encode([*self.data.neutral] * groups))[:, -1]
        return logits.unflatten(0, (groups, -1))

    @cached_property
    def _prefixes(self) -> tuple[Prefix, Prefix] | None:
        """Scored and neutral prompts, read once; None where they do not fit a batch or cannot be read in parts."""
        scored, neutral = [p.text for p in self.data.scored], [*self.data.neutral]
        if max(len(scored), len(neutral)) > self.batch_size:
            return None
        found = Prefix.read(self.model, scored), Prefix.read(self.model, neutral)
        return found if all(prefix.whole for prefix in found) else None

    def _fit(self, cell: Cell) -> SiteEdits:
        k, layer = max(cell.k, 1), cell.layers[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a small K that misses the mean gap is a row of the sweep
            if len(cell.layers) > 1:
                return fit_edits(self.model, cell.method, self.data, cell.layers, k=k, positions=cell.positions)
            method = method_of(cell.method)
            harmful, harmless = (x[layer] for x in self.fitted(method.read, method.site))
            return fit_edit(method, harmful, harmless, layer, k=k, depth=self.model.n_layers)

    def _facts(self, cell: Cell) -> dict:
        return self.about | cell._asdict() | {"layers": list(cell.layers), "layer": cell.layers[0]}

    def _key(self, cell: Cell) -> str:
        return key_of(self._facts(cell) | self.identity)

    def _possible(self) -> list[int]:
        least = min(len(self.data.harmful), len(self.data.harmless), self.model.d_model)
        if left_out := [k for k in KS if k >= least]:
            log.warning("%s: K of %s left out, as there are only %d prompts a class or coordinates to fit them.",
                        self.about["model"], ", ".join(map(str, left_out)), least)  # fmt: skip
        return [k for k in KS if k < least]


def best_of(table: pd.DataFrame, *by: str) -> pd.DataFrame:
    """The row of each group with the highest attack success, of equals the one with the least KL."""
    ranked = table.sort_values(["compliance", "kl"], ascending=[False, True], kind="stable")
    return ranked.groupby(list(by), sort=False).head(1)


def onset(table: pd.DataFrame, share: float = 0.5) -> int | None:
    """The first block at which attack success reaches ``share`` of its maximum over blocks: where refusal is decided.

    An edit of the last prompt token before the blocks that decide is overruled by them; after them it is final. None
    if no block succeeds more often than not.
    """
    by_layer = table.groupby("layer")["compliance"].max()
    if by_layer.max() < 0.5:
        return None
    return int(by_layer.index[(by_layer >= share * by_layer.max()).to_numpy().argmax()])


def sweep_layers(
    model: ChatModel, data: AblationData, judge: Judge, method: str = "pca_ot", **options: Any
) -> pd.DataFrame:
    """One edit at one block at a time, re-fitted on this very model, for every block and every K.

    Options are those of ``Sweeper.layers``: ``ks``, ``layers``, ``positions``.

    Returns:
        One row a cell: model, method, layers, k, positions, prompts a class that fitted it, n, attack success
        (``compliance``) with its Wilson 95 % interval, refusal and degenerate shares, and ``kl`` (nats, first answer
        token, harmless prompts).
    """
    return Sweeper(model, data, judge).layers(method, **options)
