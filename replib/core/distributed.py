"""Processes of one torchrun command: their parts, devices, joint end and collectives.

Independent parts meet in torchrun's key-value store at their end only. They may differ by hours, no connection stays
open, and Ctrl-C reaches a waiting process, unlike inside a barrier.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar
from warnings import catch_warnings, simplefilter

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object, wait_for_everyone
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from replib.core.errors import ReplibError

DONE, FAILED = "replib/done", "replib/failed"
PAUSE = 0.5  # seconds between two polls
LONGEST = 7 * 24 * 3600.0  # seconds to wait for other processes


def part() -> tuple[int, int]:
    """Return (i, n) for process i of n; (0, 1) without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def is_first() -> bool:
    """Whether this process writes and reports for all."""
    return part()[0] == 0


def own_device(device: str | None) -> str | None:
    """Return the device of this process; several processes on a machine take an accelerator each.

    Args:
        device: the setting; "cpu" or a device with an index is left as it is.

    Raises:
        ReplibError: more processes than accelerators, or "auto", which spreads one model over all of them.
    """
    if part()[1] == 1 or device == "cpu" or ":" in (device or ""):
        return device
    if device == "auto":
        raise ReplibError("device=auto spreads one model over all GPUs: start one process, without torchrun.")
    if not torch.accelerator.is_available():
        return device
    here, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
    if here >= count:
        started = os.environ["LOCAL_WORLD_SIZE"]
        raise ReplibError(f"{started} processes, but {count} GPU(s) here: start torchrun --nproc_per_node={count}.")
    torch.accelerator.set_device_index(here)
    return f"{device or torch.accelerator.current_accelerator()}:{here}"


@contextmanager
def together() -> Iterator[tuple[int, int]]:
    """Yield ``part``; leave when all processes are done.

    torchrun ends the other processes of its machine when one fails. Processes of other machines finish their part and
    then raise the same error.

    Raises:
        ReplibError: another process failed, or did not end within a week.
    """
    if part()[1] == 1:
        yield part()
        return
    try:
        with catch_warnings():
            if not is_first():
                simplefilter("ignore")  # the first process warns for all
            yield part()
    except BaseException as error:
        with suppress(Exception):  # the error itself matters more
            _store().set(_key(FAILED), str(error) or type(error).__name__)
        raise
    try:
        _wait(_store(), part()[1])
    except RuntimeError as error:  # torch raises it for a store that is gone
        raise ReplibError(f"Lost the other processes ({error}). Run the same command again: it goes on.") from error


def _wait(store: Any, count: int) -> None:
    end = time.monotonic() + LONGEST
    store.add(_key(DONE), 1)
    while (done := store.add(_key(DONE), 0)) < count:
        if store.check([_key(FAILED)]):
            reason = store.get(_key(FAILED)).decode()
            raise ReplibError(f"Another process failed: {reason} Finished shards are kept.")
        if time.monotonic() > end:
            raise ReplibError(f"Only {done} of {count} processes finished. Run the same command again.")
        time.sleep(PAUSE)


def _key(name: str) -> str:
    return f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # torchrun may start all of them again


def _store() -> Any:
    return next(dist.rendezvous("env://", timeout=timedelta(seconds=20)))[0]


_Shared = TypeVar("_Shared")


def several() -> bool:
    """Whether processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def broadcast(value: _Shared) -> _Shared:
    """Return the value of the first process on all processes."""
    return broadcast_object_list([value])[0] if several() else value


def gather(value: _Shared) -> list[_Shared]:
    """Return the values of all processes by rank, on all processes."""
    return gather_object([value]) if several() else [value]


def wait() -> None:
    """Wait for all processes."""
    if several():
        wait_for_everyone()


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Average each gradient over processes; a missing gradient counts as zero."""
    if not several():
        return
    for weight in model.parameters():
        if weight.requires_grad and not isinstance(weight, DTensor):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()


def sharded_launch() -> bool:
    """Whether ``accelerate launch`` splits weights or optimizer, and so places the model."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def is_split(model: nn.Module) -> bool:
    """Whether each process holds a part of the weights, as with FSDP2."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def full_tensor(weight: Tensor) -> Tensor:
    """Return a weight whole; all processes must call it where the weight is split."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


# torch's get_model_state_dict(full_state_dict, cpu_offload) fills the first process alone, aliases weights that are on
# the CPU already, and set_model_state_dict refuses a model that is spread over several devices.
def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copy the weights in training, whole, to the CPU."""
    return {n: full_tensor(p.detach()).cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give weights the values that ``trained`` copied."""
    for name, weight in model.named_parameters():
        if name in weights:
            value = weights[name].to(weight.device)
            if isinstance(weight, DTensor):
                value = distribute_tensor(value, weight.device_mesh, weight.placements)
            weight.copy_(value)
