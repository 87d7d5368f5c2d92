"""One affine edit of a vector, ``x -> x + u (v^T x) + s * x + c``, and the algebra of such edits.

Mean shifts, directional ablation, activation transport and Gaussian optimal transport are all of this form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class AffineEdit:
    """x -> x + u (v^T x) + s * x + c, of rank r in d dimensions; computed in float32, returned in the type of x."""

    u: Float[Tensor, "d r"]
    v: Float[Tensor, "d r"]
    c: Float[Tensor, " d"]
    s: Float[Tensor, " d"] | None = None
    """Gain per coordinate minus one, for edits that treat coordinates apart."""

    def displacement(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """How far x is moved, in float32."""
        x, edit = x.float(), self.to(x.device)
        moved = (x @ edit.v) @ edit.u.T + edit.c
        return moved if edit.s is None else moved + edit.s * x

    def to(self, device: torch.device) -> AffineEdit:
        """The same edit in float32 on another device."""
        u, v, c = (t.to(device, torch.float32) for t in (self.u, self.v, self.c))
        return AffineEdit(u, v, c, None if self.s is None else self.s.to(device, torch.float32))

    def __call__(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The edited x."""
        return (x.float() + self.displacement(x)).to(x.dtype)

    def __mul__(self, strength: float) -> AffineEdit:
        """The displacement scaled: 0 edits nothing, 1 is the edit itself."""
        s = None if self.s is None else self.s * strength
        return AffineEdit(self.u * strength, self.v, self.c * strength, s)

    __rmul__ = __mul__

    def __neg__(self) -> AffineEdit:
        """The opposite displacement."""
        return self * -1.0

    def __add__(self, other: AffineEdit) -> AffineEdit:
        """Both displacements of the same x, summed."""
        gains = [s for s in (self.s, other.s) if s is not None]
        u, v = torch.cat([self.u, other.u], 1), torch.cat([self.v, other.v], 1)
        return AffineEdit(u, v, self.c + other.c, sum(gains[1:], gains[0]) if gains else None)

    def __matmul__(self, first: AffineEdit) -> AffineEdit:
        """One edit after another, ``(self @ first)(x) = self(first(x))``; the ranks add up."""
        gain, own = first._gain(), self._gain()
        through = self.v.mT @ first.u
        u = torch.cat([own[:, None] * first.u + self.u @ through, self.u], 1)
        v = torch.cat([first.v, gain[:, None] * self.v], 1)
        c = own * first.c + self.u @ (self.v.mT @ first.c) + self.c
        return AffineEdit(u, v, c, None if self.s is first.s is None else own * gain - 1)

    def _gain(self) -> Float[Tensor, " d"]:
        return torch.ones_like(self.c) if self.s is None else 1 + self.s

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
        """Remove the component along a direction: x - r r^T x with r of unit length."""
        r = (direction / direction.norm())[:, None]
        return cls(-r, r, torch.zeros_like(direction))
