"""Loss of RepBend as pure functions (arXiv 2504.01550, Algorithm 1), with the paper's coefficients.

    L = 1/2 ||v_s||_2  -  alpha ||v_u||_2  -  beta cos_sim(A_u)  +  gamma KL(M || M')

Symbols and the stationary start are explained in ``replib.defences.repbend.config``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.defences.repbend.config import BendConfig


class BendTerms(NamedTuple):
    """Unweighted terms, each a scalar; None for a term that is absent."""

    safe: Tensor | None = None
    """Mean distance of safe answers from the base model; minimised."""
    unsafe: Tensor | None = None
    """Mean distance of unsafe answers from the base model; maximised."""
    cosine: Tensor | None = None
    """Mean cosine similarity between unsafe prompts; maximised."""
    kl: Tensor | None = None
    """KL divergence to the base model, nats per token or per sequence; minimised."""
    pairing: Tensor | None = None
    """Mean distance of unsafe answers from the base's refusals of the same prompts; minimised."""

    def taken(self) -> dict[str, Tensor]:
        """Present terms by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}


class Weights(NamedTuple):
    """Weights of the terms, zero or more; ``bend_loss`` adds the signs of Algorithm 1."""

    safe: float
    unsafe: float
    cosine: float
    kl: float
    pairing: float


def weights(config: BendConfig, progress: float = 0.0) -> Weights:
    """Weights at a finished share of training, from 0 to 1."""
    keep, change = (progress / 2, 1 - progress / 2) if config.schedule == "ramps" else (1.0, 1.0)
    return Weights(0.5 * keep, config.alpha * change, config.beta * change, config.gamma * keep, config.eta * change)


def bend_loss(terms: BendTerms, config: BendConfig, progress: float = 0.0) -> Tensor:
    """Weighted sum of the present terms: Algorithm 1, line 13, and the pairing term."""
    w = weights(config, progress)
    signed = w._replace(unsafe=-w.unsafe, cosine=-w.cosine)._asdict()
    return torch.stack([signed[name] * x for name, x in terms.taken().items()]).sum()


def mean_cosine(x: Float[Tensor, "layers rows dim"]) -> Float[Tensor, ""]:
    """Mean cosine similarity over all pairs of different rows, averaged over layers.

    sum_{i != j} u_i . u_j = ||sum_i u_i||^2 - n for unit vectors, so no pair is formed.
    """
    n = x.shape[1]
    if n < 2:
        raise ReplibError("The cosine term compares pairs; give at least two unsafe prompts a step.")
    units = torch.nn.functional.normalize(x.float(), dim=-1)
    return ((units.sum(dim=1).square().sum(dim=-1) - n) / (n * (n - 1))).mean()


def anchored_cosine(
    bent: Float[Tensor, "layers rows dim"],
    refused: Float[Tensor, "layers others dim"],
    centre: Float[Tensor, "layers 1 dim"],
) -> Float[Tensor, ""]:
    """Mean cosine among bent states of unsafe prompts and base states of refused ones, about a centre.

    An addition to the paper: it decides on which side the prompts are gathered.
    """
    return mean_cosine(torch.cat([bent, refused], dim=1).float() - centre.float())


def remembered(
    queue: Float[Tensor, "layers before dim"] | None, new: Float[Tensor, "layers rows dim"], length: int
) -> Float[Tensor, "layers kept dim"] | None:
    """Queue of A_u for the next step: the newest ``length`` rows, without gradients; None for length 0."""
    if not length:
        return None
    rows = new.detach() if queue is None else torch.cat([queue, new.detach()], dim=1)
    return rows[:, -length:]
