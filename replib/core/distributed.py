"""Several processes of one command, as torchrun starts them: the part of each, its device, and its end with all others.

They meet in the small key-value store that torchrun keeps, when they are done and not before: they may differ by hours,
nothing idle is held open between them, and Ctrl-C reaches one that waits, which it would not inside a barrier.
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
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from replib.core.errors import ReplibError

DONE, FAILED = "replib/done", "replib/failed"
PAUSE = 0.5  # seconds between two looks at the others
LONGEST = 7 * 24 * 3600.0  # seconds to wait for them


def part() -> tuple[int, int]:
    """(i, n): this is process i of n; (0, 1) where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def is_first() -> bool:
    """Whether this process speaks for all."""
    return part()[0] == 0


def own_device(device: str | None) -> str | None:
    """The device of this process: of several on a machine each takes an accelerator of its own, if there are any.

    Args:
        device: what the settings say; "cpu" or a device with an index is left as it is.

    Raises:
        ReplibError: more processes than accelerators, or "auto", which spreads one model over all of them.
    """
    import torch

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
    """Do one's part inside, and leave when all are done. Yields `part`.

    torchrun ends the other processes of its machine when one fails. Those of other machines finish their part first,
    which is kept, and then end with the same error.

    Raises:
        ReplibError: another process failed, or was not heard of for a week.
    """
    if part()[1] == 1:
        yield part()
        return
    try:
        with catch_warnings():
            if not is_first():
                simplefilter("ignore")  # the first says them all
            yield part()
    except BaseException as error:
        with suppress(Exception):  # the error itself matters more
            _store().set(_key(FAILED), str(error) or type(error).__name__)
        raise
    try:
        _wait(_store(), part()[1])
    except RuntimeError as error:  # torch's word for a store that is gone
        raise ReplibError(f"Lost the other processes ({error}). Run the same command again: it goes on.") from error


def _wait(store: Any, count: int) -> None:
    end = time.monotonic() + LONGEST
    store.add(_key(DONE), 1)
    while (done := store.add(_key(DONE), 0)) < count:
        if store.check([_key(FAILED)]):
            reason = store.get(_key(FAILED)).decode()
            raise ReplibError(f"Another process failed: {reason} Finished shards are kept.")
        if time.monotonic() > end:
            raise ReplibError(f"Only {done} of {count} processes came to an end. Run the same command again.")
        time.sleep(PAUSE)


def _key(name: str) -> str:
    return f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # torchrun may start all of them again


def _store() -> Any:
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=timedelta(seconds=20)))[0]


T = TypeVar("T")


def several() -> bool:
    """Whether processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def broadcast(value: T) -> T:
    """What the first process holds, on all."""
    if not several():
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def gather(value: T) -> list[T]:
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


def sharded_launch() -> bool:
    """Whether ``accelerate launch`` was told to split weights or optimizer, and so to place them."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def is_split(model: nn.Module) -> bool:
    """Whether processes hold a part of the weights each, as with FSDP2."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def full_tensor(weight: Tensor) -> Tensor:
    """A weight, put together where it is split; then all processes must call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights in training, whole, in the memory of the CPU."""
    return {n: full_tensor(p.detach()).cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give weights the values that ``trained`` copied."""
    for name, weight in model.named_parameters():
        if name in weights:
            value = weights[name].to(weight.device)
            weight.copy_(_split_like(weight, value))


def _split_like(weight: Tensor, value: Tensor) -> Tensor:
    return distribute_tensor(value, weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else value
