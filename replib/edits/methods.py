"""Methods that fit an edit on two classes of activations, each with its source's choices as defaults.

All map harmful to harmless. The full text of PCA-OT (2603.04355) was not available, so its K, edited positions and
rule for layers are options here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.edits.controls import CONTROLS
from replib.models.tokens import Position
from replib.transport.affine import AffineEdit, Edit, SupportedEdit
from replib.transport.gaussian_map import GaussianMap
from replib.transport.gaussians import sample_pair

_SourceSamples = Float[Tensor, "n d"]  # harmful
Target = Float[Tensor, "m d"]  # harmless
SiteEdits = dict[tuple[str, int], Edit]


@dataclass(frozen=True)
class Method:
    """Fit of an edit with the positions and site of its source; ``dataclasses.replace`` changes single fields."""

    fit: Callable[[Tensor, Tensor, int], Edit]
    """Edit from float64 harmful ``[n, d]`` and harmless ``[m, d]`` and K."""
    title: str
    """Name in figures."""
    read: Position = "last_prompt"
    """Position of the fitted activations; a span is averaged over its tokens."""
    positions: str = "all"
    """Edited tokens."""
    site: str = "resid_post"
    ranked: bool = False
    """Whether the fit depends on K."""
    sequential: bool = True
    """Whether later layers are fitted with the edits of earlier ones active."""
    everywhere: bool = False
    """Whether the edit acts on the input and the sublayer outputs of every block."""
    selected: bool = False
    """Whether the direction is selected among blocks and tokens by its effect on the model: fitted by sweeps alone."""


def transported(source: _SourceSamples, target: Target, **options: Any) -> AffineEdit:
    """Gaussian optimal transport as an edit; options are those of ``GaussianMap``."""
    return GaussianMap(**options).fit(source, target).edit()


def pca_ot(source: _SourceSamples, target: Target, k: int) -> AffineEdit:
    """Transport in K pooled principal components, complement kept (2603.04355)."""
    return transported(source, target, k=k)


def full_ot(source: _SourceSamples, target: Target, _k: int) -> AffineEdit:
    """Transport of mean and covariance in the whole span (MiMiC, 2402.09631), identity off the span.

    The ridge is the mean variance of the span; the source's 1e-5 assumes many more samples than coordinates.
    """
    span = min(source.shape[1], len(source) + len(target) - 1)
    return transported(source, target, k=None, ridge=source.shape[1] / span)


def actadd(source: _SourceSamples, target: Target, _k: int) -> AffineEdit:
    """Shift by minus the difference in means, not normalised (2406.11717). Its negative induces."""
    return AffineEdit.shift((target.mean(0) - source.mean(0)).float())


def rfa(source: _SourceSamples, target: Target, _k: int) -> AffineEdit:
    """Remove the difference in means, ``x - r r^T x`` (2406.11717, eq. 4)."""
    return AffineEdit.ablation((source.mean(0) - target.mean(0)).float())


def ace(source: _SourceSamples, target: Target, k: int) -> AffineEdit:
    """Set the component along the difference in means to the harmless mean's, ``x - r r^T (x - m)`` (2411.09003)."""
    edit = rfa(source, target, k)
    return edit + AffineEdit.shift(-edit.linear(target.mean(0).float()))


def leace(source: _SourceSamples, target: Target, _k: int, *, shrink: bool = True) -> AffineEdit:
    """Least-squares concept erasure (2306.03819, theorem 4.3) of the class; no linear probe beats chance afterwards.

    For two classes the closed form has rank one, ``x - g v^T (x - m)`` with ``g`` the difference in means and
    ``v = S^+ g / (g^T S^+ g)``, where ``S`` is the pooled covariance, between classes included. ``shrink`` is the
    authors' default: ``S`` becomes ``a S + b I`` (1308.2608), a in [0, 1].
    """
    rows, gap = torch.cat([source, target]), source.mean(0) - target.mean(0)
    mean = rows.mean(0)
    _, s, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    kept = s > s[0] * max(rows.shape) * torch.finfo(s.dtype).eps
    variance, axes = s[kept].square() / len(rows), axes[kept]
    v = axes.mT @ ((axes @ gap) / (_shrunk(variance, *rows.shape) if shrink else variance))
    if not gap @ v > 0:
        raise ReplibError("The classes have one mean, so LEACE has no direction to erase: choose another layer.")
    v = v / (gap @ v)
    return AffineEdit(*(t.float() for t in (-gap[:, None], v[:, None], gap * (v @ mean))))


def _shrunk(variance: Float[Tensor, " r"], n: int, d: int) -> Float[Tensor, " r"]:
    """The sample covariance's spectrum, on its span, pulled towards its mean over all d coordinates."""
    trace, square = variance.sum(), variance.square().sum()
    weight = (1 - trace.square() / n / (square - trace.square() / d)).clamp(0, 1)
    return weight * variance + (1 - weight) * trace / d


