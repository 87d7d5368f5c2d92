"""Forward passes that compute no more than a loss reads: no unembedding, nothing above the last wanted block, and the
blocks below every adapter once instead of twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from replib.chat import ChatModel
from replib.core.distributed import is_split
from replib.sites import Hook, hooked
from replib.tokens import Batch

LOGITS = 1 << 24  # numbers that the logits of one stretch of tokens hold at most


class _Enough(Exception):
    """All that is wanted has been read."""


def passed(
    chat: ChatModel, batch: Batch, hooks: Mapping[tuple[str, int], Hook] | None = None, *, last: int | None = None
) -> Tensor | None:
    """Run a batch through the model under hooks.

    Args:
        chat: the model.
        batch: padded rows.
        hooks: called with the hidden states ``[rows, tokens, dim]`` at (site, block), see ``replib.sites``.
        last: block after which the pass may stop; None goes to the end, as does a model whose weights are split
            over processes: a pass that breaks off would leave some of them gathered.

    Returns:
        What left the final norm, ``[rows, tokens, dim]``, for ``chat.logits``; None where the pass was stopped.
    """
    final: list[Tensor] = []

    def stop(*_: object) -> None:
        raise _Enough

    taps = [chat.final_norm.register_forward_hook(lambda _m, _a, out: final.append(out))]
    try:
        with hooked(chat, dict(hooks or {})), chat.reading_batch(batch):
            if last is not None and not is_split(chat.model):
                taps.append(chat.blocks[last].register_forward_hook(stop))
            chat.model(**batch.inputs(), use_cache=False, logits_to_keep=1)
    except _Enough:
        return None
    finally:
        for tap in taps:
            tap.remove()
    return final[-1]  # where sites are looked for, a prompt passes before


def in_stretches(chat: ChatModel, compute: Callable[..., Tensor], *rows: Tensor) -> list[Tensor]:
    """What is computed on rows whose logits are made there, a stretch of them at a time.

    Where there are several stretches, each is computed anew for the gradient, so that one at a time holds its logits.
    """
    size = stretch_of(chat)
    if len(rows[0]) <= size:
        return [compute(*rows)]
    each = zip(*(x.split(size) for x in rows), strict=True)
    return [checkpoint(compute, *some, use_reentrant=False) for some in each]


def stretch_of(chat: ChatModel) -> int:
    """Tokens whose logits are made at once."""
    return max(1, LOGITS // chat.unembed.out_features)


@contextmanager
def read_once(chat: ChatModel) -> Iterator[None]:
    """Inside, blocks below every adapter compute the first pass of a batch alone; the next one takes what they gave.

    With and without the adapter they read the same: first comes the reference, then the model in training.
    """
    with ExitStack() as stack:
        for block in below_adapters(chat):
            before = vars(block).get("forward")
            block.forward = _once(block.forward)
            stack.callback(_undo, block, before)
        yield


@contextmanager
def recomputing_nothing(chat: ChatModel) -> Iterator[None]:
    """Inside, blocks keep what the gradient needs: computed anew, they would not meet edits that are gone by then."""
    modules = [m for m in chat.model.modules() if getattr(m, "gradient_checkpointing", False)]
    try:
        for module in modules:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def below_adapters(chat: ChatModel) -> list[nn.Module]:
    """The first blocks, as far as nothing in them or before them is trained; none where weights are split."""
    if is_split(chat.model) or any(p.requires_grad for p in chat.causal_lm.get_input_embeddings().parameters()):
        return []
    return list(takewhile(lambda block: not any(p.requires_grad for p in block.parameters()), chat.blocks))


def _once(forward: Callable) -> Callable:
    given: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if not given:
            given.append(forward(*args, **kwargs))
        return given[0]

    return run


def _undo(block: nn.Module, before: Callable | None) -> None:
    if before is None:
        del block.forward
    else:
        block.forward = before
