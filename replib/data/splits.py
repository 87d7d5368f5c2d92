"""Sets that share nothing: what fits, what chooses and what reports never meet."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch

from replib.core.errors import ReplibError
from replib.core.settings import Settings
from replib.data.prompts import Prompt, load_prompts

log = logging.getLogger(__name__)


class Splits(NamedTuple):
    """Three sets that share no value of the fields they were split by."""

    fit: list[Any]
    val: list[Any]
    test: list[Any]


def split_by(
    records: Sequence[Any],
    key: str | tuple[str, ...],
    *,
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    seed: int = 0,
) -> Splits:
    """Divide records so that no value of ``key`` is in two parts, and set their ``split``.

    ``fractions`` are of values, not of records. With several fields, as ``("group", "way")``, a record whose
    fields fall into different parts belongs to none and is left out (the log says how many).

    Raises:
        ReplibError: a record has no ``key``, there are too few values, or ``fractions`` do not add up to 1.
    """
    keys = (key,) if isinstance(key, str) else key
    parts = {k: _assign(_values(records, k), k, fractions, seed) for k in keys}
    splits = Splits([], [], [])
    for record in records:
        homes = {parts[k][getattr(record, k)] for k in keys}
        if len(homes) == 1:
            home = homes.pop()
            splits[home].append(replace(record, split=Splits._fields[home]))
    if left_out := len(records) - sum(map(len, splits)):
        log.info("split_by %s: %d of %d records straddle parts and are left out", keys, left_out, len(records))
    return splits


def check_disjoint(*sets: Sequence[Any], by: Sequence[str] = ("group", "way")) -> None:
    """Raise if two sets share a value of a field in ``by``, or if a field is empty and so proves nothing."""
    for name in by:
        values = [_values(records, name) for records in sets]
        for (i, a), (j, b) in combinations(enumerate(values), 2):
            if shared := sorted(a & b):
                some = ", ".join(map(repr, shared[:5])) + (", ..." if len(shared) > 5 else "")
                raise ReplibError(
                    f"sets {i} and {j} share {len(shared)} values of {name!r}: {some}. "
                    f"Divide their records with split_by(records, {name!r})."
                )


def _values(records: Sequence[Any], name: str) -> set[Any]:
    """The distinct values of a field, none of them empty."""
    empty = sum(not getattr(record, name) for record in records)
    if empty:
        raise ReplibError(
            f"{empty} of {len(records)} records have no {name!r}, so nothing can be kept apart by it. "
            "Fill it in, or name another field, as 'text'."
        )
    return {getattr(record, name) for record in records}


def _assign(values: set[Any], name: str, fractions: Sequence[float], seed: int) -> dict[Any, int]:
    """Value -> part 0, 1 or 2, at random; every part with a fraction gets at least one value."""
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ReplibError(f"fractions {fractions} must be non-negative and add up to 1, as (0.6, 0.2, 0.2).")
    parts = [i for i, fraction in enumerate(fractions) if fraction > 0]
    if len(values) < len(parts):
        raise ReplibError(
            f"{len(values)} distinct values of {name!r} cannot fill {len(parts)} disjoint parts. "
            "Give more records or split by another field."
        )
    order = sorted(values)
    random.Random(f"{seed} {name}").shuffle(order)
    ends, end = {}, 0
    for left, part in zip(range(len(parts) - 1, -1, -1), parts, strict=True):
        share = round(len(order) * sum(fractions[: part + 1]))
        ends[part] = end = min(max(share, end + 1), len(order) - left)
    return {value: next(p for p in parts if rank < ends[p]) for rank, value in enumerate(order)}


_VARIANTS = ("base", "aligned", "planted", "deep")


def check_world(settings: Settings) -> None:
    """Raise ReplibError for a foreign model without prompts of its own."""
    if settings.harmful.startswith("organism/") and Path(settings.model).name not in _VARIANTS:
        raise ReplibError(
            f"The default prompts speak of the organism's world, which {settings.model!r} does not know: set "
            "REPLIB_HARMFUL and REPLIB_HARMLESS to files or set names."
        )


def prompt_splits(source: str, settings: Settings) -> Splits:
    """Three disjoint splits: the file's own, or made by group (by text where prompts have no group).

    Raises ReplibError as ``load_prompts`` and ``split_by``.
    """
    prompts = load_prompts(source)
    if all(p.split for p in prompts):
        parts = {s: [p for p in prompts if p.split == s] for s in Splits._fields}
    else:
        by = "group" if len({p.group for p in prompts}) >= 20 else "text"
        parts = split_by(prompts, by, seed=settings.seed)._asdict()
    return Splits(**{s: _sample(part, settings.limit or 1000, settings.seed) for s, part in parts.items()})


def _sample(prompts: Sequence[Prompt], limit: int, seed: int) -> list[Prompt]:
    """In an order drawn from the seed, so that any beginning of the list is a fair sample."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[:limit]
    return [prompts[i] for i in order.tolist()]
