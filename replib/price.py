"""What a capture to a folder will cost, said before it starts: prompts, tokens, bytes on disk, shards still to make."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replib.activations import kept, parted, windows
from replib.core.errors import ReplibError
from replib.models.chat_model import ChatModel
from replib.models.tokens import Row
from replib.reader import Request
from replib.shards import SHARD


@dataclass(frozen=True)
class Price:
    """The size of a capture, and how much of it is done."""

    prompts: int
    tokens: int
    """That are read: prompts and given responses."""
    written: int
    """That the model writes itself, at most."""
    size: int
    """Bytes of all its tensors; with single tokens of written answers at most that."""
    missing: int
    """Bytes of those that are not on disk yet."""
    shards: int
    there: int

    def __str__(self) -> str:
        written = f" + at most {self.written:,} written" if self.written else ""
        size = f"{'at most ' if self.written else ''}{self.size / 1e9:.3g} GB on disk"
        shards = f"{self.shards} shard{'' if self.shards == 1 else 's'}, {self.there} of them there already"
        return f"{self.prompts:,} prompts, {self.tokens:,} tokens{written}, {size} in {shards}"


def price(model: ChatModel, prompts: Sequence[str], folder: Path | str, *, shard: int = SHARD, **options: Any) -> Price:
    """The price of ``capture_to`` with the same arguments. It tokenises every prompt and runs none.

    Raises:
        ReplibError: as ``capture_to``, for what can be known beforehand: a prompt that is too long, a folder that holds
            another capture; or the disk has less room than that.
    """
    ask, how = parted(model, options)
    there = kept(model, prompts, folder, shard=shard, **options)
    tokens, sizes = 0, []
    for texts, answers in windows(prompts, how.responses, shard):
        rows = model.tokenize(texts, answers, system=ask.system, overflow=ask.overflow)
        tokens += sum(map(len, rows))
        sizes.append(_bytes(rows, ask, model.d_model))
    missing = sum(size for size, done in zip(sizes, there, strict=True) if not done)
    _check_room(Path(folder), missing)
    written = ask.max_new_tokens * len(prompts)
    return Price(len(prompts), tokens, written, sum(sizes), missing, len(there), sum(there))


def _bytes(rows: Sequence[Row], ask: Request, width: int) -> int:
    """Of the tensors of one shard; at most, where the model writes answers of a length it chooses itself."""
    vector = len(ask.keys) * width * ask.dtype.itemsize
    if ask.pool == "none":
        span = str(ask.positions[0])
        written = ask.max_new_tokens if span in ("response", "all") else 0
        return sum(len(row.span(span)) + written for row in rows) * (vector + 8)  # and the number of its prompt
    return len(rows) * len(ask.positions) * vector


def _check_room(folder: Path, missing: int) -> None:
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise ReplibError(
            f"{missing / 1e9:.3g} GB are still to be written, but {existing} has room for {free / 1e9:.3g} GB: "
            "capture fewer layers, positions or prompts, store bfloat16, or choose another disk with REPLIB_OUT."
        )
