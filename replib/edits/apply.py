"""Edits of a model's activations inside a context, exactly undone afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from replib.core.errors import ReplibError
from replib.edits.decoding_phase import DecodingPhase
from replib.models.chat_model import ChatModel, check_layers
from replib.models.hooks import Hook, check_site, hooked
from replib.transport.affine import Edit, Origin, check_strength

POSITIONS = ("last_prompt", "all_prompt", "response", "decode", "all")
Edits = Mapping[int, Edit] | Mapping[tuple[str, int], Edit]
Edited = Mapping[str, Mapping[tuple[str, int], Edit]]
"""Edits by edited positions: ``{"last_prompt": {("resid_post", 7): edit}}``; ``{}`` edits nothing."""
Key = tuple[str, int]


@contextmanager
def applied(
    model: ChatModel,
    edits: Edits | Sequence[Edits],
    *,
    positions: str = "last_prompt",
    strength: float = 1.0,
) -> Iterator[ChatModel]:
    """Run ``model`` with edits in place; on exit, also after an exception, every bit is restored.

    Args:
        model: the model to edit.
        edits: block index -> edit of its output, or (site, block index) -> edit. A list of n such mappings splits
            every batch into n groups of consecutive rows, equal in size, each under its own edits.
        positions: edited tokens. ``last_prompt``: the last prompt token, once; ``all_prompt``: all prompt tokens;
            ``response``: all answer tokens, forced or generated; ``decode``: generated answer tokens, a prefill not
            included; ``all``: prompt and answer.
        strength: displacement interpolation in [0, 1]; 0 changes no bit.

    Raises:
        ReplibError: unknown positions, site or layer, width mismatch, strength outside [0, 1], an edit that was
            fitted for another model, site or layer; in a forward call, a batch that does not split into the groups.
    """
    if positions not in POSITIONS:
        raise ReplibError(f"Unknown edit positions {positions!r}: use one of {', '.join(POSITIONS)}.")
    check_strength(strength, "to go beyond, multiply the edit itself")
    groups = [_by_site(model, group) for group in ([edits] if isinstance(edits, Mapping) else edits)]
    keys = dict.fromkeys(key for group in groups for key in group)
    tokens = _EditedTokens(model, positions)
    hooks: dict[Key, Hook] = {
        key: _Hook(tokens, [g[key] * strength if key in g else None for g in groups]) for key in keys
    }
    with hooked(model, hooks if strength else {}):
        yield model


@contextmanager
def applied_each(model: ChatModel, groups: Sequence[Edited]) -> Iterator[ChatModel]:
    """``applied`` for groups of rows that also differ in their edited positions."""
    with ExitStack() as stack:
        for positions in dict.fromkeys(name for group in groups for name in group):
            stack.enter_context(applied(model, [group.get(positions, {}) for group in groups], positions=positions))
        yield model


def bound(model: ChatModel, edits: Mapping[Key, Edit]) -> dict[Key, Edit]:
    """The same edits, each tied to its site and block of this model; ``applied`` refuses them elsewhere."""
    name = _identity(model)  # once: hashing reads the whole adapter
    return {key: edit.bound(Origin(name, *key)) for key, edit in edits.items()}


def _identity(model: ChatModel) -> str:
    about = model.provenance()
    return "+".join(filter(None, (about["fingerprint"], about["adapter_hash"])))


def _by_site(model: ChatModel, edits: Edits) -> dict[Key, Edit]:
    keyed = {(k if isinstance(k, tuple) else ("resid_post", k)): e for k, e in edits.items()}
    for (site, layer), edit in keyed.items():
        if check_site(site) == "resid_mid":
            raise ReplibError("resid_mid is only read: edit attn_out, whose change reaches all later activations.")
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
                f"This edit was fitted for {origin}, not for {here}: fit it again there, or untie it with .bound(None)."
            )


@dataclass
class _EditedTokens:
    """Tokens of a forward call that are edited."""

    model: ChatModel
    positions: str

    def none(self, *, answering: bool) -> bool:
        """Whether no token of this call can be edited; known without a look at any tensor."""
        if answering:
            return self.positions in ("last_prompt", "all_prompt")
        return self.positions == "decode"

    def mask(self, hidden: Tensor, *, answering: bool) -> Tensor | None:
        """``[rows, tokens]``; None if all tokens are edited."""
        batch = self.model.reading
        if answering or self.positions == "all" or batch is None:
            return None
        if self.positions == "last_prompt":
            mask = torch.zeros_like(batch.prompt_mask).scatter(1, batch.last_prompt[:, None], True)
        else:
            mask = batch.prompt_mask if self.positions == "all_prompt" else batch.response_mask
        return _copies(mask, hidden)


def _copies(mask: Tensor, hidden: Tensor) -> Tensor:
    """Mask of hidden states that hold each row several times (beams)."""
    return mask.repeat_interleave(len(hidden) // len(mask), dim=0).to(hidden.device)


class _Hook:
    """Edits of one site, one per group of rows."""

    def __init__(self, tokens: _EditedTokens, edits: Sequence[Edit | None]):
        self.tokens, self.edits = tokens, edits
        self.phase = DecodingPhase(tokens.model, needed=tokens.positions != "all")

    def __call__(self, hidden: Tensor) -> Tensor | None:
        answering = self.phase.answering(hidden)
        if self.tokens.none(answering=answering):
            return None
        if len(hidden) % len(self.edits):
            raise ReplibError(f"{len(hidden)} rows do not split into {len(self.edits)} equal groups, one per edit.")
        self.edits = [edit and edit.to(hidden.device) for edit in self.edits]
        mask = self.tokens.mask(hidden, answering=answering)
        if mask is not None and not mask.any():
            return None
        if len(self.edits) == 1:
            return _edited(self.edits[0], hidden, mask)
        n = len(self.edits)
        masks: Sequence[Tensor | None] = [None] * n if mask is None else mask.chunk(n)
        return torch.cat([_edited(*group) for group in zip(self.edits, hidden.chunk(n), masks, strict=True)])


def _edited(edit: Edit | None, hidden: Tensor, mask: Tensor | None) -> Tensor:
    if edit is None:
        return hidden
    if mask is None:
        return edit(hidden)
    edited = hidden.clone()
    edited[mask] = edit(hidden[mask])
    return edited
