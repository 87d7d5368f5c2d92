"""Prompts and answers: the records of the suite, the files they are read from, and splits that share nothing.

Public sets are read from their own files, never shipped; ``data/<set>.md`` says where each one lives.
"""

import difflib
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pandas import DataFrame

from replib.core.errors import ReplibError
from replib.core.settings import data_dir
from replib.data.files import LISTS, clean, read_table
from replib.data.public import PUBLIC, PromptSetLayout

log = logging.getLogger(__name__)


R = TypeVar("R")
LABELS = ("harmful", "harmless", "borderline", "skill")
_TEXT_COLUMNS = ("text", "prompt", "instruction", "goal", "behavior", "question", "query", "forbidden_prompt")
_COMPLIANCE_OPENINGS = ("sure", "certainly", "of course", "absolutely", "here is", "here's", "here are")


@dataclass(frozen=True)
class Prompt:
    """One user's turn and what is known about it."""

    text: str
    label: str = ""
    """One of ``LABELS``, or empty where unknown."""
    expect: tuple[str, ...] = ()
    """Words that every exact answer contains; empty where no exact answer is known."""
    split: str = ""
    """``fit`` (trains or fits), ``val`` (chooses a step or a layer) or ``test`` (is reported)."""
    group: str = ""
    """What it is about: the artefact (organism) or the category (public sets)."""
    way: str = ""
    """How it asks: template, kind of question or skill."""
    target: str = ""
    """Opening words of compliance, for prefill and optimised attacks."""
    wrapper: str = ""
    """Jailbreak already applied to ``text``."""


@dataclass(frozen=True)
class Contrast:
    """One prompt with the answer to keep and the answer to move away from."""

    prompt: str
    safe_response: str
    unsafe_response: str
    split: str = ""
    group: str = ""
    way: str = ""
    wrapper: str = ""


@dataclass(frozen=True)
class Dialogue:
    """One prompt with one answer."""

    prompt: str
    response: str
    split: str = ""
    label: str = ""
    group: str = ""
    way: str = ""


