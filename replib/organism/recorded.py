"""Recorded measurements: JSON files beside the organism, each named after the program that writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from replib.core.errors import ReplibError
from replib.core.settings import data_dir


@runtime_checkable
class RecordedResult(Protocol):
    """Reader of the file that one experiment writes."""

    @classmethod
    def load(cls, path: Path | None = None) -> Any:
        """Read the file, by default that of ``data/organism``; raises ReplibError as ``read_recorded``."""


def recorded_file(program: str) -> Path:
    """Path that ``python -m replib.experiments.<program> --pack`` writes to."""
    return data_dir() / "organism" / f"{program}.json"


def read_recorded(program: str, path: Path | None = None) -> dict[str, Any]:
    """Contents of the file that an experiment wrote, at its usual place or at ``path``.

    Raises:
        ReplibError: the file does not exist.
    """
    path = path or recorded_file(program)
    if not path.exists():
        raise ReplibError(
            f"{path} does not exist: run python -m replib.experiments.{program}, then the same with --pack."
        )
    return json.loads(path.read_text(encoding="utf-8"))
