"""Edits under a condition: a linear score of the stream says which prompts, or which tokens, are edited at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.models.chat_model import ChatModel
from replib.transport.affine import Origin
from replib.transport.gaussians import sample_pair

PER = ("prompt", "token")


@dataclass(frozen=True)
class Gate:
    """Open where ``w^T x > threshold``, x being the stream at a site; edits act only there.

    As in conditional steering (CAST, arXiv 2409.05907), whose condition is read once, from the prompt,
    while behaviour is steered at later blocks. Ours is linear in x, not a cosine, so that LDA gives its best form.
    """

    w: Float[Tensor, " d"]
    threshold: float
    layer: int
    site: str = "resid_post"
    per: str = "prompt"
    """``prompt``: decided at the last prompt token, and kept while the answer is written; ``token``: by each token."""
    origin: Origin | None = None
    """Where it may be read; None where that is left to the caller."""

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise ReplibError(f"Unknown gate per={self.per!r}: use one of {', '.join(PER)}.")

    @property
    def key(self) -> tuple[str, int]:
        """Where it is read."""
        return self.site, self.layer

    @classmethod
    def fit(
        cls, harmful: Float[Tensor, "n d"], harmless: Float[Tensor, "m d"], layer: int, *, ridge: float = 1.0
    ) -> Gate:
        """Linear discriminant that is open for the harmful: ``w = (S + l I)^-1 gap``, threshold half-way.

        ``S`` is the covariance within classes, ``l`` is ``ridge`` times its mean variance per coordinate; solved in
        the span of the samples. Large ridges give the nearest mean.

        Raises ReplibError for unusable samples, or two classes with one mean.
        """
        x, y = sample_pair(harmful, harmless)
        gap, middle = x.mean(0) - y.mean(0), (x.mean(0) + y.mean(0)) / 2
        if not gap.any():
            raise ReplibError("The classes have one mean, so no linear gate tells them apart: gate another layer.")
        rows = torch.cat([x - x.mean(0), y - y.mean(0)])
        _, spread, axes = torch.linalg.svd(rows, full_matrices=False)
        variance = spread.square() / max(len(rows) - 2, 1)
        least = ridge * variance.sum() / rows.shape[1]
        if not least > 0:
            return cls(gap.float(), float(gap @ middle), layer)
        inside = axes @ gap
        # (S + l I)^-1 = I/l + V (1/(s + l) - 1/l) V^T, without a d x d matrix.
        w = least * (gap / least + axes.mT @ (inside / (variance + least) - inside / least))
        return cls(w.float(), float(w @ middle), layer)

    def bound(self, origin: Origin | None) -> Gate:
        """The same gate for one place; None frees it."""
        return replace(self, origin=origin)

    def scores(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """How far above the threshold, in float32."""
        return x.float() @ self.w.to(x.device, torch.float32) - self.threshold


class DecodingPhase:
    """Tells at a site whether a call reads prompts, or the tokens of an answer that is being written."""

    def __init__(self, model: ChatModel, *, needed: bool = True):
        self.model, self.needed, self.met = model, needed, 0

    def answering(self, hidden: Float[Tensor, "rows tokens d"]) -> bool:
        """Whether every token of this call is of the answer.

        Raises ReplibError where that cannot be known and is ``needed``.
        """
        batch, tokens = self.model.reading, hidden.shape[1]
        if batch is None:
            if self.needed:
                raise ReplibError(
                    "Edits need to know where the prompt ends: call model.forward or model.generate (not model.model). "
                    "Only positions='all', without a gate or with one per token, does without."
                )
            return False
        if tokens == batch.input_ids.shape[1] and self.met != self.model.readings:
            self.met = self.model.readings if tokens == 1 else 0
            return False
        if tokens not in (1, batch.input_ids.shape[1]) and self.needed:
            raise ReplibError(
                f"{tokens} tokens of prompts of {batch.input_ids.shape[1]} were read by themselves: edits need them "
                "at once (no chunked prefill, no assisted generation), or positions='all'."
            )
        return tokens != batch.input_ids.shape[1] or tokens == 1


class GateHook:
    """A gate at work: read at its site, asked by the edits that follow."""

    def __init__(self, model: ChatModel, gate: Gate):
        self.gate, self.phase = gate, DecodingPhase(model, needed=gate.per == "prompt")
        self.opened: Bool[Tensor, "rows tokens"] = torch.zeros(0, 1, dtype=torch.bool)

    def __call__(self, hidden: Float[Tensor, "rows tokens d"]) -> None:
        """Read the gate; what was decided of a prompt is kept for its answer."""
        if self.gate.per == "token":
            self.opened = self.gate.scores(hidden) > 0
        elif not self.phase.answering(hidden):
            self.opened = (self.gate.scores(self._last(hidden)) > 0)[:, None]

    def _last(self, hidden: Tensor) -> Tensor:
        batch = self.phase.model.reading
        assert batch is not None  # `answering` has just looked at it
        column = batch.last_prompt.to(hidden.device).repeat_interleave(len(hidden) // len(batch.last_prompt))
        return hidden[torch.arange(len(hidden), device=hidden.device), column]
