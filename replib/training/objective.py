"""Interface of a defence to the trainer: lists that it draws, weights that it adapts, and its loss in parts.

The loss is the sum of its parts. The trainer takes the gradient of each part before the next is computed, so memory
holds one part at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from replib.models.chat_model import ChatModel, evaluating
from replib.training.config import TrainConfig


class Part(NamedTuple):
    """A share of the loss of one micro-batch."""

    loss: Tensor
    """A scalar with a gradient, weighted; the loss is the sum over all parts."""
    terms: dict[str, Tensor]
    """Logged terms, unweighted; terms of one name are summed over parts."""


@dataclass(frozen=True)
class Lora:
    """Blocks and linear layers that carry an adapter."""

    blocks: tuple[int, ...] | None = None
    """Indices of blocks; None takes all."""
    modules: tuple[str, ...] | None = None
    """Names of linear layers as they end in the block, for example ("down_proj",); None takes all."""


class Objective(ABC):
    """A defence as the trainer sees it. Subclasses are dataclasses; their fields are the hyper-parameters."""

    name: ClassVar[str]

    @abstractmethod
    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Items a micro-batch, by name of the list that they are drawn from."""

    @abstractmethod
    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Loss of one micro-batch, part by part.

        Args:
            chat: model in training; ``reference(chat)`` is its base.
            items: drawn items, by name of their list.
            progress: finished share of training, from 0 to 1.
        """

    def check(self, chat: ChatModel, data: Any) -> None:  # noqa: B027 - optional
        """Raise ReplibError where model or data lack what the loss needs; called before anything is attached."""

    def lora(self, depth: int) -> Lora:
        """Adapted weights of a model with ``depth`` blocks; by default every linear layer."""
        del depth
        return Lora()

    def lowest(self, depth: int) -> int:
        """Lowest block whose output the loss changes; adapters must begin there or below."""
        return depth - 1

    def announced(self, config: TrainConfig, depth: int) -> str:
        """Summary for the user before the first step."""
        del config, depth
        return f"{self.name}."

    def about(self, depth: int) -> dict[str, Any]:
        """Hyper-parameters as plain values, for the card of the adapter."""
        del depth
        return asdict(self)  # type: ignore[call-overload]

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - optional
        """Restore the result of ``state``; an empty mapping resets."""


@contextmanager
def reference(chat: ChatModel) -> Iterator[ChatModel]:
    """Base model of the training: adapter off, or the frozen copy; no gradients, no dropout."""
    if chat.frozen is not None:
        with torch.no_grad():
            yield chat.frozen
        return
    with torch.no_grad(), chat.adapter_off(), evaluating(chat.model):
        yield chat
