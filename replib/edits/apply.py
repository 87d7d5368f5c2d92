"""Edits applied inside a context and exactly undone: which tokens they meet, and whose edits they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from replib.core.errors import ReplibError
from replib.edits.gates import DecodingPhase, Gate, GateHook
from replib.models.chat_model import ChatModel, check_layers
from replib.models.hooks import SITES, Hook, check_site, hooked
from replib.transport.affine import Edit, Origin, check_strength

POSITIONS = ("last_prompt", "all_prompt", "response", "decode", "all")
Edits = Mapping[int, Edit] | Mapping[tuple[str, int], Edit]
Edited = Mapping[str, Mapping[tuple[str, int], Edit]]
"""Edits by the tokens that they act on: ``{"last_prompt": {("resid_post", 7): one}}``; ``{}`` edits nothing."""
Key = tuple[str, int]


@contextmanager
def applied(
    model: ChatModel,
    edits: Edits | Sequence[Edits],
    *,
    positions: str = "last_prompt",
    strength: float = 1.0,
    gate: Gate | None = None,
) -> Iterator[ChatModel]:
    """Run ``model`` with edits in place; afterwards, also after an exception, it is exactly what it was.

    Args:
        model: the model to edit.
        edits: block index -> edit of its output, or (site, block index) -> edit. A list of such mappings: every
            batch is that many groups of rows of equal size, in this order, and each group meets its own edits.
        positions: which tokens are edited. ``last_prompt``: the last prompt token, once; ``all_prompt``: all prompt
            tokens; ``response``: all answer tokens, forced or generated; ``decode``: answer tokens as they are read
            back while generating, a prefill left alone; ``all``: prompt and answer.
        strength: displacement interpolation in [0, 1]; 0 leaves every bit as it was.
        gate: edit only where a linear score exceeds a threshold; all other rows or tokens keep every bit.

    Raises:
        ReplibError: unknown positions, site or layer, width mismatch, strength outside [0, 1], an edit that was
            fitted for another model, site or layer, a gate that comes after an edit; on running, a batch that does
            not fall into groups.
    """
    if positions not in POSITIONS:
        raise ReplibError(f"Unknown edit positions {positions!r}: use one of {', '.join(POSITIONS)}.")
    check_strength(strength, "to go beyond, multiply the edit itself")
    groups = [_by_site(model, group) for group in ([edits] if isinstance(edits, Mapping) else edits)]
    keys = dict.fromkeys(key for group in groups for key in group)
    watch = None if gate is None else _watch(model, gate, keys)
    where = _Where(model, positions, watch)
    hooks: dict[Key, Hook] = {
        key: _Hook(where, [g[key] * strength if key in g else None for g in groups]) for key in keys
    }
    with hooked(model, {watch.gate.key: watch} if watch else {}), hooked(model, hooks if strength else {}):
        yield model


@contextmanager
def applied_each(model: ChatModel, groups: Sequence[Edited]) -> Iterator[ChatModel]:
    """Inside, every batch is as many groups of rows, each meets its own edits at its own tokens; see ``applied``."""
    with ExitStack() as stack:
        for where in dict.fromkeys(positions for group in groups for positions in group):
            stack.enter_context(applied(model, [group.get(where, {}) for group in groups], positions=where))
        yield model


def bound(model: ChatModel, edits: Mapping[Key, Edit]) -> dict[Key, Edit]:
    """The same edits, each for its own place in this very model: ``applied`` refuses them anywhere else."""
    name = _identity(model)  # once, as an adapter is read whole
    return {key: edit.bound(Origin(name, *key)) for key, edit in edits.items()}


def place(model: ChatModel, site: str, layer: int) -> Origin:
    """A site of a block of this very model, adapter included: what an edit or a gate can be ``bound`` to."""
    return Origin(_identity(model), site, layer)


def _identity(model: ChatModel) -> str:
    about = model.provenance()
    return "+".join(filter(None, (about["fingerprint"], about["adapter_hash"])))


def _by_site(model: ChatModel, edits: Edits) -> dict[Key, Edit]:
    keyed = {(k if isinstance(k, tuple) else ("resid_post", k)): e for k, e in edits.items()}
    for (site, layer), edit in keyed.items():
        if check_site(site) == "resid_mid":
            raise ReplibError(
                "resid_mid is only read: edit attn_out, and what is added there reaches all that follows."
            )
        check_layers(model, [layer])
        if edit.width != model.d_model:
            raise ReplibError(f"The edit has width {edit.width}, but {model.name} has {model.d_model}: wrong model?")
    placed = {(site, layer % model.n_layers): edit for (site, layer), edit in keyed.items()}
    _check_origins(model, {key: edit.origin for key, edit in placed.items() if edit.origin})
    return placed


def _check_origins(model: ChatModel, origins: Mapping[Key, Origin]) -> None:
    name = _identity(model) if origins else ""
    for key, origin in origins.items():
        if origin != (here := Origin(name, *key)):
            raise ReplibError(
                f"This edit was fitted for {origin}, not for {here}: fit it again there, or free it with .bound(None)."
            )


def _watch(model: ChatModel, gate: Gate, keys: Mapping[Key, None]) -> GateHook:
    check_site(gate.site)
    gate = replace(gate, layer=check_layers(model, [gate.layer])[0])
    if len(gate.w) != model.d_model:
        raise ReplibError(f"The gate has width {len(gate.w)}, but {model.name} has {model.d_model}: wrong model?")
    if gate.origin:
        _check_origins(model, {gate.key: gate.origin})
    if early := [key for key in keys if _order(key) < _order(gate.key)]:
        raise ReplibError(
            f"The gate is read at {gate.site} of block {gate.layer}, after the edit at {early[0][0]} of block "
            f"{early[0][1]}: gate no later than the first edit."
        )
    return GateHook(model, gate)


def _order(key: Key) -> tuple[int, int]:
    return key[1], SITES.index(key[0])


@dataclass
class _Where:
    """Which tokens of a forward call are edited."""

    model: ChatModel
    positions: str
    watch: GateHook | None

    def __call__(self, hidden: Tensor, *, answering: bool) -> Tensor | None:
        """``[rows, tokens]``, or ``[rows, 1]`` where all tokens of a row are alike; None: all are."""
        chosen = self._chosen(hidden, answering=answering)
        if self.watch is None:
            return chosen
        opened = self.watch.opened.to(hidden.device)
        return opened.expand(hidden.shape[:2]) if chosen is None else chosen & opened

    def idle(self, *, answering: bool) -> bool:
        """Whether no token of this call can be edited; known without a look at any tensor."""
        if answering:
            return self.positions in ("last_prompt", "all_prompt")
        return self.positions == "decode"

    def _chosen(self, hidden: Tensor, *, answering: bool) -> Tensor | None:
        batch = self.model.reading
        if answering or self.positions == "all" or batch is None:
            return None
        if self.positions == "last_prompt":
            mask = torch.zeros_like(batch.prompt_mask).scatter(1, batch.last_prompt[:, None], True)
        else:
            mask = batch.prompt_mask if self.positions == "all_prompt" else batch.response_mask
        return _copies(mask, hidden)


def _copies(mask: Tensor, hidden: Tensor) -> Tensor:
    """A mask of rows, for hidden states that hold each row several times (beams)."""
    return mask.repeat_interleave(len(hidden) // len(mask), dim=0).to(hidden.device)


class _Hook:
    """The edits of one site, one a group of rows."""

    def __init__(self, where: _Where, edits: Sequence[Edit | None]):
        self.where, self.edits = where, edits
        self.phase = DecodingPhase(where.model, needed=where.positions != "all")

    def __call__(self, hidden: Tensor) -> Tensor | None:
        answering = self.phase.answering(hidden)
        if self.where.idle(answering=answering):
            return None
        if len(hidden) % len(self.edits):
            raise ReplibError(f"{len(hidden)} rows do not fall into {len(self.edits)} equal groups, one for each edit.")
        self.edits = [edit and edit.to(hidden.device) for edit in self.edits]
        mask = self.where(hidden, answering=answering)
        if mask is not None and not mask.any():
            return None
        if len(self.edits) == 1:
            return _edited(self.edits[0], hidden, mask)
        n = len(self.edits)
        where: Sequence[Tensor | None] = [None] * n if mask is None else mask.chunk(n)
        return torch.cat([_edited(*part) for part in zip(self.edits, hidden.chunk(n), where, strict=True)])


def _edited(edit: Edit | None, hidden: Tensor, where: Tensor | None) -> Tensor:
    if edit is None:
        return hidden
    if where is None:
        return edit(hidden)
    edited = hidden.clone()
    edited[where] = edit(hidden[where])
    return edited
