"""Local files as tables of text, with an error that says what to do for every way a file can be bad."""

import difflib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from replib.core.errors import ReplibError

LISTS = (list, tuple, np.ndarray)  # Parquet gives arrays where JSON gives lists


def read_table(path: str | Path) -> pd.DataFrame:
    """A CSV, TSV, JSON, JSONL, Parquet or TXT file as a table; UTF-8 with or without BOM, any line ends.

    Lists of texts and TXT files (a line a text) have the one column ``text``.

    Raises:
        ReplibError: missing, empty, a folder, a Git-LFS pointer, of unknown suffix, or malformed.
    """
    path = Path(path)
    _check_file(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ReplibError(f"{path}: cannot read {path.suffix or 'a file with no suffix'}; use {', '.join(READERS)}.")
    try:
        table = reader(path)
    except ReplibError:
        raise
    except pd.errors.ParserWarning as error:  # pandas would cut or shift such rows and go on
        raise ReplibError(f"{path}: some row has more cells than the header. Quote cells that hold commas.") from error
    except (ValueError, OSError) as error:
        raise ReplibError(f"{path} is not readable as {path.suffix}: {error}. Save it again as UTF-8.") from error
    if table.empty:
        raise ReplibError(f"{path} has no rows. Download or write it again.")
    return table.rename(columns=str)


def clean(cell: Any) -> str:
    """Any cell as text: missing is empty, lists are joined, line ends are one character."""
    if isinstance(cell, LISTS):
        return ", ".join(map(clean, cell))
    return "" if pd.isna(cell) is True else str(cell).replace("\r\n", "\n").strip()


def _check_file(path: Path) -> None:
    """Raise unless ``path`` is a file with content of its own."""
    if path.is_dir():
        raise ReplibError(f"{path} is a folder; name a file in it: {', '.join(_listing(path)) or '(it is empty)'}.")
    if not path.exists():
        near = difflib.get_close_matches(path.name, _listing(path.parent), n=3, cutoff=0.5)
        hint = f"Did you mean {', '.join(near)}?" if near else "Check the path."
        where = "" if path.parent.is_dir() else f" (its folder {path.parent} does not exist either)"
        raise ReplibError(f"there is no file {path}{where}. {hint}")
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head.removeprefix(b"\xef\xbb\xbf").strip():
        raise ReplibError(f"{path} is empty. Download or write it again.")
    if head.startswith(b"version https://git-lfs"):
        raise ReplibError(f"{path} is a Git-LFS pointer, not the data. Run `git lfs pull` where it came from.")


def _listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _read_csv(path: Path, delimiter: str = ",") -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(path, sep=delimiter, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)


def _read_tsv(path: Path) -> pd.DataFrame:
    return _read_csv(path, "\t")


def _read_json(path: Path) -> pd.DataFrame:
    """A list of objects, a list of texts, or one object of texts by id."""
    data = json.loads(path.read_text("utf-8-sig"))
    if isinstance(data, dict) and all(isinstance(v, str) for v in data.values()):
        return pd.DataFrame({"id": list(data), "text": list(data.values())})
    if isinstance(data, list) and all(isinstance(v, str) for v in data):
        return pd.DataFrame({"text": data})
    if isinstance(data, list) and all(isinstance(v, dict) for v in data):
        return pd.DataFrame(data)
    raise ReplibError(f"{path} is neither a list of texts, nor a list of objects, nor one object of texts. Reshape it.")


def _read_jsonl(path: Path) -> pd.DataFrame:
    lines = enumerate(path.read_text("utf-8-sig").split("\n"), start=1)
    return pd.DataFrame([_object(path, number, line) for number, line in lines if line.strip()])


def _object(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ReplibError(f"{path}, line {number} is not JSON: {error}. Mend or remove the line.") from error
    if not isinstance(row, dict):
        raise ReplibError(f"{path}, line {number} is not an object with named fields. Mend or remove the line.")
    return row


def _read_txt(path: Path) -> pd.DataFrame:
    return pd.DataFrame({"text": [line for line in path.read_text("utf-8-sig").split("\n") if line.strip()]})


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": pd.read_parquet,
    ".txt": _read_txt,
}
