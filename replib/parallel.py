"""Training in several processes: what they add up, agree on and gather; for one process none of it does anything.

The trainer calls the model itself, in several passes and backward passes a micro-batch, never the wrapper that
PyTorch's DDP puts around it: so gradients are averaged here, once an optimizer step. FSDP2 averages those of the
weights that it splits, DeepSpeed all. Each process keeps a queue of RepBend by itself, of the prompts that it saw.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


def several() -> bool:
    """Whether processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def shared(value: T) -> T:
    """What the first process holds, on all."""
    if not several():
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def gathered(value: T) -> list[T]:
    """What each process holds, by rank, on all."""
    if not several():
        return [value]
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, value)
    return held


def wait() -> None:
    """Until all processes are here."""
    if several():
        dist.barrier()


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Make each gradient the mean over processes; one that a process lacks counts as zero."""
    if not several():
        return
    for weight in model.parameters():
        if weight.requires_grad and not isinstance(weight, DTensor):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()


def splits() -> bool:
    """Whether ``accelerate launch`` was told to split weights or optimizer, and so to place them."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def is_split(model: nn.Module) -> bool:
    """Whether processes hold a part of the weights each, as with FSDP2."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(weight: Tensor) -> Tensor:
    """A weight, put together where it is split; then all processes must call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights in training, whole, in the memory of the CPU."""
    return {n: whole(p.detach()).cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give weights the values that ``trained`` copied."""
    for name, weight in model.named_parameters():
        if name in weights:
            value = weights[name].to(weight.device)
            weight.copy_(_split_like(weight, value))


def _split_like(weight: Tensor, value: Tensor) -> Tensor:
    return distribute_tensor(value, weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else value
