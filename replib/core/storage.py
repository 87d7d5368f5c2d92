"""Files that are never half written, and tables that are computed row by row and go on where they stopped."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from replib.core.errors import ReplibError

if TYPE_CHECKING:
    from torch import Tensor


def content_hash(records: Sequence[Any]) -> str:
    """First 16 hex digits of the SHA-256 of records (or plain texts) as canonical JSON; order counts."""
    plain = [r if isinstance(r, str) else asdict(r) for r in records]
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> Path:
    """Write a file under another name and rename it, so that no half-written file is ever seen."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ReplibError(f"Cannot write {path}: {error.strerror}. Set REPLIB_OUT to a folder you own.") from error
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> Path:
    """The same for tensors, as safetensors; ``about`` goes into the file's header."""
    from safetensors.torch import save_file

    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in tensors.items()}, partial, metadata=about)
        os.replace(partial, path)
    except OSError as error:
        raise ReplibError(f"Cannot write {path}: {error.strerror}. Choose a folder you own.") from error
    return path


def key_of(*facts: Any) -> str:
    """Sixteen hex digits of the SHA-256 of facts as canonical JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Rows:
    """Rows of a table in a JSON-lines file (or in memory), each found again by the facts that determine it."""

    def __init__(self, path: Path | str | None = None):
        self.path = Path(path) if path else None
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path and self.path.exists():
            complete = self.path.read_text(encoding="utf-8").rpartition("\n")[0]  # a killed run may end mid-line
            self.rows = {row["key"]: row for row in map(json.loads, complete.splitlines())}
            write_text(self.path, complete + "\n" if complete else "")

    def get(self, facts: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of these facts: the kept one, or a new one that is kept at once."""
        key = key_of(facts)
        if key not in self.rows:
            self.put(key, make())
        return self.rows[key]

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.rows[key]

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row, in the file too."""
        self.rows[key] = row | {"key": key}
        self._append(self.rows[key])

    def _append(self, row: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise ReplibError(
                f"Cannot write {self.path}: {error.strerror}. Set REPLIB_OUT to a folder you own."
            ) from error


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of all ``part-*.jsonl`` by key; the last line of a file that is being written does not count."""
    texts = [path.read_text(encoding="utf-8").rpartition("\n")[0] for path in sorted(folder.glob("part-*.jsonl"))]
    return {row["key"]: row for text in texts for row in map(json.loads, text.splitlines())}


def versions() -> dict[str, str]:
    """Library versions that a result carries."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
