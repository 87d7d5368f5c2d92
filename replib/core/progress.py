"""One progress bar for everything that takes more than two seconds; silent in headless runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

from replib.core.distributed import is_first

_Item = TypeVar("_Item")


def watched() -> bool:
    """Whether somebody looks on, in a terminal or a live Jupyter session; of several processes at the first alone."""
    if not is_first():
        return False
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ  # Jupyter servers name live sessions


def progress(items: Iterable[_Item], title: str, *, total: int | None = None) -> Iterable[_Item]:
    """Iterate with a bar in a terminal or a live notebook; without one when executed headless."""
    return tqdm(items, desc=title, total=total, disable=not watched(), delay=2, leave=False)


def say(text: str) -> None:
    """One line to whoever looks on, above any bar that runs; signs that the terminal cannot show become "?"."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(text.encode(encoding, "replace").decode(encoding))
