"""Edits as maps of activations, and their algebra: affine ones, those with a support, rotations in a plane.

Mean shifts, directional ablation, activation transport and Gaussian optimal transport are all ``x + u (v^T x) + c``.
There is deliberately no way to fold an edit into weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError


@dataclass(frozen=True)
class Origin:
    """The one place that an edit was fitted for."""

    model: str
    """Fingerprint of the weights, and hash of the adapter on them."""
    site: str
    layer: int

    def __str__(self) -> str:
        return f"{self.site} of block {self.layer} of the model {self.model}"


@dataclass(frozen=True)
class Edit(ABC):
    """A map of activations, ``x + displacement(x)``; computed in float32, returned in the type of x."""

    origin: Origin | None = field(default=None, kw_only=True)
    """Where it may act; None where that is left to the caller."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of coordinates of x."""

    @abstractmethod
    def displacement(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """How far x is moved, in float32."""

    @abstractmethod
    def __mul__(self, strength: float | int) -> Edit:
        """The displacement scaled: 0 edits nothing, 1 is the edit itself."""

    def __rmul__(self, strength: float | int) -> Edit:
        return self * strength

    def __neg__(self) -> Edit:
        """The opposite displacement."""
        return self * -1.0

    def __add__(self, other: Edit) -> AffineEdit:
        raise ReplibError(_NOT_AFFINE.format("added", type(self).__name__, type(other).__name__))

    def __matmul__(self, other: Edit) -> AffineEdit:
        raise ReplibError(_NOT_AFFINE.format("chained", type(self).__name__, type(other).__name__))

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The edited x.

        Raises ReplibError if x is float16 and the result is not.
        """
        return typed_as(x, x.float() + self.displacement(x))

    def to(self, device: torch.device) -> Edit:
        """The same edit in float32 on another device."""
        return replace(self, **self._parts(device))

    def _parts(self, device: torch.device) -> dict[str, Any]:
        return {f.name: _moved(vars(self)[f.name], device) for f in fields(self)}

    def bound(self, origin: Origin | None) -> Edit:
        """The same edit for one place; None frees it, as where a map of one model is tried on another."""
        return replace(self, origin=origin)


def typed_as(x: Float[Tensor, "... d"], moved: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Convert moved activations to the type of x; ReplibError if x is float16 and the result is not."""
    found = moved.to(x.dtype)
    if x.dtype == torch.float16 and (x.isfinite() & ~found.isfinite()).any():
        raise ReplibError(
            "Moved activations exceed 65504, the largest float16: use bfloat16 or float32, in the model too."
        )
    return found


def check_strength(strength: float, beyond: str, *, extrapolate: bool = False) -> None:
    """ReplibError outside [0, 1] unless ``extrapolate``; ``beyond`` says how to ask for what lies there."""
    if not (0 <= strength <= 1 or (extrapolate and math.isfinite(strength))):
        raise ReplibError(f"Strength {strength} is outside [0, 1], from no edit to the whole one; {beyond}.")


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Edit):
        return value.to(device)
    return value.to(device, torch.float32) if isinstance(value, Tensor) else value


_NOT_AFFINE = (
    "Only affine edits can be {}, not {} and {}: nest two `with applied(...)` instead, the outer one acts first."
)


