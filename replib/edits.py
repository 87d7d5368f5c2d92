"""Affine edits of the residual stream, applied inside a context and exactly undone.

There is deliberately no way to fold an edit into weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from replib.affine import AffineEdit
from replib.chat import ChatModel
from replib.errors import ReplibError
from replib.reader import check_layers
from replib.sites import Hook, check_site, hooked

POSITIONS = ("last_prompt", "prompt", "response", "all")
Edits = Mapping[int, AffineEdit] | Mapping[tuple[str, int], AffineEdit]


@contextmanager
def applied(
    model: ChatModel, edits: Edits | Sequence[Edits], *, positions: str = "last_prompt", strength: float = 1.0
) -> Iterator[ChatModel]:
    """Run ``model`` with edits in place; afterwards, also after an exception, it is exactly what it was.

    Args:
        model: the model to edit.
        edits: block index -> edit of its output, or (site, block index) -> edit. A list of such mappings: every
            batch is that many groups of rows of equal size, in this order, and each group meets its own edits.
        positions: which tokens are edited. ``last_prompt``: the last prompt token, once; ``prompt``: all prompt
            tokens; ``response``: all answer tokens, forced or generated; ``all``: prompt and answer.
        strength: displacement interpolation in [0, 1]; 0 leaves every bit as it was.

    Raises:
        ReplibError: unknown positions, site or layer, width mismatch, strength outside [0, 1]; on running, a batch
            that does not fall into groups.
    """
    if positions not in POSITIONS:
        raise ReplibError(f"Unknown edit positions {positions!r}: use one of {', '.join(POSITIONS)}.")
    if not 0.0 <= strength <= 1.0:
        raise ReplibError(f"Edit strength {strength} is outside [0, 1].")
    groups = [_by_site(model, group) for group in ([edits] if isinstance(edits, Mapping) else edits)]
    keys = dict.fromkeys(key for group in groups for key in group)
    hooks = {key: _hook(model, [g[key] * strength if key in g else None for g in groups], positions) for key in keys}
    with hooked(model, hooks if strength else {}):
        yield model


def _by_site(model: ChatModel, edits: Edits) -> dict[tuple[str, int], AffineEdit]:
    keyed = {(k if isinstance(k, tuple) else ("resid_post", k)): e for k, e in edits.items()}
    for (site, layer), edit in keyed.items():
        if check_site(site) == "resid_mid":
            raise ReplibError(
                "resid_mid is only read: edit attn_out, and what is added there reaches all that follows."
            )
        check_layers(model, [layer])
        if len(edit.c) != model.d_model:
            raise ReplibError(f"The edit has width {len(edit.c)}, but {model.name} has {model.d_model}: wrong model?")
    return {(site, layer % model.n_layers): edit for (site, layer), edit in keyed.items()}


def _hook(model: ChatModel, edits: Sequence[AffineEdit | None], positions: str) -> Hook:
    edits = [edit and edit.to(model.device) for edit in edits]

    def run(hidden: Tensor) -> Tensor | None:
        mask = _mask(model, positions, hidden)
        if mask is not None and not mask.any():
            return None
        if len(hidden) % len(edits):
            raise ReplibError(f"{len(hidden)} rows do not fall into {len(edits)} equal groups, one for each edit.")
        where: Sequence[Tensor | None] = [None] * len(edits) if mask is None else mask.chunk(len(edits))
        parts = zip(edits, hidden.chunk(len(edits)), where, strict=True)
        return torch.cat([_edited(*part) for part in parts])

    return run


def _edited(edit: AffineEdit | None, hidden: Tensor, where: Tensor | None) -> Tensor:
    if edit is None:
        return hidden
    if where is None:
        return edit(hidden)
    edited = hidden.clone()
    edited[where] = edit(hidden[where])
    return edited


def _mask(model: ChatModel, positions: str, hidden: Tensor) -> Tensor | None:
    """Which tokens of this forward call are edited; None means all of them."""
    if positions == "all":
        return None
    batch = model.reading
    if batch is None:
        raise ReplibError(
            f"positions={positions!r} needs to know where the prompt ends: call model.forward or model.generate "
            "(not model.model), or use positions='all'."
        )
    if hidden.shape[1] != batch.input_ids.shape[1]:  # a decoding step: every token here is an answer token
        return hidden.new_full(hidden.shape[:2], positions == "response", dtype=torch.bool)
    last = torch.zeros_like(batch.prompt_mask).scatter(1, batch.last_prompt[:, None], True)
    choices: dict[str, Callable[[], Tensor]] = {
        "last_prompt": lambda: last,
        "prompt": lambda: batch.prompt_mask,
        "response": lambda: batch.response_mask,
    }
    return choices[positions]()
