"""A fresh LoRA adapter on the linear layers of a model's blocks, where wanted moved off its stationary start."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from replib.chat import ChatModel
from replib.errors import ReplibError


def attached_lora(
    model: ChatModel, *, rank: int, alpha: int, dropout: float = 0.0, blocks: int | None = None
) -> ChatModel:
    """The model with LoRA on every linear layer of its first ``blocks`` blocks (None: all); LoRA-B is zero.

    Raises:
        ReplibError: the model carries an adapter already.
    """
    if model.adapter or hasattr(model.model, "disable_adapter"):
        raise ReplibError(f"{model.name} carries an adapter already: load it without one, or merge it first.")
    chosen = None if blocks is None or blocks >= model.n_layers else list(range(blocks))
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(_linear(model)),
        layers_to_transform=chosen,
        layers_pattern=model.anatomy.blocks.rpartition(".")[2] if chosen else None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.blocks[0].modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings are not adapted: peft's advice on merging does not apply
        peft_model = get_peft_model(model.causal_lm, lora)
    return ChatModel(
        peft_model,
        model.tokenizer,
        name=model.name,
        revision=model.revision,
        adapter="repbend",
        template=model.template,
        anatomy=model.anatomy,
    )


def _linear(model: ChatModel) -> set[str]:
    """Names of the linear layers of the blocks; GPT-2's are called Conv1D and hold their transpose."""
    return {
        name.rpartition(".")[2]
        for block in model.blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


@torch.no_grad()
def perturb(model: ChatModel, std: float, seed: int) -> None:
    """Draw LoRA-B from a normal distribution instead of zeros, so that every term has a gradient at the first step."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.model.named_parameters():
        if "lora_B" in name:
            weight.copy_(std * torch.randn(weight.shape, generator=generator))
