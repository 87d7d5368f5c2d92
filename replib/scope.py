"""What the published formulas leave open or say in two ways: on which rows, tokens, layers RepBend's terms are taken.

The paper (arXiv 2504.01550v3, Algorithm 1) and the code that made its checkpoints differ; so does what replib does on
its own. Each difference is one field of ``Scope``, and ``FIDELITIES`` names three sets of them:

| | replib | official | paper |
|---|---|---|---|
| layers | outputs of blocks | transformers' hidden states | outputs of blocks |
| target layers by default | 60-95 % of the depth | 60-95 %, hidden states 20 to 30 of 32 | 60 % to the last |
| LoRA | every block | up to the one after the last target | every block |
| v_s on retained dialogues | yes | no | yes |
| answers end with the end-of-sequence token | yes | no | no |
| A_u | unsafe rows of the batch | unsafe rows of the micro-batch | harmful prompts, a queue across steps |
| KL on | retained answers | retained dialogues, every token | all of p_s, every token |
| KL reduced to | mean over tokens | sum over tokens per sequence | sum over tokens per sequence |

Where the paper is silent, "paper" follows the code: unsquared norms per token, mean over layers and tokens, response
tokens, last prompt token for the cosine. What no fidelity repeats: padding to 512 + 512 tokens and cutting longer
requests there (which loses the tokens before the answer), and positions counted from the padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from replib.core.errors import ReplibError, check_choice


@dataclass(frozen=True)
class Scope:
    """Where terms are taken and how they are averaged; the defaults are replib's own."""

    hidden_states: bool = False
    """Whether layers are transformers' ``hidden_states``: the last one is behind the final norm, and the embeddings,
    which no adapter moves, count as one more layer in the mean of the safe term. At the site resid_post only."""
    until: float = 0.95
    """Share of the depth at which target blocks end where none are given; they begin at 60 %."""
    adapted: str = "all"
    """Blocks with LoRA: "all", or "target": from the first to the one after the last target block."""
    retained: bool = True
    """Whether the safe term covers retained dialogues, besides refusals and ``BendData.safe``."""
    ended: bool = True
    """Whether answers are read with an end-of-sequence token."""
    gathered: str = "unsafe"
    """Rows of A_u: "unsafe", or "harmful": refused prompts too. Each prompt of a batch counts once."""
    queue: int = 0
    """Rows of earlier steps that stay in A_u, as constants; 0 compares within the (micro-)batch alone.

    Algorithm 1 writes A_u as a set that grows for ever; here the oldest rows leave."""
    kl_rows: str = "retain"
    """Rows of the KL: "retain", or "safe": all of p_s, refusals too, as Algorithm 1 has it."""
    kl_tokens: str = "answers"
    """Next tokens that the KL predicts: those of "answers", or "all" (user turns too)."""
    kl_reduction: str = "token"
    """"token": mean over tokens. "sequence": sum over tokens divided by sequences, some 10^2 to 10^3 times as much."""

    def __post_init__(self) -> None:
        check_choice("adapted", self.adapted, ("all", "target"))
        check_choice("gathered", self.gathered, ("unsafe", "harmful"))
        check_choice("kl_rows", self.kl_rows, ("retain", "safe"))
        check_choice("kl_tokens", self.kl_tokens, ("answers", "all"))
        check_choice("kl_reduction", self.kl_reduction, ("token", "sequence"))
        if self.queue < 0 or not 0.6 < self.until <= 1:
            raise ReplibError(f"queue={self.queue}, until={self.until}: the queue holds no less than 0 rows, and "
                              "target blocks end after 60 % of the depth, at 1 at most.")  # fmt: skip


REPLIB = Scope()
OFFICIAL = Scope(
    hidden_states=True, adapted="target", retained=False, ended=False, kl_tokens="all", kl_reduction="sequence"
)
PAPER = Scope(
    until=1.0, ended=False, gathered="harmful", queue=64, kl_rows="safe", kl_tokens="all", kl_reduction="sequence"
)
FIDELITIES = {"replib": REPLIB, "official": OFFICIAL, "paper": PAPER}
