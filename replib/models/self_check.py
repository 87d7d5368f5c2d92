"""Self-check of a loaded model: a few short passes that must agree, with an explanation of each failure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from replib.models.chat_model import ChatModel, evaluating
from replib.models.hooks import hooked

PROMPTS = ("Hello.", "What is the opposite of hot, please?")
_MEANING = {
    "padded": "padding changes what the model reads, so every batched result depends on its neighbours: pass "
    "batch_size=1, or look at the model's attention mask and position ids",
    "adapter_off": "the adapter has changed the base itself, so comparisons with the base are void: load both again",
    "lens": "final norm, unembedding or a scale of the logits was not located correctly, so the logit lens "
    "misleads: name the parts with load(..., architecture=...)",
}
_TITLES = {"padded": "batch = single", "adapter_off": "adapter off = base", "lens": "lens = logits"}


@torch.no_grad()
def self_check(
    model: ChatModel,
    prompts: Sequence[str] = PROMPTS,
    *,
    base: Float[Tensor, "prompts vocab"] | None = None,
) -> dict[str, float]:
    """Logit differences that should be near zero, effect of the adapter, and residual scale.

    Args:
        model: the model to check; its train/eval mode is restored.
        prompts: read as one batch and one by one.
        base: ``next_logits`` of the same prompts before the adapter was attached.

    Returns:
        ``padded``: largest logit difference between a padded batch and single prompts; ``lens``: between ``decode``
        of the last block's output and the logits; ``adapter_effect``: between adapter off and on (0.0 without an
        adapter, large with one); ``residual_norm``: mean norm of resid_post at half depth, last prompt token;
        ``scale``: largest absolute logit, the scale of the differences; with ``base`` also ``adapter_off``: largest
        difference between ``base`` and the logits with the adapter off.
    """
    logits = next_logits(model, prompts)
    singles = torch.cat([next_logits(model, [p]) for p in prompts])
    middle, last = _residuals(model, prompts, (model.n_layers // 2, model.n_layers - 1))
    lens = model.decode(last).float().cpu()
    with model.adapter_off():
        off = next_logits(model, prompts)
    found = {
        "padded": _worst(logits, singles),
        "lens": _worst(logits, lens),
        "adapter_effect": _worst(logits, off),
        "residual_norm": middle.float().norm(dim=-1).mean().item(),
        "scale": logits.abs().max().item(),
    }
    return found if base is None else found | {"adapter_off": _worst(off, base)}


@torch.no_grad()
def next_logits(model: ChatModel, prompts: Sequence[str] = PROMPTS) -> Float[Tensor, "prompts vocab"]:
    """Logits after the last token of each prompt, float32 on the CPU."""
    with evaluating(model.model):
        return model.forward(model.encode(prompts))[:, -1].float().cpu()


def _residuals(model: ChatModel, prompts: Sequence[str], layers: Sequence[int]) -> list[Float[Tensor, "prompts dim"]]:
    """Outputs of some blocks at the last token of each prompt."""
    read: dict[int, Tensor] = {}
    hooks = {("resid_post", i): (lambda hidden, i=i: read.__setitem__(i, hidden[:, -1].detach())) for i in layers}
    with evaluating(model.model), hooked(model, hooks):
        model.forward(model.encode(prompts))
    return [read[i] for i in layers]


def ticks(found: Mapping[str, float], dtype: torch.dtype) -> str:
    """Self-check as one line of ticks, and one sentence per failure."""
    allowed = tolerance(dtype, found["scale"])
    verdicts = {key: _verdict(found.get(key), allowed) for key in _TITLES}
    marks = [f"{verdicts[key]} {_TITLES[key]} ({_value(found.get(key))})" for key in _TITLES]
    failed = [f"✗ {_TITLES[key]}: {_MEANING[key]}." for key, verdict in verdicts.items() if verdict == "✗"]
    return "\n".join(["   ".join(marks), *failed])


def tolerance(dtype: torch.dtype, scale: float) -> float:
    """Largest logit difference explained by rounding, for logits of size ``scale``."""
    return max(1e-4, 4 * torch.finfo(dtype).eps) * max(1.0, scale)


def _verdict(value: float | None, allowed: float) -> str:
    if value is None:
        return "–"
    return "✓" if value <= allowed else "✗"  # NaN fails


def _value(value: float | None) -> str:
    if value is None:
        return "no adapter"
    return "0" if value == 0 else f"{value:.0e}" if math.isfinite(value) else "not finite"


def _worst(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


_PADDED = 1e-2  # logits: float32 differs by 1e-5, bfloat16 by more


def check_table(found: Mapping[str, float]) -> pd.DataFrame:
    """Self-check as a table: comparison, largest difference, and a tick if it passes."""
    rows = [
        ("padded batch against single prompts, logits", found["padded"], found["padded"] < _PADDED),
        ("lens at the last block against the logits", found["lens"], found["lens"] < _PADDED),
        ("adapter on against off, logits (0 without an adapter)", found["adapter_effect"], None),
        ("mean residual norm at half depth", found["residual_norm"], None),
    ]
    ticks = {True: "✓", False: "✗", None: ""}
    shown = [(what, f"{value:.2g}", ticks[fine]) for what, value, fine in rows]
    return pd.DataFrame(shown, columns=["compared", "value", ""]).set_index("compared").rename_axis(None)


def token_table(model: ChatModel, prompt: str, last: int = 8) -> pd.DataFrame:
    """Last tokens of one rendered prompt, with the part of the prompt that holds each."""
    batch = model.encode([prompt])
    tokens = model.tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    parts = ["after the instruction" if post else "template and instruction" for post in batch.post_mask[0].tolist()]
    parts[-1] = "last_prompt"
    table = pd.DataFrame({"position": range(-len(tokens), 0), "token": tokens, "part": parts}).set_index("position")
    return table.tail(last).T
