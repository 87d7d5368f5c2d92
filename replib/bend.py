"""The terms of RepBend as pure functions (arXiv 2504.01550, Algorithm 1), with the paper's coefficients.

    L = 1/2 ||v_s||_2  -  alpha ||v_u||_2  -  beta cos_sim(A_u)  +  gamma KL(M || M')

v_s and v_u are the differences between bent and base activations on safe and unsafe answers, A_u the bent activations
of unsafe prompts. Norms are per token and not squared, as in the authors' code, which calls the coefficients alpha
(our 1/2), beta (alpha), gamma (beta) and epsilon (gamma), and adds eta times a fifth term, off by default. Every
distance is a mean over layers and tokens, the cosine one over layers and pairs.

**The start.** With LoRA-B = 0 bent and base are equal, and there the gradients of all distances and of the KL are zero.
The cosine (and the pairing term) alone have one, so beta > 0 is what moves the first step, the same way every time.
With beta = eta = 0 the first step follows rounding noise; ``TrainConfig.perturbation`` is the way out then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError, check_choice
from replib.scope import FIDELITIES, Scope

LOSS_MODES = ("request_last", "request_all", "request_response", "response_all", "response_one", "response_R")
BEND_SITES = ("resid_post", "resid_mid", "attn_in", "mlp_in")
PAIRED = 20  # tokens at most that response_R and the pairing term compare


@dataclass(frozen=True)
class BendConfig:
    """Coefficients in the paper's meaning, and what is read. Safeguards are off unless named."""

    alpha: float = 0.5
    """Weight of the distance by which unsafe answers are pushed away."""
    beta: float = 0.1
    """Weight of the cosine term that gathers unsafe prompts; it also breaks the stationary start of LoRA."""
    gamma: float = 0.3
    """Weight of the KL divergence to the base model on retained dialogues."""
    eta: float = 0.0
    """Weight of the pairing term, which is not in the paper: bent states of an unsafe answer are drawn to the base's
    states of the refusal of the same prompt."""
    temperature: float = 2.0
    """Of the KL term, which is multiplied by its square."""
    schedule: str = "constant"
    """"constant", or "ramps" as in Circuit Breakers: p goes from 0 to 1/2 during training, what keeps the model as it
    is counts p-fold (safe, KL), what changes it (1 - p)-fold (unsafe, cosine, pairing)."""
    target_layers: tuple[int, ...] = ()
    """Blocks whose outputs are pushed and gathered; () means a share of the depth (60-95 %, see ``Scope.until``)."""
    fidelity: str = "replib"
    """Whose reading of the formulas: "replib", "official" or "paper"; see ``replib.scope``."""
    custom: Scope | None = None
    """Another scope instead of the one of ``fidelity``."""
    loss_mode: str = "response_all"
    """Tokens of both distances. request_last: the last token of the prompt; request_all: the prompt with its template;
    request_response: everything; response_all: the answer; response_one: its first token; response_R: its first R
    tokens, R the length of the shortest answer in the batch and 20 at most.

    Repaired: the official request_last covers half of the unsafe batch only (here all of it), and the official
    response_R reads R before it is set, as a minimum over all steps so far (here of the batch itself)."""
    alpha_mode: str = "all"
    """Layers of the safe term: "all", or "target"."""
    site: str = "resid_post"
    """Where in a block: resid_post (its output), resid_mid (after attention), attn_in or mlp_in (behind the norm before
    attention or MLP). The paper found little difference."""
    max_distance: float | None = None
    """Hinge: unsafe distances beyond this, as a multiple of the base model's norm, earn nothing more.

    Without it the objective has no lower bound."""
    relative: bool = False
    """Whether distances are divided by the base model's norm, so that late layers count no more than early ones."""
    directional: bool = False
    """Whether unsafe states are brought to the base's norm before the distance is taken.

    The next block's RMSNorm divides the norm away: pushing by growth alone changes no answer."""
    decision: bool = False
    """Whether distances are also taken at the last prompt token, where the first word of the answer is decided."""
    anchored: bool = False
    """Whether unsafe prompts are gathered on the refused ones; False is the paper's cosine between all of them.

    Cosines are then about the base model's mean of both groups, and refused prompts enter as constants. Without the
    centre all cosines start near 0.9; without the anchor refusals may be gathered on compliance.
    """

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "eta", "temperature"):
            value = getattr(self, name)
            if not value >= 0 or value == float("inf"):
                raise ReplibError(f"{name}={value} must be a finite number, zero or more.")
        check_choice("fidelity", self.fidelity, FIDELITIES)
        check_choice("schedule", self.schedule, ("constant", "ramps"))
        check_choice("loss_mode", self.loss_mode, LOSS_MODES)
        check_choice("alpha_mode", self.alpha_mode, ("all", "target"))
        check_choice("site", self.site, BEND_SITES)
        if self.anchored and self.scope.gathered == "harmful":
            raise ReplibError(
                "anchored gathers unsafe prompts on refused ones: it needs a scope with gathered='unsafe'."
            )

    @property
    def scope(self) -> Scope:
        """Rows, tokens, layers and averages: ``custom``, or what ``fidelity`` stands for."""
        return self.custom or FIDELITIES[self.fidelity]

    @property
    def escapes(self) -> bool:
        """Whether a term has a gradient at LoRA's start."""
        return bool(self.beta or self.eta)

    def layers(self, depth: int) -> tuple[int, ...]:
        """The target blocks of a model with ``depth`` blocks."""
        layers = self.target_layers or tuple(range(round(0.6 * depth), round(self.scope.until * depth)))
        if bad := [i for i in layers if not 0 <= i < depth]:
            raise ReplibError(f"Target layer {bad[0]} is outside the model's blocks 0 to {depth - 1}.")
        return layers