@dataclass(frozen=True)
class AffineEdit(Edit):
    """x -> x + u (v^T x) + s * x + c, of rank r in d dimensions."""

    u: Float[Tensor, "d r"]
    v: Float[Tensor, "d r"]
    c: Float[Tensor, " d"]
    s: Float[Tensor, " d"] | None = None
    """Gain per coordinate minus one, for edits that treat coordinates apart."""

    @property
    def width(self) -> int:
        """Number of coordinates of x."""
        return len(self.c)

    def linear(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The part of the displacement that depends on x, ``u (v^T x) + s * x``."""
        moved = (x @ self.v) @ self.u.mT
        return moved if self.s is None else moved + self.s * x

    def displacement(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """How far x is moved, in float32."""
        x, edit = x.float(), self.to(x.device)
        return edit.linear(x) + edit.c

    def to(self, device: torch.device) -> AffineEdit:
        """The same edit in float32 on another device; itself, where it is there already."""
        there = self.c.device == device and self.c.dtype == self.u.dtype == torch.float32
        return self if there else replace(self, **self._parts(device))

    def __mul__(self, strength: float | int) -> AffineEdit:
        """The displacement scaled: 0 edits nothing, 1 is the edit itself."""
        s = None if self.s is None else self.s * strength
        return replace(self, u=self.u * strength, c=self.c * strength, s=s)

    def __add__(self, other: Edit) -> AffineEdit:
        """Both displacements of the same x, summed."""
        a, b, origin = _together("added", self, other)
        s = None if a.s is None and b.s is None else _gains(a) + _gains(b)
        return AffineEdit(torch.cat([a.u, b.u], 1), torch.cat([a.v, b.v], 1), a.c + b.c, s, origin=origin)

    def __matmul__(self, other: Edit) -> AffineEdit:
        """First ``other``, then this edit: ``(self @ other)(x) = self(other(x))``, of rank ``r + r'``."""
        after, first, origin = _together("chained", self, other)
        s = None
        if after.s is not None or first.s is not None:
            s = _gains(after) + _gains(first) + _gains(after) * _gains(first)
        u = torch.cat([first.u + after.linear(first.u.mT).mT, after.u], 1)
        v = torch.cat([first.v, after.v * (1 + _gains(first))[:, None]], 1)
        return AffineEdit(u, v, first.c + after.linear(first.c) + after.c, s, origin=origin)

    @classmethod
    def shift(cls, c: Float[Tensor, " d"]) -> AffineEdit:
        """Add the same vector everywhere."""
        return cls(c.new_zeros(len(c), 0), c.new_zeros(len(c), 0), c)

    @classmethod
    def diagonal(cls, s: Float[Tensor, " d"], c: Float[Tensor, " d"]) -> AffineEdit:
        """A line per coordinate: x + s x + c."""
        return cls(c.new_zeros(len(c), 0), c.new_zeros(len(c), 0), c, s)

    @classmethod
    def ablation(cls, direction: Float[Tensor, " d"]) -> AffineEdit:
        """Remove the component along a direction: x - r r^T x with r of unit length.

        Raises ReplibError for a direction of length zero.
        """
        if not direction.norm() > 0:
            raise ReplibError("There is no direction to remove: it has length zero, as of two classes with one mean.")
        r = (direction / direction.norm())[:, None]
        return cls(-r, r, torch.zeros_like(direction))


def _gains(edit: AffineEdit) -> Tensor:
    return torch.zeros_like(edit.c) if edit.s is None else edit.s


def _together(verb: str, one: AffineEdit, other: Edit) -> tuple[AffineEdit, AffineEdit, Origin | None]:
    """Both edits and the place of their result, or an error that says why they have none."""
    if not isinstance(other, AffineEdit):
        raise ReplibError(_NOT_AFFINE.format(verb, type(one).__name__, type(other).__name__))
    if one.width != other.width:
        raise ReplibError(f"Edits of widths {one.width} and {other.width} cannot be {verb}: they are of two models.")
    if one.origin and other.origin and one.origin != other.origin:
        raise ReplibError(
            f"Edits of two places cannot be {verb}: {one.origin}, and {other.origin}. Give `applied` both, each under "
            "its own key, or free them with .bound(None)."
        )
    wider = torch.promote_types(one.u.dtype, other.u.dtype)
    return _typed(one, wider), _typed(other, wider), one.origin or other.origin


def _typed(edit: AffineEdit, dtype: torch.dtype) -> AffineEdit:
    s = None if edit.s is None else edit.s.to(dtype)
    return replace(edit, u=edit.u.to(dtype), v=edit.v.to(dtype), c=edit.c.to(dtype), s=s)


@dataclass(frozen=True)
class SupportedEdit(Edit):
    """A line per coordinate, drawn only where the coordinate lies in its support, ``low <= x <= high``."""

    edit: AffineEdit
    low: Float[Tensor, " d"]
    high: Float[Tensor, " d"]

    @property
    def width(self) -> int:
        """Number of coordinates of x."""
        return len(self.low)

    def displacement(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """How far x is moved, in float32; coordinates outside their support stay."""
        x, low, high = x.float(), *(t.to(x.device, torch.float32) for t in (self.low, self.high))
        return torch.where((low <= x) & (x <= high), self.edit.displacement(x), 0.0)

    def __mul__(self, strength: float | int) -> SupportedEdit:
        """The displacement scaled: 0 edits nothing, 1 is the edit itself."""
        return replace(self, edit=self.edit * strength)
