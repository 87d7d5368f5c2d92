"""Kinds of option values: lists with commas, positions, words, whole numbers, assignments."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args

from cyclopts import Parameter, Token

from replib.core.settings import PREFIX, Settings

Given = Annotated[Settings, Parameter(parse=False)]
"""Settings that the launcher hands to a command; no option."""


def listed(values: str, example: str, read: Callable[[str], Any] = str) -> Parameter:
    """A list with commas between its members."""

    def convert(_: Any, tokens: Sequence[Token]) -> list:
        text = tokens[-1].value
        try:
            return [read(part) for part in _parts(text)]
        except ValueError:
            raise ValueError(f"{text!r} is not a list of {values}: write for example {example}.") from None

    return Parameter(converter=convert, n_tokens=1, allow_leading_hyphen=True, metavar=example)


def _at_least(least: int) -> Callable[[str], int]:
    """Reader of a whole number with a lower bound."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"{text!r} is not a whole number of {least} or more.")
        return int(text)

    return read


def whole_number(least: int) -> Parameter:
    """A whole number with a lower bound."""
    read = _at_least(least)
    return Parameter(converter=lambda _, tokens: read(tokens[-1].value), allow_leading_hyphen=True)


def _word(kind: Any, tokens: Sequence[Token]) -> str:
    if (text := tokens[-1].value) not in get_args(kind):
        raise ValueError(f"{text!r} is unknown: write {' or '.join(get_args(kind))}.")
    return text


def _positions(_: Any, tokens: Sequence[Token]) -> str | int | list[str | int]:
    text = tokens[-1].value
    try:
        positions = [_position(part) for part in _parts(text)]
    except ValueError:
        raise ValueError(f"{text!r} is not a position: write for example last_prompt,-2.") from None
    return positions[0] if len(positions) == 1 else positions


def _assignments(_: Any, tokens: Sequence[Token]) -> list[tuple[str, str]]:
    pairs = [token.value.partition("=") for token in tokens]
    for name, equals, value in pairs:
        if not (name and equals):
            raise ValueError(f"{name + equals + value!r} is not NAME=VALUE, as in MODEL=planted.")
    return [(PREFIX + name.upper().removeprefix(PREFIX), value) for name, _, value in pairs]


def _position(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _parts(text: str) -> list[str]:
    """Members of a list; ValueError where one is empty."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(text)
    return parts


WORD = Parameter(converter=_word)
EDIT_POSITIONS = Parameter(converter=_positions, n_tokens=1, allow_leading_hyphen=True, metavar="last_prompt,-2")
ASSIGNMENTS = Parameter(name="--set", converter=_assignments, n_tokens=1, metavar="NAME=VALUE")
LAYERS = listed("whole numbers", "0,5,-1", int)
SITE_NAMES = listed("site names", "resid_mid,mlp_out")
FILES = listed("files by name", "breakers=circuit_breakers_train.json")
METHOD_NAMES = listed("methods", "pca_ot,rfa")
RANKS = listed("whole numbers", "1,2,8", _at_least(1))
EDIT_AT = listed("edited positions", "last_prompt,all")
FIT_AT = listed("positions", "last_prompt,-2", _position)
STRENGTH_LIST = listed("numbers", "0.25,0.5,1", float)
