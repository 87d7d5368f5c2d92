"""What the options of the command line may say; anything else is answered with what to write instead."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import Any

from replib.core.settings import PREFIX


def listed(what: str, example: str, kind: Callable[[str], Any] = str) -> Callable[[str], list]:
    """A list with commas between its members."""

    def read(text: str) -> list:
        try:
            return [kind(part) for part in _parts(text)]
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is no list of {what}: write for example {example}") from None

    return read


def positions(text: str) -> str | int | list[str | int]:
    """Names and integers with commas between them; a single one is no list."""
    try:
        found = [int(p) if re.fullmatch(r"-?\d+", p) else p for p in _parts(text)]
    except ValueError:
        raise ArgumentTypeError(f"{text!r} names no position: write for example last_prompt,-2") from None
    return found[0] if len(found) == 1 else found


def several_positions(text: str) -> list[str | int]:
    """The same, always a list."""
    found = positions(text)
    return found if isinstance(found, list) else [found]


def one_of(*choices: str) -> Callable[[str], str]:
    """One of a few words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ArgumentTypeError(f"{text!r} is not one of them: write {' or '.join(choices)}")
        return text

    return read


def at_least(least: int) -> Callable[[str], int]:
    """A whole number that is not too small."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return read


def assignment(text: str) -> tuple[str, str]:
    """NAME=VALUE as the variable and its value."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ArgumentTypeError(f"{text!r} is not NAME=VALUE, as in MODEL=planted")
    return PREFIX + name.upper().removeprefix(PREFIX), value


def joined(arguments: Sequence[str]) -> list[str]:
    """``--layers -1,5`` as ``--layers=-1,5``: argparse takes what begins with a minus for an option."""
    result: list[str] = []
    for text in arguments:
        if result and result[-1] in ("--layers", "--positions", "--fit-at") and re.match(r"-\d", text):
            result[-1] += "=" + text
        else:
            result.append(text)
    return result


def _parts(text: str) -> list[str]:
    """Raises ValueError where one is empty."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(text)
    return parts
