"""Configuration of RepBend (arXiv 2504.01550, Algorithm 1), with the paper's coefficients.

    L = 1/2 ||v_s||_2  -  alpha ||v_u||_2  -  beta cos_sim(A_u)  +  gamma KL(M || M')

v_s and v_u are the differences between bent and base activations on safe and unsafe answers, A_u the bent activations
of unsafe prompts. Norms are per token and not squared, as in the authors' code, which calls the coefficients alpha
(our 1/2), beta (alpha), gamma (beta) and epsilon (gamma), and adds eta times a fifth term, off by default. Every
distance is a mean over layers and tokens, the cosine one over layers and pairs.

**Start.** With LoRA-B = 0 bent and base are equal, and the gradients of all distances and of the KL are zero. Only the
cosine and the pairing term have a gradient, so beta > 0 decides the first step. With beta = eta = 0 the first
step follows rounding noise; ``TrainConfig.perturbation`` avoids that.

**Fidelity.** Algorithm 1 leaves choices open; the paper's text and the authors' code choose differently. ``Scope`` has
a field for each, ``BendConfig.fidelity`` names a set of them.

| choice (field of ``Scope``) | replib | official code | paper |
|---|---|---|---|
| states: block outputs, or ``hidden_states`` with the final norm | outputs | hidden states | outputs |
| default target blocks end at (``until``) | 95 % | 95 % | 100 % |
| blocks with LoRA (``adapted``) | all | to one above the targets | all |
| retained dialogues in the safe term (``retained``) | yes | no | yes |
| end-of-sequence token after answers (``ended``) | yes | no | no |
| A_u (``gathered``, ``queue``) | unsafe rows | unsafe rows | all harmful rows, 64 earlier ones |
| rows and tokens of the KL (``kl_rows``, ``kl_tokens``) | retained, answers | retained, all | all safe rows, all |
| mean of the KL over (``kl_reduction``) | tokens | sequences | sequences |
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from replib.core.errors import ReplibError, check_choice, check_coefficients
from replib.training.config import TrainConfig


@dataclass(frozen=True)
class Scope:
    """Rows, tokens, layers and averages of the terms; defaults are replib's own."""

    hidden_states: bool = False
    """Whether layers are transformers' ``hidden_states``: the last one follows the final norm, and the constant
    embeddings count as a layer in the mean of the safe term. At the site resid_post only."""
    until: float = 0.95
    """Relative depth at which default target blocks end; they begin at 0.6."""
    adapted: str = "all"
    """Blocks with LoRA: "all", or "target": from the first to the one after the last target block."""
    retained: bool = True
    """Whether the safe term covers retained dialogues, besides refusals and ``BendData.safe``."""
    ended: bool = True
    """Whether answers end with an end-of-sequence token."""
    gathered: str = "unsafe"
    """Rows of A_u: "unsafe", or "harmful": refused prompts too. Each prompt of a batch counts once."""
    queue: int = 0
    """Rows of earlier steps in A_u, as constants; 0 compares within the micro-batch.

    In Algorithm 1 A_u grows without limit; here the oldest rows are dropped."""
    kl_rows: str = "retain"
    """Rows of the KL: "retain", or "safe": all of p_s, refusals too, as in Algorithm 1."""
    kl_tokens: str = "answers"
    """Predicted tokens of the KL: "answers", or "all" (user turns too)."""
    kl_reduction: str = "token"
    """"token": mean over tokens. "sequence": sum over tokens divided by sequences, some 10^2 to 10^3 times as much."""

    def __post_init__(self) -> None:
        check_choice("adapted", self.adapted, ("all", "target"))
        check_choice("gathered", self.gathered, ("unsafe", "harmful"))
        check_choice("kl_rows", self.kl_rows, ("retain", "safe"))
        check_choice("kl_tokens", self.kl_tokens, ("answers", "all"))
        check_choice("kl_reduction", self.kl_reduction, ("token", "sequence"))
        if self.queue < 0 or not 0.6 < self.until <= 1:
            raise ReplibError(f"queue={self.queue}, until={self.until}: give queue=0 or more, and until above 0.6 and "
                              "at most 1.")  # fmt: skip


_REPLIB = Scope()
OFFICIAL = Scope(
    hidden_states=True, adapted="target", retained=False, ended=False, kl_tokens="all", kl_reduction="sequence"
)
_PAPER = Scope(
    until=1.0, ended=False, gathered="harmful", queue=64, kl_rows="safe", kl_tokens="all", kl_reduction="sequence"
)
FIDELITIES = {"replib": _REPLIB, "official": OFFICIAL, "paper": _PAPER}
LOSS_MODES = ("request_last", "request_all", "request_response", "response_all", "response_one", "response_R")
_BEND_SITES = ("resid_post", "resid_mid", "attn_in", "mlp_in")
PAIRED = 20  # most tokens of response_R and of the pairing term


