"""Selection of a training step, and of a share of its adapter, by measurements on validation prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from replib.core.distributed import broadcast, load_trained, trained
from replib.core.errors import ReplibError
from replib.models.architecture import adapter_hash
from replib.models.chat_model import ChatModel
from replib.training.result import TrainResult

Measure = Callable[[ChatModel], dict[str, float]]


def default_choice(now: dict[str, float], before: dict[str, float]) -> float:
    """Score of a measurement: minus attack success, degenerate answers and losses of benign behaviour.

    A loss of a benign rate beyond two points counts tenfold.
    """
    lost = [max(0.0, before[k] - now[k]) for k in ("harmless", "borderline", "skill") if k in before]
    beyond = sum(max(0.0, x - 0.02) for x in lost)
    return -now.get("attack", 0.0) - now.get("degenerate", 0.0) - sum(lost) - 10 * beyond


class BestStepCallback(TrainerCallback):
    """Measures validation prompts every few steps, keeps the best adapter, and stops early without improvement.

    Every process runs the measurement, since split weights need all of them; the result of the first one counts.

    Args:
        chat: the model in training.
        validation: measures the model; None keeps the last step.
        choose: score of a measurement given the one before training.
        every: steps between measurements; the last step is always measured.
        patience: measurements in a row without a better score before training ends; None trains all steps.
    """

    def __init__(
        self,
        chat: ChatModel,
        validation: Measure | None,
        choose: Callable[..., float],
        every: int,
        patience: int | None = None,
    ):
        self.chat, self.validation, self.choose, self.every, self.patience = chat, validation, choose, every, patience
        self.rows: list[dict[str, float]] = []
        self.before: dict[str, float] = {}
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.steps = self.waited = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Measure the model before the first step."""
        if self.validation and not self.rows:  # a resumed run has this row
            self.before = broadcast(self.validation(self.chat))
            self.rows.append({"step": 0} | self.before)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure and compare at every ``every``-th step and at the last one."""
        self.steps = state.global_step
        if not self.validation or (self.steps % self.every and self.steps < state.max_steps):
            return
        found = broadcast(self.validation(self.chat))
        self.rows.append({"step": self.steps} | found)
        self.waited += 1
        self._compare(self.choose(found, self.before))
        control.should_training_stop |= self.patience is not None and self.waited >= self.patience

    def _compare(self, score: float) -> None:
        if self.best is None or score > self.best[0]:
            self.best, self.waited = (score, self.steps, trained(self.chat.model)), 0

    def restore_best(self) -> int:
        """Load the best adapter; returns its step."""
        if self.best is None:
            return self.steps
        load_trained(self.chat.model, self.best[2])
        return self.best[1]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """State for a checkpoint: plain values, and the best adapter."""
        known = {"rows": self.rows, "before": self.before, "waited": self.waited, "best": self.best and self.best[:2]}
        return known, self.best[2] if self.best else {}

    def restore(self, known: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Restore the result of ``state``."""
        self.rows, self.before, self.waited = known["rows"], known["before"], known["waited"]
        self.best = (*known["best"], weights) if known["best"] else None


SHARES = (1.0, 0.85, 0.7)


def interpolated(
    result: TrainResult,
    validation: Measure,
    choose: Callable[[dict[str, float], dict[str, float]], float] = default_choice,
    shares: Sequence[float] = SHARES,
) -> TrainResult:
    """Scale the adapter by the share with the best validation score; ties take the largest.

    LoRA-B is scaled in place, so that the saved adapter is bit for bit the measured one. ``config["shares"]`` lists the
    measurement of every share.

    Args:
        result: of a training with this validation.
        validation: measures a model on validation prompts.
        choose: score of a measurement given that of the model before training.
        shares: of ΔW, above 0 and at most 1.

    Raises:
        ReplibError: a share outside (0, 1], no adapter, or a training without validation.
    """
    _check(result, shares)
    rows = result.probes.set_index("step")
    before, whole = rows.loc[0].to_dict(), rows.loc[result.step].to_dict()
    weights = _factors(result.model)
    originals = {name: weight.clone() for name, weight in weights.items()}

    def measured(share: float) -> dict[str, float]:
        if share == 1:
            return whole
        _scale(weights, originals, share)
        return validation(result.model)

    found = {share: measured(share) for share in shares}
    best = max(found, key=lambda share: (choose(found[share], before), share))
    _scale(weights, originals, best)
    about = {"share": best, "shares": [{"share": share} | x for share, x in found.items()]}
    return replace(result, config=result.config | about | {"adapter_hash": adapter_hash(result.model.model)})


def _check(result: TrainResult, shares: Sequence[float]) -> None:
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ReplibError(f"shares={tuple(shares)}: give at least one, each above 0 and at most 1.")
    if not _factors(result.model):
        raise ReplibError(f"{result.model.name} carries no LoRA adapter: only LoRA's ΔW is interpolated here.")
    if not {0, result.step} <= set(result.probes.get("step", ())):
        raise ReplibError("This training had no validation: train it with the measure that chooses the share.")


def _factors(model: ChatModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.model.named_parameters() if ".lora_B." in name}


@torch.no_grad()
def _scale(weights: dict[str, Tensor], originals: dict[str, Tensor], share: float) -> None:
    for name, weight in weights.items():
        weight.copy_(share * originals[name])