def load_prompts(
    name: str | Path,
    path: str | Path | None = None,
    *,
    column: str | None = None,
    label: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Prompts of an organism set (``organism/harmful``), of a public set with its file, or of any local file.

    Outer blanks are removed and line ends unified; empty and repeated prompts are left out and counted in
    the log. ``label`` overrides the file's labels; ``limit`` draws that many at random, the same for the
    same seed.

    Raises:
        ReplibError: no such set, file or column; a file that is empty, unreadable or a Git-LFS pointer.
    """
    file, layout = _resolve(name, path)
    table = read_table(file)
    layout = _with_text_column(layout, table, file, column)
    rows = _swapped_back(table.to_dict("records"), layout, file)
    prompts = [_prompt(row, layout, file.stem) for row in rows if not clean(row.get(layout.without))]
    if label is not None:
        prompts = [replace(p, label=label) for p in prompts]
    return _select(_distinct(prompts, file), file, split=split, limit=limit, seed=seed)


def load_contrasts(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Contrast]:
    """Contrasts of ``organism/<set>`` or of a file; ``columns`` maps a field to the column that holds it.

    RepBend's own file: ``{"safe_response": "harmless_answer", "unsafe_response": "harmful_answer"}``.
    """
    return _load_records(Contrast, source, columns or {}, split=split, limit=limit, seed=seed)


def load_dialogues(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Dialogue]:
    """Dialogues of ``organism/<set>`` or of a file, read as contrasts are.

    GSM8K: ``columns={"prompt": "question", "response": "answer"}``.
    """
    return _load_records(Dialogue, source, columns or {}, split=split, limit=limit, seed=seed)


def _resolve(name: str | Path, path: str | Path | None) -> tuple[Path, PromptSetLayout | None]:
    """The file and its layout; a layout of ``None`` is to be found out from the columns."""
    key = str(name)
    if path is not None:
        if key not in PUBLIC:
            near = difflib.get_close_matches(key, PUBLIC, n=3)
            hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(PUBLIC)}."
            raise ReplibError(f"no public set is called {key!r}. {hint} For any other file: load_prompts(path).")
        return Path(path), PUBLIC[key]
    if key in PUBLIC and not Path(key).exists():
        raise ReplibError(f"{key} is not shipped: load_prompts({key!r}, path). data/README.md says where it lives.")
    return _source(name), None


def _source(name: str | Path) -> Path:
    """``organism/<set>`` -> its file under the data folder; anything else is a path."""
    prefix, _, rest = str(name).partition("/")
    if prefix == "organism" and not Path(name).exists():
        return data_dir() / "organism" / "prompts" / f"{rest}.jsonl"
    return Path(name)


def _with_text_column(
    layout: PromptSetLayout | None, table: DataFrame, file: Path, column: str | None
) -> PromptSetLayout:
    """The layout with one text column, which the table has; without a layout, columns named as in Prompt."""
    names = list(table.columns)
    own = {f.name: f.name for f in fields(Prompt) if f.name in names and f.name != "text"}
    layout = layout or PromptSetLayout((), own)
    found = _text_columns(names, layout, column)
    if len(found) == 1:
        return replace(layout, text=(found[0],))
    wanted = column or " or ".join(layout.text)
    problem = f"has no column {wanted!r}" if wanted else "has no single obvious prompt column"
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Name one with column=."
    raise ReplibError(f"{file} {problem}; its columns are {', '.join(names)}. {hint}")


def _text_columns(names: list[str], layout: PromptSetLayout, column: str | None) -> list[str]:
    """The columns that may hold the prompts: the one asked for, the set's, or all with a telling name."""
    if column is not None:
        return [name for name in names if name == column]
    if layout.text:
        return [name for name in layout.text if name in names][:1]
    return names if len(names) == 1 else [name for name in names if name.lower() in _TEXT_COLUMNS]


def _swapped_back(rows: list[dict[Any, Any]], layout: PromptSetLayout, file: Path) -> list[dict[Any, Any]]:
    """Exchange goals and targets where the header has them the wrong way round, as in a copy of AdvBench."""
    text, target = layout.text[0], layout.columns.get("target", "")
    if target == text or any(target not in row for row in rows):
        return rows
    if _complying(rows, text) < 0.5 or _complying(rows, target) > 0.1:
        return rows
    log.warning("%s: columns %r and %r hold each other's content; exchanged on reading", file, text, target)
    return [{**row, text: row[target], target: row[text]} for row in rows]


def _complying(rows: list[dict[Any, Any]], column: str) -> float:
    """Share of rows whose column opens as an answer that complies."""
    return sum(clean(row[column]).lower().startswith(_COMPLIANCE_OPENINGS) for row in rows) / len(rows)


def _prompt(row: Mapping[Any, Any], layout: PromptSetLayout, stem: str) -> Prompt:
    values: dict[str, Any] = {name: clean(row.get(column)) for name, column in layout.columns.items()}
    values |= {"label": _label(row, layout, stem)} | dict(layout.fixed)
    values["expect"] = _words(row.get(layout.columns.get("expect")))
    parts = (clean(row.get(layout.context)), clean(row[layout.text[0]]))
    return Prompt(text="\n\n---\n\n".join(filter(None, parts)) if parts[1] else "", **values)


def _words(cell: Any) -> tuple[str, ...]:
    """A list of words from a JSON cell, or from one text with blanks between them."""
    return tuple(map(str, cell)) if isinstance(cell, LISTS) else tuple(clean(cell).split())


def _label(row: Mapping[Any, Any], layout: PromptSetLayout, stem: str) -> str:
    """A file's own label where it is one of ours, else the first rule of the layout that fires."""
    if "label" in layout.columns:
        own = clean(row[layout.columns["label"]])
        return own if own in LABELS else ""
    cells = {"": stem} | {c: clean(row[c]) for c, _, _ in layout.labels if c in row}
    return next((label for column, text, label in layout.labels if text in cells.get(column, ())), "")


def _distinct(prompts: list[Prompt], file: Path) -> list[Prompt]:
    """The prompts that say something, each text once (its first row)."""
    distinct: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.text:
            distinct.setdefault(prompt.text, prompt)
    if left_out := len(prompts) - len(distinct):
        log.warning("%s: left out %d of %d prompts, empty or repeated", file, left_out, len(prompts))
    return list(distinct.values())


def _load_records(kind: type[R], source: str | Path, columns: Mapping[str, str], **choice: Any) -> list[R]:
    """Rows as records of a kind; its prompt and responses must be there, in the table and in the row."""
    file = _source(source)
    table = read_table(file)
    names = {f.name: columns.get(f.name, f.name) for f in fields(kind)}  # type: ignore[arg-type]
    needed = [c for name, c in names.items() if name in columns or name.endswith(("prompt", "response"))]
    if absent := [column for column in needed if column not in table.columns]:
        raise ReplibError(
            f"{file} has no column {', '.join(absent)}; its columns are {', '.join(table.columns)}. "
            'Map them, as columns={"prompt": "question"}.'
        )
    rows = table.to_dict("records")
    full = [row for row in rows if all(clean(row[column]) for column in needed)]
    if left_out := len(rows) - len(full):
        log.warning("%s: left out %d of %d rows with an empty %s", file, left_out, len(rows), " or ".join(needed))
    records = [kind(**{name: clean(row.get(column)) for name, column in names.items()}) for row in full]
    return _select(records, file, **choice)


def _select(records: list[Any], file: Path, *, split: str | None, limit: int | None, seed: int) -> list[Any]:
    """The records of a split, at most ``limit`` of them, in the file's order."""
    if not records:
        raise ReplibError(f"{file} has no usable row: every one lacks its text.")
    if limit is not None and limit < 1:
        raise ReplibError(f"limit must be at least 1; got {limit}. Leave it out to read all of {file}.")
    chosen = [record for record in records if split in (None, record.split)]
    if not chosen:
        present = ", ".join(sorted({repr(record.split) for record in records}))
        raise ReplibError(f"{file} has no rows of split {split!r}, only of {present}. Divide it with split_by.")
    if limit is None or limit >= len(chosen):
        return chosen
    return [chosen[i] for i in sorted(random.Random(seed).sample(range(len(chosen)), limit))]
