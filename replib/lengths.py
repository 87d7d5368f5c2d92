"""Dialogues no longer than a training row may be: answers lose their end, prompts the end of their instruction.

The chat template stays whole: a prompt that were cut as tokens would lose the words that open the answer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from replib.core.errors import ReplibError
from replib.data.prompts import Contrast, Dialogue
from replib.models.chat_model import ChatModel

T = TypeVar("T", Contrast, Dialogue)
ANSWERS = {Contrast: ("safe_response", "unsafe_response"), Dialogue: ("response",)}


@dataclass(frozen=True)
class Lengths:
    """Tokens at most, of the instruction and of the answer."""

    request: int = 512
    response: int = 512

    def __post_init__(self) -> None:
        if min(self.request, self.response) < 1:
            raise ReplibError(f"{self}: no token of a prompt or of an answer would be left; allow one at least.")

    def cut(self, chat: ChatModel, lists: Mapping[str, Sequence[T]]) -> dict[str, list[T]]:
        """The same lists within these lengths, with a warning that counts what was cut."""
        found = {name: [self._fitted(chat, row) for row in rows] for name, rows in lists.items()}
        changed = sum(a != b for name in lists for a, b in zip(lists[name], found[name], strict=True))
        if changed:
            warnings.warn(
                f"{changed} of {sum(map(len, lists.values()))} dialogues were longer than {self.request} tokens of "
                f"prompt or {self.response} of answer: they lost their end.",
                stacklevel=3,
            )
        return found

    def _fitted(self, chat: ChatModel, row: T) -> T:
        if type(row) not in ANSWERS:  # one with a label for each token of its answer
            return row
        limits = {"prompt": self.request} | dict.fromkeys(ANSWERS[type(row)], self.response)
        return replace(row, **{name: shortened(chat, getattr(row, name), n) for name, n in limits.items()})


def shortened(chat: ChatModel, text: str, tokens: int) -> str:
    """The beginning of a text that has so many tokens at most; the text itself where it is short enough."""
    if len(text) <= tokens:  # a token is a character at least
        return text
    while len(places := _places(chat, text)) > tokens:  # at a new end the tokens may be others
        text = text[: places[tokens][0]]  # the beginning, since a token may be part of a character
    return text


def _places(chat: ChatModel, text: str) -> list[tuple[int, int]]:
    """Where each token of a text begins and ends, in characters."""
    return chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
