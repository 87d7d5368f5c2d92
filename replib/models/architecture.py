"""Blocks, final norm and unembedding of a decoder, found by structure; hashes of its weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from replib.core.distributed import full_tensor
from replib.core.errors import ReplibError

_HINT = (
    "Name them: load(..., architecture=Architecture(blocks='model.layers', final_norm='model.norm', unembed='lm_head'))"
)


@dataclass(frozen=True)
class Architecture:
    """Dotted paths of the parts of a causal LM."""

    blocks: str
    final_norm: str
    unembed: str


def find_architecture(model: Any) -> Architecture:
    """Blocks, final norm and unembedding of a decoder, by structure alone.

    Blocks are the module list with the length in the config. Of several (a vision tower beside the text decoder,
    experts inside a block) it is the one nearest the token embedding, then the one with most parameters. The final
    norm is the first sibling after the blocks with the width of the stream; the unembedding is the output head.

    Raises:
        ReplibError: a part is missing; the message shows how to name it.
    """
    depth = text_config(model.config).num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    head = model.get_output_embeddings()
    if not lists or head is None:
        raise ReplibError(f"Cannot find the {depth} decoder blocks of {type(model).__name__}. {_HINT}")
    words = _path_of(model, model.get_input_embeddings())
    blocks = max(lists, key=lambda named: (_shared_steps(named[0], words), _size(named[1])))[0]
    return Architecture(blocks, _norm_after(model, blocks), _path_of(model, head))


def _norm_after(model: Any, blocks: str) -> str:
    parent, _, own = blocks.rpartition(".")
    children = list(resolve(model, parent).named_children())
    place = [name for name, _ in children].index(own)
    width = text_config(model.config).hidden_size
    norms = [(i, n) for i, (n, m) in enumerate(children) if "norm" in type(m).__name__.lower() and _fits(m, width)]
    if not norms:
        raise ReplibError(f"Cannot find the final norm of {type(model).__name__}. {_HINT}")
    name = next((n for i, n in norms if i > place), norms[-1][1])
    return f"{parent}.{name}".lstrip(".")


def _path_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _shared_steps(path: str, other: str) -> int:
    """Number of leading steps that two dotted paths share."""
    return len(os.path.commonprefix([path.split("."), other.split(".")]))


def _size(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


def _fits(norm: nn.Module, width: int) -> bool:
    """Whether a norm has the width of the stream; a norm without weights fits any."""
    return all(p.numel() == width for p in norm.parameters())


def resolve(model: nn.Module, path: str) -> Any:
    """The part at a dotted path."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ReplibError(f"{type(model).__name__} has no part {path!r}. {_HINT}") from error


def text_config(config: Any) -> Any:
    """The text part of a multimodal configuration, or the configuration itself."""
    return config.get_text_config()


def fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hex digits that change when the base weights do, with or without an adapter on them.

    Hash of 512 entries each of the first, the middle and the last two weights, read from disk if offloaded.
    Quantisation changes it.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    weights = [(n, p) for n, p in model.named_parameters() if "lora_" not in n]
    for name, weight in (weights[0], weights[len(weights) // 2], weights[-2], weights[-1]):
        flat = _materialised(model, name, weight).detach().flatten()
        sample = flat[:: max(1, flat.numel() // 512)][:512]
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _materialised(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """Weight in memory, also if accelerate offloaded it."""
    if not weight.is_meta:
        return weight
    from accelerate.utils import align_module_device, has_offloaded_params

    owner, _, own = name.rpartition(".")
    part = model.get_submodule(owner)
    if not has_offloaded_params(part):
        raise ReplibError(f"The weights {name} were never loaded: load the model from its files.")
    with align_module_device(part, torch.device("cpu")):
        return part.get_parameter(own).detach().clone()


def adapter_hash(model: nn.Module) -> str:
    """Sixteen hex digits of all adapter weights, in the order of their names; "" without an adapter."""
    added = sorted(_added(model), key=lambda pair: pair[0])
    digest = hashlib.sha256()
    for name, weight in added:
        digest.update(name.encode())
        digest.update(full_tensor(weight.detach()).to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16] if added else ""


def _added(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((n, p) for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n)
