"""Fit edits that ablate refusal, and sweep them over layers: Gaussian transport beside the one-direction baselines.

Sources: PCA-OT (arXiv 2603.04355), RFA and ActAdd (arXiv 2406.11717), Linear-AcT (arXiv 2410.23054). The full text of
the first was not available to us: K, the edited positions and the rule that selects layers are switches here, not its
choices.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from replib.activations import Activations, capture, versions
from replib.affine import AffineEdit
from replib.audit import rates
from replib.bend import kl_divergence
from replib.chat import ChatModel
from replib.edits import applied
from replib.errors import ReplibError
from replib.judges import Judge
from replib.prefix import Prefix
from replib.progress import progress
from replib.prompts import Prompt, content_hash
from replib.reader import check_layers
from replib.store import Rows, key_of
from replib.transport import GaussianMap

log = logging.getLogger(__name__)
KS = (1, 2, 4, 8, 16)
METHODS = ("pca_ot", "rfa", "actadd", "act")
SiteEdits = dict[tuple[str, int], AffineEdit]


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

    def hashes(self) -> dict[str, str]:
        """What identifies the four lists in a table."""
        fit = content_hash([*self.harmful, "|", *self.harmless])
        return {"fit": fit, "scored": content_hash([*self.scored]), "neutral": content_hash([*self.neutral])}


# --------------------------------------------------------------------------------------------- one edit
def fit_edit(
    method: str,
    harmful: Float[Tensor, "n d"],
    harmless: Float[Tensor, "m d"],
    layer: int,
    *,
    k: int = 2,
    depth: int = 0,
) -> SiteEdits:
    """The edit of one method, fitted on activations of one block's output.

    ``pca_ot``: Gaussian transport in K principal components, complement kept. ``actadd``: shift by the difference in
    means (minus the refusal direction, not normalised). ``act``: a line per coordinate through the sorted samples,
    without the support gate of the original. ``rfa``: the difference-in-means direction is removed from
    what enters every block and from what its attention and feed-forward write (``depth`` blocks).

    Raises:
        ReplibError: unknown method, too few prompts for K, widths that differ, non-finite values.
    """
    if method == "pca_ot":
        return {("resid_post", layer): GaussianMap(k).fit(harmful, harmless).edit()}
    gap = (harmless.double().mean(0) - harmful.double().mean(0)).float()
    if method == "actadd":
        return {("resid_post", layer): AffineEdit.shift(gap)}
    if method == "act":
        return {("resid_post", layer): linear_act(harmful, harmless)}
    if method == "rfa":
        edit = AffineEdit.ablation(gap)
        return {(site, i): edit for i in range(depth) for site in ("resid_pre", "attn_out", "mlp_out")}
    raise ReplibError(f"Unknown method {method!r}: use one of {', '.join(METHODS)}.")


def linear_act(source: Float[Tensor, "n d"], target: Float[Tensor, "m d"]) -> AffineEdit:
    """Linear-AcT (arXiv 2410.23054): gain and bias by least squares between sorted samples, one coordinate at a time.

    Unequal sample sizes are met on the quantiles of the smaller one; a constant coordinate is only shifted.
    """
    n = min(len(source), len(target))
    q = torch.linspace(0, 1, n, dtype=torch.float64)
    a, b = (torch.quantile(x.double(), q, dim=0) for x in (source, target))
    da, db = a - a.mean(0), b - b.mean(0)
    variance = da.square().sum(0)
    gain = torch.where(variance > 1e-12, (da * db).sum(0) / variance.clamp(min=1e-12), torch.ones_like(variance))
    return AffineEdit.diagonal((gain - 1).float(), (b.mean(0) - gain * a.mean(0)).float())


def fit_edits(
    model: ChatModel,
    method: str,
    data: AblationData,
    layers: Sequence[int],
    *,
    k: int = 2,
    positions: str = "last_prompt",
) -> SiteEdits:
    """Edits at several blocks, each fitted with the earlier ones active: it meets what it will be applied to."""
    edits: SiteEdits = {}
    for layer in sorted(check_layers(model, layers)):
        with applied(model, edits, positions=positions) if edits else nullcontext():
            harmful = capture(model, data.harmful, layers=[layer])[layer]
            harmless = capture(model, data.harmless, layers=[layer])[layer]
        edits |= fit_edit(method, harmful, harmless, layer, k=k, depth=model.n_layers)
    return edits


# --------------------------------------------------------------------------------------------- sweeps
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
        self.about = {"model": name or model.name, "judge": judge.name} | data.hashes()
        self.identity = model.provenance() | versions() | {"max_new_tokens": max_new_tokens}

    @cached_property
    def fitted(self) -> tuple[Activations, Activations]:
        """Harmful and harmless activations at every block, read once."""
        harmful, harmless = (
            capture(self.model, x, batch_size=self.batch_size) for x in (self.data.harmful, self.data.harmless)
        )
        return harmful, harmless

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
        positions: str = "last_prompt",
    ) -> pd.DataFrame:
        """One edit at one block at a time, for every block and every K; see ``sweep_layers``.

        Without ``ks``, those of 1, 2, 4, 8 and 16 that the fit prompts are enough for.
        """
        if method != "pca_ot":
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
            self._facts(cell) | count | {"kl": kl, "n_kl": len(self.data.neutral)}
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
            harmful, harmless = (x[layer] for x in self.fitted)
            return fit_edit(cell.method, harmful, harmless, layer, k=k, depth=self.model.n_layers)

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
        One row a cell: model, method, layers, k, positions, n, attack success (``compliance``) with its Wilson 95 %
        interval, refusal and degenerate shares, and ``kl`` (nats, first answer token, harmless prompts).
    """
    return Sweeper(model, data, judge).layers(method, **options)
