"""Forward passes that compute no more than a loss reads: no unembedding, and nothing above the last wanted block."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from replib.chat import Batch, ChatModel
from replib.parallel import is_split
from replib.sites import Hook, hooked


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
