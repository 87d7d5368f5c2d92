"""The parts of a decoder, found by structure: blocks, final norm, unembedding; and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from replib.errors import ReplibError

ANATOMY_HINT = (
    "Name them: load(..., anatomy=Anatomy(blocks='model.layers', final_norm='model.norm', unembed='lm_head'))"
)


@dataclass(frozen=True)
class Anatomy:
    """Dotted paths, from the causal LM, of the parts that are read and edited."""

    blocks: str
    final_norm: str
    unembed: str


def find_anatomy(model: Any) -> Anatomy:
    """Blocks: the module list as long as the config says; norm: its last norm sibling; unembedding: the output head."""
    depth = text_config(model.config).num_hidden_layers
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    head = model.get_output_embeddings()
    if not lists or head is None:
        raise ReplibError(f"Cannot find the {depth} decoder blocks of {type(model).__name__}. {ANATOMY_HINT}")
    blocks = min(lists, key=len)
    parent = blocks.rpartition(".")[0]
    norms = [n for n, m in resolve(model, parent).named_children() if "norm" in type(m).__name__.lower()]
    if not norms:
        raise ReplibError(f"Cannot find the final norm of {type(model).__name__}. {ANATOMY_HINT}")
    unembed = next(n for n, m in model.named_modules() if m is head)
    return Anatomy(blocks, f"{parent}.{norms[-1]}".lstrip("."), unembed)


def resolve(model: nn.Module, path: str) -> Any:
    """The part at a dotted path."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ReplibError(f"{type(model).__name__} has no part {path!r}. {ANATOMY_HINT}") from error


def text_config(config: Any) -> Any:
    """The text part of a multimodal configuration, or the configuration itself."""
    return config.gettext_config() if hasattr(config, "gettext_config") else config


def fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hex digits that change when the base weights do, with or without an adapter on them.

    A hash of 512 entries each of the first, the middle and the last two weights.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    weights = [p for n, p in model.named_parameters() if "lora_" not in n]
    for weight in (weights[0], weights[len(weights) // 2], weights[-2], weights[-1]):
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 512)][:512]
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