def mean_act(source: _SourceSamples, target: Target, k: int) -> AffineEdit:
    """Mean-AcT (2410.23054): the shift between means."""
    return actadd(source, target, k)


def gaussian_act(source: _SourceSamples, target: Target, _k: int, *, least: float = 1e-4) -> AffineEdit:
    """Gaussian-AcT (2410.23054): ``sd_t / sd_s (x - m_s) + m_t`` of each coordinate that varies in both classes."""
    spread, aim = source.std(0), target.std(0)
    moved = (spread > least) & (aim > least)
    gain = torch.where(moved, aim / spread, 1.0)
    shift = torch.where(moved, target.mean(0) - gain * source.mean(0), 0.0)
    return AffineEdit.diagonal((gain - 1).float(), shift.float())


def linear_act(
    source: _SourceSamples, target: Target, _k: int, *, support: tuple[float, float] = (0.0, 1.0)
) -> SupportedEdit:
    """Linear-AcT (2410.23054): ``act`` on coordinates between two quantiles of the source."""
    q = torch.tensor(support, dtype=source.dtype)
    low, high = torch.quantile(source, q, dim=0).float()
    # Rounding to float32 must not push the extreme samples out of their own support.
    slack = 1e-6 * (high - low)
    return SupportedEdit(act(source, target, 0), low - slack, high + slack)


def act(source: _SourceSamples, target: Target, _k: int) -> AffineEdit:
    """Linear-AcT's lines without support: least squares between sorted samples (2410.23054).

    Unequal samples are compared at the quantiles of the smaller one; a constant coordinate is only shifted.
    """
    n = min(len(source), len(target))
    q = torch.linspace(0, 1, n, dtype=torch.float64)
    a, b = (torch.quantile(x.double(), q, dim=0) for x in (source, target))
    da, db = a - a.mean(0), b - b.mean(0)
    variance = da.square().sum(0)
    gain = torch.where(variance > 1e-12, (da * db).sum(0) / variance.clamp(min=1e-12), torch.ones_like(variance))
    return AffineEdit.diagonal((gain - 1).float(), (b.mean(0) - gain * a.mean(0)).float())


METHODS = {
    "pca_ot": Method(pca_ot, "PCA-OT", positions="last_prompt", ranked=True),
    "full_ot": Method(full_ot, "full OT", positions="last_prompt"),
    "rfa": Method(rfa, "RFA", everywhere=True),
    "rfa_selected": Method(rfa, "RFA, selected", everywhere=True, selected=True),
    "actadd": Method(actadd, "ActAdd"),
    "ace": Method(ace, "ACE"),
    "leace": Method(leace, "LEACE"),
    "mean_act": Method(mean_act, "Mean-AcT", read="prompt"),
    "gaussian_act": Method(gaussian_act, "Gaussian-AcT", read="prompt"),
    "linear_act": Method(linear_act, "Linear-AcT with support", read="prompt"),
    # Linear-AcT fitted at one token and without support, so that it differs from PCA-OT in the map alone.
    "act": Method(act, "Linear-AcT"),
}
"""Methods as published, except ``act``."""
METHODS |= {
    name: Method(control(pca_ot), f"PCA-OT, {name.replace('_', ' ')}", positions="last_prompt", ranked=True)
    for name, control in CONTROLS.items()
}
READS = ("last_prompt", "response")
"""Positions of the activations that fit the edits of a defence's training and of attacks."""


def method_of(method: str | Method) -> Method:
    """Method by name; a ``Method`` is returned as it is. Raises ReplibError for an unknown name."""
    if isinstance(method, str) and method not in METHODS:
        raise ReplibError(f"Unknown method {method!r}: use one of {', '.join(METHODS)}.")
    return METHODS[method] if isinstance(method, str) else method


def fit_edit(
    method: str | Method, harmful: _SourceSamples, harmless: Target, layer: int, *, k: int = 2, depth: int = 0
) -> SiteEdits:
    """Edit of one method fitted on activations of one block, by site and block where it acts.

    ``depth``: number of blocks of the model, for a method that acts on all of them.

    Raises:
        ReplibError: unknown method, a ``selected`` one, too few prompts for K, widths that differ, non-finite values.
    """
    method = method_of(method)
    if method.selected:
        raise ReplibError(f"{method.title} takes a model to select on, not activations: use fit_edits or Sweeper.")
    edit = method.fit(*sample_pair(harmful, harmless), k)
    return everywhere(edit, depth) if method.everywhere else {(method.site, layer): edit}


def everywhere(edit: Edit, depth: int) -> SiteEdits:
    """One edit on the input, attention output and feed-forward output of each of ``depth`` blocks."""
    return {(site, i): edit for i in range(depth) for site in ("resid_pre", "attn_out", "mlp_out")}
