"""Interface of a defence to the trainer: lists that it draws, weights that it adapts, and its loss in parts.

A loss is a sum, and its parts are yielded one after another: the trainer takes the gradient of each before the next
is made, so that memory holds one of them at a time.
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
    """Which weights of a model are adapted."""

    blocks: tuple[int, ...] | None = None
    """Indices of blocks; None takes all."""
    modules: tuple[str, ...] | None = None
    """Names of linear layers as they end in the block, for example ("down_proj",); None takes all."""


class Objective(ABC):
    """A defence as the trainer sees it. Subclasses are dataclasses; their fields are the hyper-parameters."""

    name: ClassVar[str]

    @abstractmethod
    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Names of the lists of the data that a micro-batch is drawn from, and how many of each."""

    @abstractmethod
    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """The loss of one micro-batch, part by part.

        Args:
            chat: the model in training; ``reference(chat)`` is the model it started from.
            items: what was drawn, by name.
            progress: share of training that is behind, from 0 to 1.
        """

    def check(self, chat: ChatModel, data: Any) -> None:  # noqa: B027 - most need nothing
        """Raise ReplibError where model or data lack what the loss needs; called before anything is attached."""

    def lora(self, depth: int) -> Lora:
        """What is adapted in a model of so many blocks: everything, unless the method says otherwise."""
        del depth
        return Lora()

    def lowest(self, depth: int) -> int:
        """The lowest block whose output the loss moves: adapters must begin there or below."""
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

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most keep nothing
        """Restore the result of ``state``; an empty mapping resets."""


@contextmanager
def reference(chat: ChatModel) -> Iterator[ChatModel]:
    """The model that training started from: adapter off, or the frozen copy; no gradients, no dropout."""
    if chat.frozen is not None:
        with torch.no_grad():
            yield chat.frozen
        return
    with torch.no_grad(), chat.adapter_off(), evaluating(chat.model):
        yield chat
