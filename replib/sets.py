"""The prompts that a model is studied on: three splits of each class, in a world that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from replib.core.errors import ReplibError
from replib.core.settings import Settings
from replib.prompts import Prompt, load_prompts
from replib.splits import Splits, split_by

VARIANTS = ("base", "aligned", "planted", "deep")


def check_world(settings: Settings) -> None:
    """Raise ReplibError for a foreign model without prompts of its own."""
    if settings.harmful.startswith("organism/") and Path(settings.model).name not in VARIANTS:
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
