"""What is looked at while training runs: a bar with the terms of the loss, and an end before a model is ruined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from replib.core.errors import Diverged
from replib.core.progress import watched
from replib.recipe import TrainConfig


def check_sane(
    step: int, found: Mapping[str, float], history: Sequence[Mapping[str, float | int]], config: TrainConfig, dtype: str
) -> None:
    """Raise Diverged where a term is no number, or where states have grown beyond ``config.max_growth``.

    Args:
        step: counted from 1.
        found: loss and terms of a micro-batch; the norms of states are called ``*_norm``.
        history: those of the micro-batches before.
        config: says how much growth is too much.
        dtype: of the weights, named where it may be the reason.
    """
    if bad := [name for name, x in found.items() if not math.isfinite(x)]:
        overflow = " Weights in float16 overflow where bfloat16 does not." if dtype == "torch.float16" else ""
        raise Diverged(
            f"At step {step} no number came out for {', '.join(bad)} ({_named(found)}): lower the learning rate "
            f"{config.learning_rate:g} or the weight of {_culprit(found, bad)}, or set max_distance.{overflow}"
        )
    most = config.max_growth
    for name, first in history[0].items() if history and most else ():
        if name.endswith("_norm") and most and found[name] > most * first:
            raise Diverged(
                f"At step {step} {name} is {found[name]:.3g}, more than {most:g} times what it was at the first step "
                f"({_named(found)}): lower the learning rate {config.learning_rate:g} or alpha, set max_distance, or "
                "allow more with max_growth."
            )


def _culprit(found: Mapping[str, float], bad: Sequence[str]) -> str:
    """The first term that is no number; where only their sum is none, the largest."""
    terms = [name for name in found if name != "loss" and not name.endswith("_norm")]
    return next((name for name in terms if name in bad), max(terms, key=lambda name: abs(found[name])))


def _named(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {x:.4g}" for name, x in found.items())


class Bar(TrainerCallback):
    """A progress bar with the terms of the last micro-batch, where somebody looks on."""

    def __init__(self, history: Sequence[Mapping[str, float]]):
        self.history = history
        self.bar: Any = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Show it, at the step where the run goes on."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", disable=not watched())

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """One step more."""
        self.bar.set_postfix(
            {name: f"{x:.3g}" for name, x in self.history[-1].items() if name != "step"}, refresh=False
        )
        self.bar.update()

    def close(self) -> None:
        """Take it away."""
        if self.bar is not None:
            self.bar.close()
