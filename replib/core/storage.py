"""Atomic writes of files and folders, hashes of contents, and a table of computed rows that resumes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from replib.core.errors import ReplibError

if TYPE_CHECKING:
    from torch import Tensor


def content_hash(records: Sequence[Any]) -> str:
    """First 16 hex digits of the SHA-256 of records (or plain texts) as compact JSON in UTF-8; order counts."""
    plain = [r if isinstance(r, str) else asdict(r) for r in records]
    return _hash(plain, ensure_ascii=False, separators=(",", ":"))


def key_of(*facts: Any) -> str:
    """First 16 hex digits of the SHA-256 of facts as ASCII JSON; an object that JSON lacks counts by its text."""
    return _hash(facts, default=str)


def _hash(value: Any, **form: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, **form).encode()).hexdigest()[:16]


@contextmanager
def replacing(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Yield a free path beside ``path``; rename the file or folder written there to ``path`` at the end.

    Readers never see a half-written file. An earlier file or folder is replaced.

    Args:
        path: the file or folder to write.
        concurrent: whether other processes may write it at the same time.

    Raises:
        ReplibError: it cannot be written.
    """
    writer = f".{os.getpid()}" if concurrent else ""
    partial = path.absolute().with_name(f"{path.name}{writer}.partial")
    with _writable(path):
        _remove(partial)
        try:
            yield partial
            if path.is_dir() and partial.is_dir():
                _remove(path)
            partial.replace(path)
        finally:
            _remove(partial)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Make the folder of a file; turn errors of the file system into one that names the file and the repair."""
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ReplibError(
            f"Cannot write {path}: {reason}. Choose a folder that you own, with room for it (REPLIB_OUT)."
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8 by ``replacing``."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> Path:
    """Write tensors as safetensors by ``replacing``; ``about`` goes into the file's header."""
    from safetensors.torch import save_file  # with it comes torch

    with replacing(path, concurrent=True) as partial:
        save_file({name: x.contiguous() for name, x in tensors.items()}, partial, metadata=about)
        partial.chmod(0o644)  # safetensors makes files that only their owner can read
    return path


class Rows:
    """Rows of a table in a JSON-lines file (or in memory), each under the hash of the facts that determine it."""

    def __init__(self, path: Path | str | None = None):
        self.path = Path(path) if path else None
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path and self.path.exists():
            complete = self.path.read_text(encoding="utf-8").rpartition("\n")[0]  # a killed run may end mid-line
            self.rows = {row["key"]: row for row in map(json.loads, complete.splitlines())}
            write_text(self.path, complete + "\n" if complete else "")

    def get(self, facts: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the stored row of these facts, or make and store it."""
        key = key_of(facts)
        if key not in self.rows:
            self.put(key, make())
        return self.rows[key]

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.rows[key]

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Store a row, in the file too."""
        self.rows[key] = row | {"key": key}
        self._append(self.rows[key])

    def _append(self, row: dict[str, Any]) -> None:
        if self.path is None:
            return
        with _writable(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of all ``part-*.jsonl`` by key, without an unfinished last line."""
    texts = [path.read_text(encoding="utf-8").rpartition("\n")[0] for path in sorted(folder.glob("part-*.jsonl"))]
    return {row["key"]: row for text in texts for row in map(json.loads, text.splitlines())}


def versions() -> dict[str, str]:
    """Library versions that a result carries."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
