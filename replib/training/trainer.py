"""A ``transformers.Trainer`` whose loss comes in parts from an objective, and its micro-batches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from replib.core.distributed import average_gradients, gather
from replib.core.errors import Diverged
from replib.core.progress import watched
from replib.models.chat_model import ChatModel
from replib.training.config import TrainConfig
from replib.training.objective import Objective, Part


def check_sane(
    step: int, found: Mapping[str, float], history: Sequence[Mapping[str, float | int]], config: TrainConfig, dtype: str
) -> None:
    """Raise Diverged if a term is not finite, or if states have grown beyond ``config.max_growth``.

    Args:
        step: counted from 1.
        found: loss and terms of a micro-batch; norms of states end in ``_norm``.
        history: the same of earlier micro-batches.
        config: sets the largest growth.
        dtype: type of the weights.
    """
    if bad := [name for name, x in found.items() if not math.isfinite(x)]:
        overflow = " Weights in float16 overflow where bfloat16 does not." if dtype == "torch.float16" else ""
        raise Diverged(
            f"At step {step} {', '.join(bad)} is not finite ({_named(found)}): lower the learning rate "
            f"{config.learning_rate:g} or the weight of {_culprit(found, bad)}, or set max_distance.{overflow}"
        )
    most = config.max_growth
    for name, first in history[0].items() if history and most else ():
        if name.endswith("_norm") and most and found[name] > most * first:
            raise Diverged(
                f"At step {step} {name} is {found[name]:.3g}, more than {most:g} times its value at the first step "
                f"({_named(found)}): lower the learning rate {config.learning_rate:g} or alpha, set max_distance, or "
                "allow more with max_growth."
            )


def _culprit(found: Mapping[str, float], bad: Sequence[str]) -> str:
    """Name of the first non-finite term; if only the sum is non-finite, the largest term."""
    terms = [name for name in found if name != "loss" and not name.endswith("_norm")]
    return next((name for name in terms if name in bad), max(terms, key=lambda name: abs(found[name])))


def _named(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {x:.4g}" for name, x in found.items())


class Bar(TrainerCallback):
    """Progress bar with the terms of the last micro-batch, shown on terminals and in notebooks."""

    def __init__(self, history: Sequence[Mapping[str, float]]):
        self.history = history
        self.bar: Any = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Show the bar from the current step on."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", disable=not watched())

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Advance by one step."""
        self.bar.set_postfix(
            {name: f"{x:.3g}" for name, x in self.history[-1].items() if name != "step"}, refresh=False
        )
        self.bar.update()

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


class Steps(Dataset):
    """Micro-batches of dialogues, each a mapping from list name to rows; shuffled once from the seed."""

    def __init__(
        self, lists: Mapping[str, Sequence[Any]], draws: Mapping[str, int], config: TrainConfig, processes: int = 1
    ):
        rng = random.Random(config.seed)
        drawn = {name: (_endless(lists[name], rng), n) for name, n in draws.items()}
        self.steps = [
            {name: list(islice(items, n)) for name, (items, n) in drawn.items()}
            for _ in range(config.steps * config.accumulation * processes)
        ]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> dict[str, list]:
        return self.steps[i]


def _endless(items: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    while items:
        yield from rng.sample(items, len(items))


class DefenceTrainer(Trainer):
    """The Trainer with the loss of an objective; ``history`` holds every term of every micro-batch."""

    def __init__(self, *, chat: ChatModel, objective: Objective, config: TrainConfig, **kwargs: Any):
        super().__init__(model=chat.model, data_collator=lambda rows: rows[0], **kwargs)
        self.remove_callback(PrinterCallback)
        self.chat, self.objective, self.config = chat, objective, config
        self.history: list[dict[str, float]] = []
        self.bar = Bar(self.history)
        self.add_callback(self.bar)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take the gradient of one micro-batch, part by part; returns the loss."""
        if self.is_deepspeed_enabled:  # it averages gradients itself and expects one backward pass
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        found: dict[str, Tensor] = {}
        for part in self._parts(inputs):
            self.accelerator.backward(part.loss / self.current_gradient_accumulation_steps)
            _add(found, part)
        if self.accelerator.sync_gradients:
            average_gradients(self.chat.model)
        self._log_steps(found)
        return found["loss"] / self.current_gradient_accumulation_steps

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """Loss of one micro-batch as a whole, for DeepSpeed's single backward pass."""
        del model
        parts = list(self._parts(inputs))
        found: dict[str, Tensor] = {}
        for part in parts:
            _add(found, part)
        self._log_steps(found)
        return torch.stack([part.loss for part in parts]).sum()

    def _parts(self, inputs: Any) -> Iterator[Part]:
        return self.objective.parts(self.chat, inputs, self.state.global_step / max(1, self.state.max_steps))

    def _log_steps(self, found: dict[str, Tensor]) -> None:
        """Log the rows of all processes, so that all stop together on a non-finite loss."""
        for each in gather({name: x.item() for name, x in found.items()}):
            self._log_step(each)

    def _log_step(self, found: dict[str, float]) -> None:
        step = self.state.global_step + 1
        check_sane(step, found, self.history, self.config, str(self.chat.dtype))
        self.history.append({"step": step} | found)


def _add(found: dict[str, Tensor], part: Part) -> None:
    for name, x in {"loss": part.loss, **part.terms}.items():
        found[name] = found.get(name, 0) + x.detach()


def arguments(config: TrainConfig, out: Path, *, cpu: bool = False) -> TrainingArguments:
    """Arguments of the Trainer, which trains on the model's device."""
    args = TrainingArguments(
        output_dir=str(out),
        use_cpu=cpu,
        max_steps=config.steps,
        gradient_accumulation_steps=config.accumulation,
        per_device_train_batch_size=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # else the Trainer splits a micro-batch over all visible GPUs
    return args
