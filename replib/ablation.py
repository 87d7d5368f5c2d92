"""Fit edits that ablate refusal, and sweep them over layers: Gaussian transport beside the one-direction baselines.

Sources: PCA-OT (arXiv 2603.04355), RFA and ActAdd (arXiv 2406.11717), Linear-AcT (arXiv 2410.23054). The full text of
the first was not available to us: K, the edited positions and the rule that selects layers are switches here, not its
choices.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from replib.activations import Activations, capture, check_layers, versions
from replib.audit import rates
from replib.bend import kl_divergence
from replib.edits import AffineEdit, applied
from replib.errors import ReplibError
from replib.judges import Judge
from replib.models import ChatModel
from replib.progress import progress
from replib.prompts import Prompt, content_hash
from replib.store import Rows
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
        u, v, c = GaussianMap.fit(harmful, harmless, k=k).factors()
        return {("resid_post", layer): AffineEdit(u, v, c)}
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
class Sweeper:
    """Scores edits of one model on one set of data, row by row, in a table that goes on where it stopped."""

    def __init__(
        self,
        model: ChatModel,
        data: AblationData,
        judge: Judge,
        *,
        name: str | None = None,
        store: Path | str | None = None,
        max_new_tokens: int = 24,
        batch_size: int = 64,
    ):
        self.model, self.data, self.judge = model, data, judge
        self.length, self.batch_size = max_new_tokens, batch_size
        self.rows = Rows(store)
        self.about = {"model": name or model.name, "judge": judge.name} | data.hashes()
        self.identity = model.provenance() | versions() | {"max_new_tokens": max_new_tokens}
        self.neutral = model.encode(data.neutral)
        with torch.no_grad():
            self.reference = model.forward(self.neutral)[:, -1]

    @cached_property
    def fitted(self) -> tuple[Activations, Activations]:
        """Harmful and harmless activations at every block, read once."""
        harmful, harmless = (
            capture(self.model, x, batch_size=self.batch_size) for x in (self.data.harmful, self.data.harmless)
        )
        return harmful, harmless

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
        ks = self._possible() if ks is None else ks
        chosen = check_layers(self.model, range(self.model.n_layers) if layers is None else layers)
        cells = [(layer, k) for layer in chosen for k in (ks if method == "pca_ot" else (0,))]
        rows = []
        for layer, k in progress(cells, f"{self.about['model']}: {method}, {positions}"):
            fit = partial(self._fit, method, layer, k)
            rows.append(self.score(fit, method=method, layers=[layer], k=k, positions=positions))
        return pd.DataFrame(rows)

    def _possible(self) -> list[int]:
        least = min(len(self.data.harmful), len(self.data.harmless), self.model.d_model)
        if left_out := [k for k in KS if k >= least]:
            log.warning("%s: K of %s left out, as there are only %d prompts a class or coordinates to fit them.",
                        self.about["model"], ", ".join(map(str, left_out)), least)  # fmt: skip
        return [k for k in KS if k < least]

    def depths(
        self, best: int, *, others: Sequence[int] | None = None, k: int = 2, positions: str = "last_prompt"
    ) -> pd.DataFrame:
        """PCA-OT at one block, at that block with each of ``others``, and at all blocks, re-fitted in sequence.

        ``others`` defaults to every other block.
        """
        best, k = int(best), int(k)  # as they come out of a table
        others = [int(i) for i in (range(self.model.n_layers) if others is None else others) if i != best]
        sets = [[best], *(sorted([best, i]) for i in others), list(range(self.model.n_layers))]
        rows = []
        for layers in progress(sets, f"{self.about['model']}: one, two, all blocks"):
            fit = partial(fit_edits, self.model, "pca_ot", self.data, layers, k=k, positions=positions)
            rows.append(self.score(fit, method="pca_ot", layers=layers, k=k, positions=positions))
        return pd.DataFrame(rows)

    def score(self, fit: Callable[[], SiteEdits], *, method: str, layers: list[int], k: int, positions: str) -> dict:
        """Outcomes on the scored prompts and KL on the neutral ones, under the edits that ``fit`` gives."""
        facts = self.about | {
            "method": method,
            "layers": layers,
            "layer": layers[0],
            "k": k,
            "positions": positions,
        }

        def make() -> dict:
            with applied(self.model, fit(), positions=positions), torch.no_grad():
                answers = self.model.generate(
                    [p.text for p in self.data.scored], max_new_tokens=self.length, batch_size=self.batch_size
                )
                edited = self.model.forward(self.neutral)[:, -1]
            kl = kl_divergence(self.reference, edited, 1.0).item()
            return facts | rates(self.judge(self.data.scored, answers)) | {"kl": kl, "n_kl": len(self.data.neutral)}

        return self.rows.get(facts | self.identity, make)

    def _fit(self, method: str, layer: int, k: int) -> SiteEdits:
        harmful, harmless = self.fitted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a small K that misses the mean gap is a row of the sweep
            return fit_edit(method, harmful[layer], harmless[layer], layer, k=max(k, 1), depth=self.model.n_layers)


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
