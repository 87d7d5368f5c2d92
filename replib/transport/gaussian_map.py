"""Closed-form optimal transport of one Gaussian onto another, inside a few axes (PCA-OT, arXiv 2603.04355).

The map leaves the complement of the axes alone. Every quantity is computed from factors ``F`` of the covariances,
``Sigma = F^T F``: an SVD of factors does not square the condition number, gives positive semi-definite results and
never builds a ``dim x dim`` matrix. Statistics are float64 on the CPU.

The full text of that paper was not available to us; number of axes, ridge and basis are options, their defaults ours.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor

from replib.core.errors import ReplibError, check_choice
from replib.core.storage import write_tensors
from replib.transport.affine import AffineEdit, check_strength, typed_as
from replib.transport.bases import BASES, share_inside
from replib.transport.gaussians import RULES, Gaussian, Samples, cloud_pair, shrunk_pair

_Array = TypeVar("_Array", Tensor, np.ndarray)
_TENSORS = ("basis_", "scale_", "source_mean_", "target_mean_", "rest_")
_NUMBERS = ("kept_", "rho_", "cost_")


def monge_scale(source: Float[Tensor, "n k"], target: Float[Tensor, "m k"]) -> Float[Tensor, "k k"]:
    """The symmetric positive ``A`` with ``A Sigma_s A = Sigma_t``, from factors ``F`` with ``Sigma = F^T F``.

    ``R = qr(F)``, ``R_t R_s^T = V S W^T``, ``B = R_s^-1 W S^(1/2)``, ``A = B B^T``: accurate where the
    textbook ``Sigma_s^(-1/2) (...)^(1/2) Sigma_s^(-1/2)`` has lost every digit. Computed in float64, returned in
    the dtype of the source. ReplibError if ``Sigma_s`` is singular to that dtype.
    """
    upper_source, upper_target = (torch.linalg.qr(factor.double(), mode="r")[1] for factor in (source, target))
    noise = max(source.shape) * torch.finfo(source.dtype).eps * upper_source.norm()
    if len(upper_source) < source.shape[1] or upper_source.diagonal().abs().min() <= noise:
        raise ReplibError("the source does not vary along some axis of the basis; set ridge > 0 or lower k.")
    _, singular, right = torch.linalg.svd(upper_target @ upper_source.mT)
    root = torch.linalg.solve_triangular(upper_source, right.mT, upper=True) * singular.sqrt()
    scale = root @ root.mT
    return ((scale + scale.mT) / 2).to(source.dtype)  # to the bit symmetric, in whatever order a kernel adds


class GaussianMap(TransformerMixin, BaseEstimator):
    """Optimal transport of one Gaussian onto another inside a subspace, as a scikit-learn estimator.

    ``T(x) = P[A(P^T x - m_s) + m_t] + g (I - P P^T) x + (1 - g) r``, where ``A`` is ``monge_scale`` of the two
    covariances inside the basis ``P``, and ``g = 1`` unless ``k`` is None.

    Args:
        k: axes of the basis. None takes the whole span of the samples: the map of the full space, in low-rank form
            (with one ridge for both classes it is the identity off the span, with a rule each class has its own
            floor there and ``g`` is the ratio of their deviations). Use a rule or a ridge near 1 then, as n prompts
            cannot show d variances.
        basis: ``pooled`` are the principal axes of both classes together, between-class term included; for models
            whose few massive coordinates hide the gap from these, ``mean_first`` is the mean gap and then pooled axes
            orthogonal to it.
        ridge: added to both covariances, as a share of their mean variance per axis (of the basis; of the whole space
            for ``k=None``); or each is shrunk by its own ``ledoit_wolf`` or ``oas`` weight.

    After ``fit``: ``basis_`` P ``[d, k]``, ``scale_`` A ``[k, k]``, ``source_mean_`` and ``target_mean_`` ``[k]`` in
    the basis, ``rest_`` r ``[d]`` the target mean outside it, ``kept_`` g; ``rho_`` the share of the squared mean
    gap inside the basis; ``cost_`` the mean squared displacement of the source, ``W2^2`` inside the basis;
    ``n_samples_`` of both classes.
    """

    basis_: Float[Tensor, "d k"]
    scale_: Float[Tensor, "k k"]
    source_mean_: Float[Tensor, " k"]
    target_mean_: Float[Tensor, " k"]
    rest_: Float[Tensor, " d"]
    kept_: float
    rho_: float
    cost_: float
    n_samples_: tuple[int, int]

    def __init__(self, k: int | None = 2, *, basis: str = "pooled", ridge: float | str = 1e-6):
        self.k, self.basis, self.ridge = k, basis, ridge

    def fit(self, x: Samples | Gaussian, y: Samples | Gaussian | None = None) -> GaussianMap:
        """Fit the map that carries ``x`` (harmful, ``[n, d]``) to ``y`` (harmless, ``[m, d]``), of any float dtype.

        Either may be a ``Gaussian``, as ``Moments.gaussian`` makes it of streamed vectors.

        Warns when the basis holds less than half of the squared mean gap. ReplibError on unusable samples.
        """
        if y is None:
            raise ReplibError("a map needs two classes, what to move and where to: fit(harmful, harmless).")
        source, target = cloud_pair(x, y)
        self._check_options(min(source.n, target.n))
        self.basis_ = BASES[self.basis](source, target, self.k).contiguous()
        self.source_mean_, self.target_mean_ = source.mean @ self.basis_, target.mean @ self.basis_
        self.rest_ = target.mean - self.basis_ @ self.target_mean_
        self.n_samples_ = source.n, target.n
        self._fit_scale(source, target)
        self.rho_ = share_inside(self.basis_, target.mean - source.mean)
        self.cost_ = self._mean_square(source)
        return self

    def _fit_scale(self, source: Gaussian, target: Gaussian) -> None:
        inside = source.onto(self.basis_), target.onto(self.basis_)
        rounding = torch.finfo(torch.float64).eps * max(float(c.mean.norm()) for c in (source, target))
        if max(c.variance for c in inside) <= rounding**2:
            raise ReplibError("neither class varies along the basis, there is no covariance to fit; add prompts.")
        shrunk = shrunk_pair(*((source, target) if self.k is None else inside), self.ridge)
        self.scale_ = monge_scale(*(s.factor(c.factor) for s, c in zip(shrunk, inside, strict=True)))
        floors = [s.floor for s in shrunk]
        self.kept_ = math.sqrt(floors[1] / floors[0]) if self.k is None and floors[0] else 1.0

    def transform(self, x: _Array) -> _Array:
        """``T(x)`` for activations ``[..., d]``, computed in float32 or better; kind, dtype and device are kept.

        ReplibError before ``fit``, on another width, on integers, or where the result exceeds float16.
        """
        values = torch.as_tensor(x)
        self._check_input(values)
        work = values.to(torch.promote_types(values.dtype, torch.float32))
        parts = self.basis_, self._gain(), self.source_mean_, self.target_mean_ - self.source_mean_, self.rest_
        axes, gain, source_mean, shift, rest = (part.to(work) for part in parts)
        inside = work @ axes
        moved = work + ((inside - source_mean) @ gain + shift) @ axes.mT
        if self.kept_ != 1:
            moved = moved - (1 - self.kept_) * (work - inside @ axes.mT - rest)
        moved = typed_as(values, moved)
        return moved if isinstance(x, Tensor) else moved.numpy()

    def inverse_transform(self, y: _Array) -> _Array:
        """Map ``y`` back to the source by ``inverse``."""
        return self.inverse().transform(y)

    def inverse(self) -> GaussianMap:
        """The map back, which is the optimal transport from the image of the source to the source, at the same cost.

        ReplibError if an extrapolated map has folded the space.
        """
        root, failed = torch.linalg.cholesky_ex(self._fitted().scale_)
        if failed or not self.kept_ > 0:
            raise ReplibError("this map folds the space, so it has no inverse; use a strength from 0 to 1.")
        back = copy.copy(self)
        back.scale_, back.kept_ = torch.cholesky_inverse(root), 1 / self.kept_
        back.source_mean_, back.target_mean_ = self.target_mean_, self.source_mean_
        back.n_samples_ = self.n_samples_[::-1]
        return back

    def at(self, strength: float, *, extrapolate: bool = False) -> GaussianMap:
        """McCann's displacement interpolation ``(1 - s) x + s T(x)``, at ``s^2`` times the cost.

        ``at(0)`` is the identity to the bit, ``at(a).at(b)`` is ``at(a * b)``. ReplibError outside [0, 1] unless
        ``extrapolate``: beyond it lies no geodesic, and the map may cease to be a transport.
        """
        check_strength(strength, "extrapolate=True goes beyond, finitely far", extrapolate=extrapolate)
        part = copy.copy(self._fitted())
        part.scale_ = torch.eye(len(self.scale_), dtype=self.scale_.dtype) + strength * self._gain()
        part.target_mean_ = self.source_mean_ + strength * (self.target_mean_ - self.source_mean_)
        part.kept_ = 1 - strength * (1 - self.kept_)
        part.cost_ = strength**2 * self.cost_
        return part

    def edit(self) -> AffineEdit:
        """The map as an edit, to be applied to a model or composed with others by ``@``."""
        gain = self._fitted()._gain() + (1 - self.kept_) * torch.eye(len(self.scale_), dtype=self.scale_.dtype)
        shift = self.target_mean_ - self.source_mean_ - self._gain() @ self.source_mean_
        c = self.basis_ @ shift + (1 - self.kept_) * self.rest_
        s = None if self.kept_ == 1 else torch.full_like(c, self.kept_ - 1)
        return AffineEdit(self.basis_ @ gain, self.basis_, c, s)

    @property
    def condition_(self) -> float:
        """Condition number of ``scale_``; large values say that some axis is stretched on thin evidence."""
        return float(torch.linalg.cond(self._fitted().scale_))

    def save(self, path: Path | str) -> Path:
        """Write the fitted map as one safetensors file of about ``d (k + 1)`` numbers."""
        tensors = {name: getattr(self._fitted(), name) for name in _TENSORS}
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in _NUMBERS}
        about = {"map": self.get_params(), "n_samples": self.n_samples_}
        return write_tensors(Path(path), tensors | numbers, {"replib": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: Path | str) -> GaussianMap:
        """Read a map that ``save`` wrote; ReplibError if the file is missing, damaged or something else."""
        try:
            with safe_open(path, "pt") as file:
                about: dict[str, Any] = json.loads(file.metadata()["replib"])
                tensors = {name: file.get_tensor(name) for name in (*_TENSORS, *_NUMBERS)}
            fitted = cls(**about["map"])
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ReplibError(f"{path} holds no GaussianMap ({error}); write one with save().") from error
        for name, tensor in tensors.items():
            setattr(fitted, name, tensor if name in _TENSORS else float(tensor))
        fitted.n_samples_ = tuple(about["n_samples"])
        return fitted

    def _gain(self) -> Float[Tensor, "k k"]:
        return self.scale_ - torch.eye(len(self.scale_), dtype=self.scale_.dtype)

    def _mean_square(self, cloud: Gaussian) -> float:
        """``E |T(x) - x|^2`` over a cloud."""
        inside = cloud.factor @ self.basis_
        spread = inside @ self._gain() @ self.basis_.mT
        if self.kept_ != 1:
            spread = spread - (1 - self.kept_) * (cloud.factor - inside @ self.basis_.mT)
        return float((self.transform(cloud.mean) - cloud.mean).square().sum() + spread.square().sum())

    def _fitted(self) -> GaussianMap:
        if not hasattr(self, "basis_"):
            raise ReplibError("this map is not fitted yet; call fit(harmful, harmless) first.")
        return self

    def _check_input(self, values: Tensor) -> None:
        width = len(self._fitted().basis_)
        if values.shape[-1:] != (width,):
            raise ReplibError(f"activations have shape {tuple(values.shape)}; this map is of width {width}.")
        if not values.is_floating_point():
            raise ReplibError(f"activations are {values.dtype}; convert them to a floating type.")

    def _check_options(self, smallest: int) -> None:
        check_choice("basis", self.basis, BASES)
        if self.k is not None and self.k < 1:
            raise ReplibError(f"k is {self.k}; the basis needs at least one axis.")
        if smallest <= (1 if self.k is None else self.k):
            raise ReplibError(f"{smallest} prompts in a class cannot fit {self.k} axes; add prompts or lower k.")
        if self.ridge not in RULES and not (isinstance(self.ridge, (int, float)) and 0 <= self.ridge < math.inf):
            raise ReplibError(
                f"ridge is {self.ridge!r}; it is a share of the mean variance, 1e-6 for small k, or one of {RULES}."
            )
