"""What one pass over a batch leaves for RepBend's terms: which tokens of which rows each of them is taken on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replib.bend import BendConfig, BendTerms, anchored_cosine, distance, kl_divergence, mean_cosine
from replib.chat import Batch, ChatModel
from replib.prompts import Contrast, Dialogue
from replib.sites import Hook, hooked

SAFE, UNSAFE, RETAIN, TURNED, KEPT = range(5)


def collate(
    chat: ChatModel,
    contrasts: Sequence[Contrast],
    retain: Sequence[Dialogue],
    complied: Sequence[Contrast] = (),
    safe: Sequence[Dialogue] = (),
    unsafe: Sequence[Dialogue] = (),
) -> tuple[Batch, Tensor]:
    """One padded batch of refusals, benign dialogues and unsafe answers, and the group of each row.

    TURNED rows are refusals of prompts that the model complies with: their answers are kept, their decision is not.
    KEPT rows are unpaired safe answers to prompts that are not harmful: no refusals, so nothing is gathered on them.
    """
    rows = (
        [(SAFE, c.prompt, c.safe_response) for c in contrasts]
        + [(TURNED, c.prompt, c.safe_response) for c in complied]
        + [(RETAIN, d.prompt, d.response) for d in retain]
        + [(UNSAFE, c.prompt, c.unsafe_response) for c in complied or contrasts]
        + [(SAFE if d.label == "harmful" else KEPT, d.prompt, d.response) for d in safe]
        + [(UNSAFE, d.prompt, d.response) for d in unsafe]
    )
    groups, prompts, responses = zip(*rows, strict=True)
    batch = chat.encode(prompts, [r + (chat.tokenizer.eos_token or "") for r in responses])
    return batch, torch.tensor(groups, device=batch.input_ids.device)


@dataclass(frozen=True)
class Reading:
    """What one pass leaves for the four terms."""

    safe: Tensor
    """[blocks, tokens, dim] of refusals and benign answers."""
    unsafe: Tensor
    """[target blocks, tokens, dim] of unsafe answers."""
    last: Tensor
    """[target blocks, rows, dim] of the last tokens of prompts with unsafe answers."""
    refused: Tensor
    """[target blocks, rows, dim] of the last tokens of refused prompts."""
    logits: Tensor
    """[tokens, vocab] before every token of the answers that the KL covers."""


def read(
    chat: ChatModel,
    wrapped: nn.Module,
    batch: Batch,
    groups: Tensor,
    layers: Sequence[int],
    config: BendConfig | None = None,
) -> Reading:
    """One forward pass, keeping only what the loss needs; logits are made only where the KL is taken."""
    config = config or BendConfig()
    last = torch.zeros_like(batch.response_mask).scatter(1, batch.last_prompt[:, None], True)
    unsafe, decided = (groups == UNSAFE)[:, None], (groups != TURNED)[:, None]
    answers = batch.response_mask | (last & decided & config.decision)
    wanted = {
        "safe": answers & ~unsafe,
        "unsafe": answers & unsafe,
        "last": last & unsafe,
        "refused": last & (groups == SAFE)[:, None],
    }
    kept: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def keep(layer: int) -> Hook:
        def hook(hidden: Tensor) -> None:
            for name, mask in wanted.items():
                if name == "safe" or layer in layers:
                    kept[name].append(hidden[mask])

        return hook

    final: list[Tensor] = []
    handle = chat.final_norm.register_forward_hook(lambda _m, _a, out: final.append(out))
    try:
        with (
            hooked(chat, {("resid_post", i): keep(i) for i in range(chat.n_layers)}),
            chat.reading_batch(batch),
        ):
            wrapped(**batch.inputs(), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    logits = chat.unembed(final[0][_before_answers(batch, groups, last, config.refusals)])
    return Reading(logits=logits, **{name: torch.stack(x) for name, x in kept.items()})


def _before_answers(batch: Batch, groups: Tensor, last: Tensor, refusals: bool) -> Tensor:
    """Tokens whose next token belongs to an answer to be kept: where the KL is taken."""
    shifted = torch.zeros_like(batch.response_mask)
    shifted[:, :-1] = batch.response_mask[:, 1:]
    kept = (groups == RETAIN) | (refusals & (groups != UNSAFE))
    return shifted & kept[:, None] & ~(last & (groups == TURNED)[:, None])


def bend_terms(bent: Reading, base: Reading, config: BendConfig) -> BendTerms:
    """The four terms of one batch from a pass with the adapter and a pass without."""
    hinge = {"max_distance": config.max_distance, "directional": config.directional}
    centre = torch.cat([base.last, base.refused], dim=1).mean(dim=1, keepdim=True)
    gathered = anchored_cosine(bent.last, base.refused, centre) if config.anchored else mean_cosine(bent.last)
    return BendTerms(
        safe=distance(bent.safe, base.safe),
        unsafe=distance(bent.unsafe, base.unsafe, **hinge),  # type: ignore[arg-type]
        cosine=gathered,
        kl=kl_divergence(base.logits, bent.logits, config.temperature),
    )
