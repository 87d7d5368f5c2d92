"""Clouds of activations: samples, their Gaussians, their principal axes. Float64 on the CPU, whatever comes in.

A covariance is held as a factor ``F``, ``Sigma = F^T F``, and never as a ``dim x dim`` matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError

Samples: TypeAlias = Tensor | np.ndarray


def as_samples(values: Samples, name: str) -> Float[Tensor, "n d"]:
    """Activations of one class as a float64 matrix on the CPU; ReplibError unless finite and not empty."""
    rows = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ReplibError(f"{name} has shape {tuple(rows.shape)}; it must be [prompts, dim], not empty.")
    bad = (~rows.isfinite()).any(1)
    if bad.any():
        raise ReplibError(
            f"{name} has NaN or inf in {int(bad.sum())} of {len(rows)} rows, first {int(bad.nonzero()[0])}; "
            "capture in float32 or bfloat16 (float16 overflows), or leave those prompts out."
        )
    return rows


def sample_pair(source: Samples, target: Samples) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Both classes by ``as_samples``; ReplibError unless of one width."""
    first, second = as_samples(source, "first class"), as_samples(target, "second class")
    _check_widths(first.shape[1], second.shape[1])
    return first, second


def span_coordinates(x: Samples, y: Samples) -> tuple[Float[Tensor, "n r"], Float[Tensor, "m r"]]:
    """The two samples in an orthonormal basis of their pooled span, pooled mean at the origin.

    An isometry onto ``min(d, n + m)`` coordinates: distances, mean gaps and spectra are the same.
    """
    x, y = sample_pair(x, y)
    rows = torch.cat([x, y])
    rows = rows - rows.mean(0)
    if rows.shape[1] > rows.shape[0]:
        rows = torch.linalg.qr(rows.mT, mode="r")[1].mT
    return rows[: len(x)], rows[len(x) :]


@dataclass(frozen=True)
class Cloud:
    """Mean and covariance of one class of activations."""

    mean: Float[Tensor, " d"]
    factor: Float[Tensor, "r d"]
    """``F`` with ``F^T F`` the covariance about this mean, divided by n - 1."""
    n: int
    """Samples behind it."""
    sampled: bool = False
    """Whether row i of the factor is sample i, centred; what was streamed has forgotten its samples."""

    def __post_init__(self) -> None:
        if not (self.mean.isfinite().all() and self.factor.isfinite().all()):
            raise ReplibError("a cloud's mean or covariance is NaN or inf; leave out the vectors that are not finite.")

    @classmethod
    def of(cls, x: Samples | Cloud, name: str = "sample") -> Cloud:
        """The Gaussian of samples ``[n, d]``; ReplibError if they are fewer than two or not finite."""
        if isinstance(x, Cloud):
            return x
        rows = as_samples(x, name)
        if len(rows) < 2:
            raise ReplibError("one sample has no covariance; give at least two prompts a class.")
        mean = rows.mean(0)
        return cls(mean, (rows - mean) / math.sqrt(len(rows) - 1), len(rows), sampled=True)

    @property
    def variance(self) -> float:
        """Mean variance of a coordinate, ``tr Sigma / d``."""
        return float(self.factor.square().sum()) / len(self.mean)

    def samples(self, purpose: str) -> Float[Tensor, "n d"]:
        """The samples about their mean; ReplibError, naming what they are for, if there are none."""
        if not self.sampled:
            raise ReplibError(f"{purpose} needs the samples themselves, and a streamed cloud keeps none: capture them.")
        return self.factor * math.sqrt(self.n - 1)

    def onto(self, axes: Float[Tensor, "d k"]) -> Cloud:
        """The cloud in the coordinates of some axes."""
        return Cloud(self.mean @ axes, self.factor @ axes, self.n, self.sampled)


def cloud_pair(x: Samples | Cloud, y: Samples | Cloud) -> tuple[Cloud, Cloud]:
    """Both classes by ``Cloud.of``; ReplibError unless of one width."""
    source, target = Cloud.of(x, "first class"), Cloud.of(y, "second class")
    _check_widths(len(source.mean), len(target.mean))
    return source, target


def principal_axes(
    rows: Float[Tensor, "n d"], k: int | None = None
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " r"]]:
    """Leading axes of centred rows, and the sum of squares along every axis, largest first; ``k=None``: all.

    Eigenvectors of the smaller of ``Z Z^T`` and ``Z^T Z``, re-orthonormalised once, signed by ``oriented``.
    ReplibError if the rows have fewer than k axes.
    """
    wide = rows.shape[1] > rows.shape[0]
    energy, vectors = torch.linalg.eigh(rows @ rows.mT if wide else rows.mT @ rows)
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    rank = int((energy > max(rows.shape) * torch.finfo(rows.dtype).eps * energy[0]).sum())
    k = rank if k is None else k
    if k > rank:
        raise ReplibError(f"{k} axes asked of samples of rank {rank}; lower k, or add prompts that differ.")
    axes = rows.mT @ (vectors[:, :k] / energy[:k].sqrt()) if wide else vectors[:, :k]
    return oriented(torch.linalg.qr(axes)[0]), energy


def oriented(axes: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Axes whose coordinate of largest magnitude is positive: no sign depends on row order or library."""
    return axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()


def _check_widths(first: int, second: int) -> None:
    if first != second:
        raise ReplibError(f"the classes have widths {first} and {second}; capture both at one site.")