@dataclass(frozen=True)
class BendConfig:
    """Coefficients as in the paper, and the states of each term. Safeguards are off by default."""

    alpha: float = 0.5
    """Weight of the maximised distance of unsafe answers from the base."""
    beta: float = 0.1
    """Weight of the cosine term that gathers unsafe prompts; it also breaks the stationary start of LoRA."""
    gamma: float = 0.3
    """Weight of the KL divergence to the base model on retained dialogues."""
    eta: float = 0.0
    """Weight of the pairing term, which is not in the paper: bent states of an unsafe answer are drawn to the base's
    states of the refusal of the same prompt."""
    temperature: float = 2.0
    """Temperature τ of the KL term, which is multiplied by τ²."""
    schedule: str = "constant"
    """"constant", or "ramps" as in Circuit Breakers: p goes from 0 to 1/2 during training, the safe term and the KL are
    multiplied by p, the others by 1 - p."""
    target_layers: tuple[int, ...] = ()
    """Blocks of the unsafe and the cosine term; () is a share of the depth (60-95 %, see ``Scope.until``)."""
    fidelity: str = "replib"
    """Set of choices: "replib", "official" or "paper"; see the table above."""
    custom: Scope | None = None
    """Scope in place of that of ``fidelity``."""
    loss_mode: str = "response_all"
    """Tokens of both distances. request_last: the last token of the prompt; request_all: the prompt with its template;
    request_response: everything; response_all: the answer; response_one: its first token; response_R: its first R
    tokens, R the length of the shortest answer in the batch and 20 at most.

    Repaired: the official request_last covers half of the unsafe batch only (here all of it), and the official
    response_R reads R before it is set, as a minimum over all steps so far (here of the batch itself)."""
    alpha_mode: str = "all"
    """Layers of the safe term: "all", or "target"."""
    site: str = "resid_post"
    """Place in a block: resid_post (its output), resid_mid (after attention), attn_in or mlp_in (after the norm before
    attention or MLP). The paper found little difference."""
    max_distance: float | None = None
    """Hinge: unsafe distances beyond this, as a multiple of the base model's norm, have no gradient.

    Without it the objective has no lower bound."""
    relative: bool = False
    """Whether distances are divided by the base model's norm, so that late layers count no more than early ones."""
    directional: bool = False
    """Whether unsafe states are scaled to the base's norm before the distance.

    The next block's RMSNorm removes the norm, so growth alone changes no answer."""
    decision: bool = False
    """Whether distances also cover the last prompt token, which predicts the first token of the answer."""
    anchored: bool = False
    """Whether unsafe prompts are gathered on the refused ones; False is the paper's cosine between all of them.

    Cosines are then about the base model's mean of both groups, and refused prompts enter as constants. Without the
    centre all cosines start near 0.9; without the anchor refusals may be gathered on compliance.
    """

    def __post_init__(self) -> None:
        check_coefficients(
            alpha=self.alpha, beta=self.beta, gamma=self.gamma, eta=self.eta, temperature=self.temperature
        )
        check_choice("fidelity", self.fidelity, FIDELITIES)
        check_choice("schedule", self.schedule, ("constant", "ramps"))
        check_choice("loss_mode", self.loss_mode, LOSS_MODES)
        check_choice("alpha_mode", self.alpha_mode, ("all", "target"))
        check_choice("site", self.site, _BEND_SITES)
        if self.anchored and self.scope.gathered == "harmful":
            raise ReplibError(
                "anchored gathers unsafe prompts on refused ones; it needs a scope with gathered='unsafe'."
            )

    @property
    def scope(self) -> Scope:
        """Rows, tokens, layers and averages: ``custom``, or the scope of ``fidelity``."""
        return self.custom or FIDELITIES[self.fidelity]

    @property
    def escapes(self) -> bool:
        """Whether a term has a gradient at LoRA's start."""
        return bool(self.beta or self.eta)

    def layers(self, depth: int) -> tuple[int, ...]:
        """Target blocks of a model with ``depth`` blocks."""
        layers = self.target_layers or tuple(range(round(0.6 * depth), round(self.scope.until * depth)))
        if bad := [i for i in layers if not 0 <= i < depth]:
            raise ReplibError(f"Target layer {bad[0]} is outside the model's blocks 0 to {depth - 1}.")
        return layers


def announced(bend: BendConfig, config: TrainConfig, depth: int) -> str:
    """Summary of target blocks, and of safeguards beyond the paper."""
    layers = bend.layers(depth)
    chosen = "as given" if bend.target_layers else f"by relative depth, 60 to {bend.scope.until:.0%}"
    guards = [
        name if value is True else f"{name} {value:g}"
        for name, value in {"max_distance": bend.max_distance, "relative": bend.relative,
                            "directional": bend.directional, "max_grad_norm": config.max_grad_norm,
                            "max_growth": config.max_growth, "patience": config.patience}.items()
        if value
    ]  # fmt: skip
    fidelity = "a scope of its own" if bend.custom else f"{bend.fidelity} fidelity"
    return (f"RepBend ({fidelity}) bends blocks {', '.join(map(str, layers))} of {depth} ({chosen}). "
            f"Safeguards: {', '.join(guards) or 'none'}.")  # fmt: skip


def warn_of_the_start(bend: BendConfig, config: TrainConfig) -> None:
    """Warn if no term has a gradient at LoRA's start; see ``replib.defences.repbend.config``."""
    if not bend.escapes and not config.perturbation:
        warnings.warn(
            "beta and eta are 0: at LoRA's start no term has a gradient, so the first step follows rounding noise and "
            "differs between machines. Set beta above 0, or TrainConfig(perturbation=1e-3).",
            stacklevel=3,
        )
