"""Measurements made beforehand: a JSON file each beside the organism, packed by the program of the same name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from replib.core.errors import ReplibError
from replib.core.settings import data_dir


class RecordedResult:
    """What one program measured."""

    program: ClassVar[str]
    """Of ``replib.organism``."""

    @classmethod
    def load(cls, path: Path | None = None) -> Any:
        """Read what it packed, by default where it writes; raises ReplibError as ``read_recorded``."""
        raise NotImplementedError(cls)


def recorded_file(program: str) -> Path:
    """Where ``python -m replib.organism.<program> --pack`` writes."""
    return data_dir() / "organism" / f"{program}.json"


def read_recorded(program: str, path: Path | None = None) -> dict[str, Any]:
    """What that program wrote, there or at ``path``.

    Raises ReplibError where there is no such file.
    """
    path = path or recorded_file(program)
    if not path.exists():
        raise ReplibError(
            f"There is no measurement {path}: run python -m replib.organism.{program} first, then the same with --pack."
        )
    return json.loads(path.read_text(encoding="utf-8"))
