"""Shrinkage of a covariance to a multiple of the identity, from the Gram matrix of few samples in many dimensions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replib.clouds import Cloud, Samples
from replib.core.errors import ReplibError

RULES = ("ledoit_wolf", "oas")


def shrinkage(x: Samples | Cloud, *, rule: str = "ledoit_wolf") -> float:
    """Weight ``s`` of the identity in the shrunk covariance ``(1 - s) S + s tr(S)/d I``, in [0, 1].

    Ledoit and Wolf (2004, "A well-conditioned estimator", Lemma 3.2 to 3.4) or OAS (Chen et al. 2010, eq. 23), as
    scikit-learn computes them, ``S`` divided by n; from the ``n x n`` Gram matrix. Near 1 it says that n samples know
    next to nothing of the covariance in d axes. ReplibError on another rule, or Ledoit-Wolf of a streamed cloud.
    """
    cloud = Cloud.of(x)
    n, d = cloud.n, len(cloud.mean)
    rows = cloud.samples("Ledoit-Wolf shrinkage") if rule == "ledoit_wolf" else cloud.factor * math.sqrt(n - 1)
    gram = rows @ rows.mT
    mu = float(gram.trace()) / (n * d)
    energy = float(gram.square().sum()) / n**2
    if rule == "oas":
        alpha = energy / d**2
        excess, spread = (alpha + mu**2), (n + 1) * (alpha - mu**2 / d)
    elif rule == "ledoit_wolf":
        excess = (float(gram.diagonal().square().sum()) / n - energy) / (n * d)
        spread = energy / d - mu**2
    else:
        raise ReplibError(f"shrinkage rule is {rule!r}; choose 'ledoit_wolf' or 'oas'.")
    return min(1.0, excess / spread) if spread > 0 else 1.0


class Shrunk(NamedTuple):
    """The covariance ``(1 - weight) S + floor I``."""

    weight: float
    floor: float

    def factor(self, factor: Float[Tensor, "r k"]) -> Float[Tensor, "q k"]:
        """A factor of it, from one of S."""
        identity = torch.eye(factor.shape[1], dtype=factor.dtype)
        return torch.cat([math.sqrt(1 - self.weight) * factor, math.sqrt(self.floor) * identity])


def shrunk_pair(source: Cloud, target: Cloud, ridge: float | str) -> tuple[Shrunk, Shrunk]:
    """How both covariances are shrunk: by a share of their mean variance, the same for both, or each by a rule."""
    if isinstance(ridge, str):
        weights = shrinkage(source, rule=ridge), shrinkage(target, rule=ridge)
        return Shrunk(weights[0], weights[0] * source.variance), Shrunk(weights[1], weights[1] * target.variance)
    floor = ridge * (source.variance + target.variance) / 2
    return Shrunk(0.0, floor), Shrunk(0.0, floor)