class BendTerms(NamedTuple):
    """The terms before weighting, each a scalar; None where it is not taken."""

    safe: Tensor | None = None
    """Mean distance of safe answers from the base model: kept small."""
    unsafe: Tensor | None = None
    """Mean distance of unsafe answers: made large."""
    cosine: Tensor | None = None
    """Mean cosine similarity between unsafe prompts: made large."""
    kl: Tensor | None = None
    """KL divergence to the base model, nats per token or per sequence: kept small."""
    pairing: Tensor | None = None
    """Mean distance of unsafe answers from the base's refusals of the same prompts: made small."""

    def taken(self) -> dict[str, Tensor]:
        """Those that are taken, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}


class Weights(NamedTuple):
    """What each term is multiplied by; all are zero or more, their signs are those of Algorithm 1."""

    safe: float
    unsafe: float
    cosine: float
    kl: float
    pairing: float


def weights(config: BendConfig, progress: float = 0.0) -> Weights:
    """Coefficients after a share of training, from 0 to 1."""
    keep, change = (progress / 2, 1 - progress / 2) if config.schedule == "ramps" else (1.0, 1.0)
    return Weights(0.5 * keep, config.alpha * change, config.beta * change, config.gamma * keep, config.eta * change)


def bend_loss(terms: BendTerms, config: BendConfig, progress: float = 0.0) -> Tensor:
    """The weighted sum of Algorithm 1, line 13, and the pairing term, over the terms that are taken."""
    w = weights(config, progress)
    signed = w._replace(unsafe=-w.unsafe, cosine=-w.cosine)._asdict()
    return torch.stack([signed[name] * x for name, x in terms.taken().items()]).sum()


def distance(
    bent: Float[Tensor, "layers tokens dim"],
    base: Float[Tensor, "layers tokens dim"],
    *,
    max_distance: float | None = None,
    directional: bool = False,
    relative: bool = False,
) -> Float[Tensor, ""]:
    """Mean L2 distance per token and layer, in float32; with a hinge, counted up to a multiple of the base norm.

    ``directional``: the bent states are first brought to the norm of the base's. ``relative``: as a share of it.
    """
    bent, base = bent.float(), base.float()
    norms = torch.linalg.vector_norm(base, dim=-1)
    if directional:
        bent = torch.nn.functional.normalize(bent, dim=-1) * norms[..., None]
    lengths = torch.linalg.vector_norm(bent - base, dim=-1)
    if max_distance is not None:
        lengths = torch.minimum(lengths, max_distance * norms)
    return (lengths / norms.clamp(min=1e-12) if relative else lengths).mean()


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


def remembered(
    queue: Float[Tensor, "layers before dim"] | None, new: Float[Tensor, "layers rows dim"], length: int
) -> Float[Tensor, "layers kept dim"] | None:
    """A_u for the next step: the newest ``length`` rows, without gradients; None where nothing is kept."""
    if not length:
        return None
    rows = new.detach() if queue is None else torch.cat([queue, new.detach()], dim=1)
    return rows[:, -length:]


def kl_divergence(
    base_logits: Float[Tensor, "tokens vocab"],
    bent_logits: Float[Tensor, "tokens vocab"],
    temperature: float = 2.0,
    sequences: int | None = None,
) -> Float[Tensor, ""]:
    """tau^2 KL(base || bent) at temperature tau, in nats.

    Mean over tokens; with ``sequences``, the sum over tokens divided by that number.
    """
    p = (base_logits.float() / temperature).log_softmax(-1)
    q = (bent_logits.float() / temperature).log_softmax(-1)
    mean = temperature**2 * torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    return mean if sequences is None else mean * (len(p) / sequences)
