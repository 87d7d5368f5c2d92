"""LoRA adapters: creation, perturbed start, loading, removal and merging; and full-weight training copies."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from replib.core.errors import ReplibError
from replib.models.architecture import adapter_hash, fingerprint
from replib.models.chat_model import ChatModel


def attached_lora(
    model: ChatModel,
    *,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    blocks: Collection[int] | None = None,
    modules: Collection[str] | None = None,
    name: str = "untrained",
) -> ChatModel:
    """Model with new LoRA matrices on linear layers of some blocks; LoRA-B is zero.

    Args:
        model: an adapter-free model.
        rank: rank of the matrices A and B.
        alpha: B A is multiplied by alpha / rank.
        dropout: fraction of the inputs of A zeroed in training.
        blocks: indices of the adapted blocks, default all.
        modules: suffixes of the adapted layers, for example ``["q_proj", "v_proj"]`` or ``["mlp.c_proj"]``; default
            all linear layers.
        name: adapter name in provenance until it is saved.

    Raises:
        ReplibError: the model carries an adapter already, or has no such layers.
    """
    if model.adapter or hasattr(model.model, "disable_adapter"):
        raise ReplibError(f"{model.name} carries an adapter already: load it without one, or merge it first.")
    chosen = None if blocks is None or len(set(blocks)) == model.n_layers else sorted(blocks)
    linear = _linear(model)
    if unknown := [name for name in modules or () if not any(f".{path}".endswith(f".{name}") for path in linear)]:
        raise ReplibError(f"{model.name} has no linear layers called {', '.join(unknown)} in its blocks: "
                          f"they are {', '.join(sorted(linear))}.")  # fmt: skip
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(modules or {path.rpartition(".")[2] for path in linear}),
        layers_to_transform=chosen,
        layers_pattern=model.architecture.blocks.rpartition(".")[2] if chosen else None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.blocks[0].modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on tied embeddings does not apply: they are not adapted
        peft_model = get_peft_model(model.causal_lm, lora)
    return model.rebind(peft_model, adapter=name)


def detached(model: ChatModel) -> ChatModel:
    """Model without its adapter, sharing the base weights.

    Raises:
        ReplibError: the model carries no adapter, or a merged one.
    """
    if not hasattr(model.model, "unload"):
        raise ReplibError(f"{model.name} carries no adapter to remove.")
    return model.rebind(model.model.eval().unload())


def unfrozen(model: ChatModel) -> ChatModel:
    """Model with all weights trainable, and a copy of the start weights as ``frozen``.

    Raises:
        ReplibError: the model carries an adapter, or its weights are quantised.
    """
    if hasattr(model.model, "disable_adapter") or getattr(model.causal_lm, "is_quantized", False):
        raise ReplibError(f"{model.name} cannot be trained in full: it carries an adapter or quantised weights.")
    tuned = copy(model)
    tuned.frozen = model.rebind(deepcopy(model.model).eval().requires_grad_(False))
    tuned.model.requires_grad_(True)
    return tuned


@torch.no_grad()
def undone(tuned: ChatModel) -> None:
    """Restore the model to its state before training."""
    if tuned.frozen is None:
        detached(tuned)
        return
    for weight, before in zip(tuned.model.parameters(), tuned.frozen.model.parameters(), strict=True):
        weight.copy_(before)
    tuned.model.eval()


def _linear(model: ChatModel) -> set[str]:
    """Paths of the linear layers within blocks; GPT-2 uses Conv1D, with transposed weights."""
    return {
        name
        for block in model.blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


@torch.no_grad()
def perturb(model: ChatModel, std: float, seed: int) -> None:
    """Draw LoRA-B from N(0, std²) instead of zeros, so that every loss term has a gradient at the first step."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.model.named_parameters():
        if "lora_B" in name:
            weight.copy_(std * torch.randn(weight.shape, generator=generator))


def attached(model: ChatModel, adapter: Path | str) -> ChatModel:
    """Model with a saved LoRA adapter; the base weights are shared, and ``adapter_off`` restores the base.

    Args:
        model: base model of the adapter.
        adapter: folder or Hugging Face id.

    Raises:
        ReplibError: no adapter found, or an adapter of another base.
    """
    from peft import PeftModel

    folder = _adapter_folder(str(adapter))
    if not (folder / "adapter_config.json").exists():
        raise ReplibError(
            f"{str(folder)!r} holds no adapter_config.json: pass the folder that `replib bend` or "
            "peft's save_pretrained wrote, or a hub id."
        )
    card = folder / "replib.json"
    expected = json.loads(card.read_text()).get("fingerprint") if card.exists() else None
    if expected and getattr(model.causal_lm, "is_quantized", False):
        warnings.warn(
            f"The base of the adapter in {str(folder)!r} cannot be verified: this model is quantised.", stacklevel=3
        )
    elif expected not in (None, found := fingerprint(model.causal_lm)):
        raise ReplibError(
            f"The adapter in {str(folder)!r} was trained on another model (base fingerprint {expected}, this one "
            f"is {found}). Load the base it names in {card.name}."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers, outside the user's control
            peft_model = PeftModel.from_pretrained(model.causal_lm, folder)
    except (RuntimeError, ValueError) as error:
        raise ReplibError(
            f"The adapter in {str(folder)!r} does not fit this model: {str(error).splitlines()[0]} "
            "Load the base model that its adapter_config.json names."
        ) from error
    return model.rebind(peft_model.eval(), adapter=str(adapter))


def _adapter_folder(adapter: str) -> Path:
    """Folder as given, or the download folder of a hub id."""
    if Path(adapter).exists() or adapter.count("/") != 1 or adapter.startswith((".", "/", "~")):
        return Path(adapter)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(adapter, allow_patterns=["adapter_*", "replib.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ReplibError(
            f"{adapter!r} is not a local folder, and the hub has no such adapter: {str(error).splitlines()[0]} "
            "Check the spelling and the network, or pass a folder."
        ) from error


def merged(model: ChatModel) -> ChatModel:
    """Model with its adapter merged into the weights: half the work per pass, the same logits up to rounding.

    For inference only: the given model is consumed, and ``adapter_off`` of the merged one raises ReplibError.
    """
    return _merged(model, model.model)


def merged_copy(model: ChatModel) -> ChatModel:
    """``merged`` of a copy, to measure a model during training; the given model is unchanged."""
    return _merged(model, deepcopy(model.model))


def _merged(model: ChatModel, peft_model: Any) -> ChatModel:
    if not hasattr(peft_model, "merge_and_unload"):
        raise ReplibError(f"{model.name} carries no adapter to merge.")
    added = adapter_hash(peft_model)
    return model.rebind(peft_model.merge_and_unload().eval(), adapter=model.adapter, merged=added)
