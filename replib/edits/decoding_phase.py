"""Phase of a forward call: reading of prompts, or decoding of answers."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.models.chat_model import ChatModel


class DecodingPhase:
    """Tells, at one hook point, prompt reading from decoding."""

    def __init__(self, model: ChatModel, *, needed: bool = True):
        self.model, self.needed, self.met = model, needed, 0

    def answering(self, hidden: Float[Tensor, "rows tokens d"]) -> bool:
        """Whether every token of this call belongs to an answer.

        Raises ReplibError if that is unknown and ``needed``.
        """
        batch, tokens = self.model.reading, hidden.shape[1]
        if batch is None:
            if self.needed:
                raise ReplibError(
                    "Edits need to know where the prompt ends: call model.forward or model.generate (not model.model). "
                    "Only positions='all' does without."
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
