"""One rank of a small training run of several processes: what it gives goes to ``<out>/rank-<i>.pt``.

torchrun --nproc_per_node=2 tests/joined.py MODEL OUT ACCUMULATION [FAULT]
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState

from helpers.resumed import CONFIG, DATA
from replib.core.distributed import full_tensor, is_split, sharded_launch
from replib.core.errors import ReplibError
from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import RepBend
from replib.models.load import load
from replib.training.objective import reference
from replib.training.train import train
from replib.training.trainer import DefenceTrainer

SEEN = {}


def watched(chat, items):
    """The wrapper's name, logits with the adapter on and off, and the rows of a hooked block."""
    texts = [c.prompt for c in items["contrasts"]]
    shapes = []
    hook = chat.blocks[1].register_forward_hook(lambda _m, _a, out: shapes.append(tuple(out.shape)))
    with torch.no_grad():
        on = chat.forward(chat.encode(texts))
    with reference(chat) as base:
        off = base.forward(base.encode(texts))
    hook.remove()
    SEEN.update(texts=texts, on=on.detach(), off=off.detach(), shapes=shapes, split=is_split(chat.model))


class Watching(RepBend):
    def parts(self, chat, items, progress):
        if progress > 0.5 and not SEEN:
            watched(chat, items)
        yield from super().parts(chat, items, progress)


def main(folder, out, accumulation, fault=""):
    rank = int(os.environ.get("RANK", "0"))
    config = replace(CONFIG, accumulation=int(accumulation), dropout=0.0, schedule="constant", perturbation=1e-2)
    if fault and rank == 1:
        step = DefenceTrainer.training_step

        def failing(self, *rest):
            if self.state.global_step == 5:
                if fault == "kill":
                    os.kill(os.getpid(), 9)
                raise ReplibError("rank 1 has had enough.")
            return step(self, *rest)

        DefenceTrainer.training_step = failing
    objective = Watching(BendConfig(target_layers=(0, 1)))
    validation = lambda chat: drift_whole(chat, rank)  # noqa: E731
    result = train(
        load(folder), DATA, objective, config=config, validation=validation, out=Path(out) / "run", say=lambda _: None
    )
    lora = {n: full_tensor(p.detach()).clone() for n, p in result.model.model.named_parameters() if "lora_" in n}
    wrapper = str(getattr(dist, "is_initialized", bool)() and dist.get_backend())
    result.save(Path(out) / "adapter")
    torch.save(
        SEEN | {"lora": lora, "history": result.history.to_dict("list"), "probes": result.probes.to_dict("list"),
                "step": result.step, "backend": wrapper},
        Path(out) / f"rank-{rank}.pt",
    )  # fmt: skip


def drift_whole(chat, rank):
    """A probe that would choose another step on another rank."""
    size = sum(full_tensor(p.detach()).abs().sum().item() for n, p in chat.model.named_parameters() if "lora_B" in n)
    return {"attack": abs(size - 8.0) + rank}


def allow_fsdp_on_the_cpu():
    """accelerate shards on accelerators alone; PyTorch's FSDP2 itself runs on the CPU as well."""
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


if __name__ == "__main__":
    if sharded_launch():
        allow_fsdp_on_the_cpu()
    main(*sys.argv[1:])
