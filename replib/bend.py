"""The four terms of RepBend as pure functions (arXiv 2504.01550, Algorithm 1), with the paper's coefficients.

    L = 1/2 ||v_s||_2  -  alpha ||v_u||_2  -  beta cos_sim(A_u)  +  gamma KL(M || M')

v_s and v_u are the differences between bent and base activations on safe and unsafe answers, A_u the bent activations
of unsafe prompts. Norms are per token and not squared, as in the authors' code. The paper leaves the averaging open;
here every term is a mean over layers and tokens (or pairs), and the KL a mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replib.errors import ReplibError


@dataclass(frozen=True)
class BendConfig:
    """Coefficients in the paper's meaning. Safeguards are off (None) unless named."""

    alpha: float = 0.5
    """Weight of the distance by which unsafe answers are pushed away."""
    beta: float = 0.1
    """Weight of the cosine term that gathers unsafe prompts; it also breaks the stationary start of LoRA."""
    gamma: float = 0.3
    """Weight of the KL divergence to the base model on retained dialogues (mean over tokens)."""
    temperature: float = 2.0
    """Of the KL term, which is multiplied by its square."""
    target_layers: tuple[int, ...] = ()
    """Blocks whose outputs are pushed and gathered; () means 60-95 % of the depth."""
    max_distance: float | None = None
    """Hinge: unsafe distances beyond this, as a multiple of the base model's norm, earn nothing more.

    Without it the objective has no lower bound."""
    directional: bool = False
    """Whether unsafe states are brought to the base's norm before the distance is taken.

    The next block's RMSNorm divides the norm away: pushing by growth alone changes no answer."""
    decision: bool = False
    """Whether distances are also taken at the last prompt token, where the first word of the answer is decided."""
    refusals: bool = False
    """Whether the KL covers refusals too, as Algorithm 1 has it; the authors' code takes benign dialogues alone."""
    anchored: bool = False
    """Whether unsafe prompts are gathered on the refused ones; False is the paper's cosine between all of them.

    Cosines are then about the base model's mean of both groups, and refused prompts enter as constants. Without the
    centre all cosines start near 0.9; without the anchor refusals may be gathered on compliance.
    """

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "temperature"):
            value = getattr(self, name)
            if not value >= 0 or value == float("inf"):
                raise ReplibError(f"{name}={value} must be a finite number, zero or more.")

    def layers(self, depth: int) -> tuple[int, ...]:
        """The target blocks of a model with ``depth`` blocks."""
        layers = self.target_layers or tuple(range(round(0.6 * depth), round(0.95 * depth)))
        if bad := [i for i in layers if not 0 <= i < depth]:
            raise ReplibError(f"Target layer {bad[0]} is outside the model's blocks 0 to {depth - 1}.")
        return layers


class BendTerms(NamedTuple):
    """The four terms before weighting, each a scalar."""

    safe: Tensor
    """Mean distance of safe answers from the base model: kept small."""
    unsafe: Tensor
    """Mean distance of unsafe answers: made large."""
    cosine: Tensor
    """Mean cosine similarity between unsafe prompts: made large."""
    kl: Tensor
    """KL divergence to the base model on retained dialogues, nats per token: kept small."""


def bend_loss(terms: BendTerms, config: BendConfig) -> Tensor:
    """The weighted sum of Algorithm 1, line 13."""
    return 0.5 * terms.safe - config.alpha * terms.unsafe - config.beta * terms.cosine + config.gamma * terms.kl


def distance(
    bent: Float[Tensor, "layers tokens dim"],
    base: Float[Tensor, "layers tokens dim"],
    *,
    max_distance: float | None = None,
    directional: bool = False,
) -> Float[Tensor, ""]:
    """Mean L2 distance per token and layer, in float32; with a hinge, counted up to a multiple of the base norm.

    ``directional``: the bent states are first brought to the norm of the base's.
    """
    bent, base = bent.float(), base.float()
    norms = torch.linalg.vector_norm(base, dim=-1)
    if directional:
        bent = torch.nn.functional.normalize(bent, dim=-1) * norms[..., None]
    lengths = torch.linalg.vector_norm(bent - base, dim=-1)
    return (lengths if max_distance is None else torch.minimum(lengths, max_distance * norms)).mean()


def mean_cosine(x: Float[Tensor, "layers rows dim"]) -> Float[Tensor, ""]:
    """Mean cosine similarity over all pairs of different rows, averaged over layers.

    sum_{i != j} u_i . u_j = ||sum_i u_i||^2 - n for unit vectors, so no pair is formed.
    """
    n = x.shape[1]
    if n < 2:
        raise ReplibError("The cosine term compares pairs: give at least two unsafe prompts a step.")
    units = torch.nn.functional.normalize(x.float(), dim=-1)
    return ((units.sum(dim=1).square().sum(dim=-1) - n) / (n * (n - 1))).mean()


def anchored_cosine(
    bent: Float[Tensor, "layers rows dim"],
    refused: Float[Tensor, "layers others dim"],
    centre: Float[Tensor, "layers 1 dim"],
) -> Float[Tensor, ""]:
    """Mean cosine among unsafe prompts and refused ones about a centre; the refused ones are the base model's.

    Ours, not the paper's: it says on which side the prompts are gathered.
    """
    return mean_cosine(torch.cat([bent, refused], dim=1).float() - centre.float())


def kl_divergence(
    base_logits: Float[Tensor, "tokens vocab"],
    bent_logits: Float[Tensor, "tokens vocab"],
    temperature: float = 2.0,
) -> Float[Tensor, ""]:
    """tau^2 KL(base || bent) at temperature tau, mean over tokens, in nats."""
    p = (base_logits.float() / temperature).log_softmax(-1)
    q = (bent_logits.float() / temperature).log_softmax(-1)
    return temperature**2 * torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
