"""Defences that first learn what they shall forget, from a model trained on unsafe answers: WHP and task arithmetic.

Who trains it is given as ``fit(model, data, objective)``, for example with the trainer's defaults::

    fit = lambda model, data, objective: train(model, data, objective, config=config)

Adapters are put onto the given model and taken off again: at no time is there a second copy of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch

from replib.core.distributed import part
from replib.core.errors import ReplibError, check_coefficients
from replib.data.mixtures import DefenceData, check_lists
from replib.data.prompts import Dialogue
from replib.defences import generic_logits, task_arithmetic
from replib.likelihood import SFT, Keep, asked
from replib.models.adapters import attached, detached
from replib.models.architecture import adapter_hash
from replib.models.chat_model import ChatModel, evaluating
from replib.models.forward import answer_states, answered, stretch_of, token_losses
from replib.training.config import TrainConfig
from replib.training.model_selection import Probe, default_choice
from replib.training.objective import Objective, Part, reference
from replib.training.result import TrainResult
from replib.training.train import Fit

GRID = tuple((safe, unsafe) for safe in (0.5, 1.0, 1.2) for unsafe in (0.0, 0.1, 0.2))
"""Weights (safe, unsafe) that RepBend's scripts merge with; its paper reports (0.5, 0.1)."""


@dataclass(frozen=True)
class Relabelled(Dialogue):
    """An unsafe answer, and what a model that never learned such answers would say at each of its tokens."""

    labels: tuple[int, ...] = field(default=(), kw_only=True)
    """One token id for each token of the answer, its end-of-sequence token among them."""


@dataclass(frozen=True)
class WHP(Objective):
    """Who's Harry Potter, Eldan & Russinovich 2023 (arXiv 2310.02238): generic words in the place of unsafe ones.

    L = −mean log p(label) over the tokens of unsafe answers + what ``keep`` says. Labels come from ``relabelled`` and
    do not change in training, so neither the reinforced model nor the base is run any more.

    RepBend's comparison trains 150 steps at rate 5e-5, once so and once with safe answers kept ("WHP retain").
    """

    name = "WHP"
    keep: Keep = Keep()

    def check(self, chat: ChatModel, data: Any) -> None:
        """Unsafe answers must be labelled; there must be those to keep."""
        del chat
        check_lists(self.name, data, "unsafe", *self.keep.lists)
        if bare := sum(not isinstance(d, Relabelled) for d in data.unsafe):
            raise ReplibError(f"{bare} of {len(data.unsafe)} unsafe answers have no labels: train a model on them with "
                              "SFT(side='unsafe') and give reinforced.relabelled(model, data.unsafe).")  # fmt: skip

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Labelled unsafe answers and those to keep."""
        return {"unsafe": config.contrasts} | self.keep.draws(config)

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """What is unlearned, then what is kept."""
        del progress
        yield self._forget(chat, items["unsafe"])
        yield from self.keep.parts(chat, items)

    def _forget(self, chat: ChatModel, rows: Sequence[Relabelled]) -> Part:
        states = answer_states(chat, answered(chat, asked(rows)))
        labels = torch.tensor([token for row in rows for token in row.labels], device=states.device)
        if len(labels) != len(states):
            raise ReplibError(f"{len(states)} answer tokens have {len(labels)} labels: they were made with another "
                              "tokenizer. Make them again with reinforced.relabelled.")  # fmt: skip
        loss = token_losses(chat, states, labels).mean()
        return Part(loss, {"generic": loss.detach()})


@torch.no_grad()
def relabelled(
    reinforced: ChatModel, unsafe: Sequence[Dialogue], *, alpha: float = 5.0, batch_size: int = 16
) -> list[Relabelled]:
    """Unsafe answers with their generic labels: the argmax of z_base − α ReLU(z_reinforced − z_base), Eq. 1 of WHP.

    Args:
        reinforced: a model with an adapter that was trained on unsafe answers; without it, it is the base.
        unsafe: the answers.
        alpha: how far tokens that became likelier are pushed down. RepBend's scripts have 0.5 and 5.
        batch_size: answers that are read at once.
    """
    check_coefficients(alpha=alpha)
    found: list[Relabelled] = []
    with evaluating(reinforced.model):
        for start in range(0, len(unsafe), batch_size):
            found += _labelled(reinforced, unsafe[start : start + batch_size], alpha)
    return found


def _labelled(reinforced: ChatModel, rows: Sequence[Dialogue], alpha: float) -> list[Relabelled]:
    batch = answered(reinforced, asked(rows))
    with reference(reinforced) as base:
        plain = answer_states(base, batch)
    size = stretch_of(reinforced)  # the unembedding is not adapted: one serves both
    pairs = zip(answer_states(reinforced, batch).split(size), plain.split(size), strict=True)
    labels = [generic_logits(*map(reinforced.logits, pair), alpha=alpha).argmax(dim=-1) for pair in pairs]
    each = torch.cat(labels).cpu().split(batch.response_mask.sum(dim=1).tolist())
    return [
        Relabelled(d.prompt, d.response, d.split, d.label, d.group, d.way, labels=tuple(part.tolist()))
        for d, part in zip(rows, each, strict=True)
    ]


def train_whp(model: ChatModel, data: DefenceData, fit: Fit, *, whp: WHP, alpha: float = 5.0) -> TrainResult:
    """WHP from the beginning: a reinforced adapter, its labels, and WHP itself on the model without that adapter."""
    reinforced = fit(model, data, SFT(side="unsafe")).model
    labels = relabelled(reinforced, data.unsafe, alpha=alpha)
    return fit(detached(reinforced), replace(data, unsafe=labels), whp)


@dataclass(frozen=True)
class TaskArithmetic:
    """Two SFT runs and their merge, chosen from a grid of weights: see ``merged_tasks``."""

    name: ClassVar[str] = "task arithmetic"
    grid: tuple[tuple[float, float], ...] = GRID

    def __post_init__(self) -> None:
        if not self.grid:
            raise ReplibError("The grid of weights is empty: give at least one pair (safe, unsafe).")
        for safe, unsafe in self.grid:
            check_coefficients(safe_weight=safe, unsafe_weight=unsafe)


def train_tasks(
    model: ChatModel, data: DefenceData, fit: Fit, *, out: Path | str
) -> tuple[tuple[Path, Path], TrainResult]:
    """Both adapters of task arithmetic, trained one after the other on safe and on unsafe answers.

    Returns:
        Their folders, and their logs: the history of both with a column ``side``.
    """
    check_lists("Task arithmetic", data, "safe", "unsafe")
    folders, histories = [], []
    for side in ("safe", "unsafe"):
        result = fit(model, data, SFT(side=side))
        folders.append(result.save(Path(out) / side))
        histories.append(result.history.assign(side=side))
        detached(result.model)
    return (folders[0], folders[1]), replace(result, history=pd.concat(histories, ignore_index=True))


def merged_tasks(
    model: ChatModel,
    tasks: tuple[Path, Path],
    probe: Probe,
    *,
    method: TaskArithmetic,
    choose: Callable[[dict[str, float], dict[str, float]], float] = default_choice,
    out: Path | str,
) -> tuple[ChatModel, pd.DataFrame]:
    """Task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089): θ₀ + w_s ΔW_safe − w_u ΔW_unsafe, weights by validation.

    Args:
        model: the model that both adapters were trained on, without an adapter.
        tasks: folders of the safe and of the unsafe adapter.
        probe: measures a merged model on validation prompts.
        method: the weights (w_s, w_u), zero or more: the minus is in the formula.
        choose: score of a probe given the probe of the model itself; the highest is kept.
        out: folder in which every merged adapter is written.

    Returns:
        The model with the best adapter on it, and the grid: safe_weight, unsafe_weight, score, adapter, and the probe.
        Its first row is the model itself, of weights zero and no adapter; it is not chosen.

    Raises:
        ReplibError: adapters that cannot be merged.
    """
    before = probe(model)
    rows = [{"safe_weight": 0.0, "unsafe_weight": 0.0, "score": choose(before, before), "adapter": ""} | before]
    for safe, unsafe in method.grid:
        folder = Path(out) / f"safe-{safe:g}-unsafe-{unsafe:g}"
        task_arithmetic(*tasks, out=folder, safe_weight=safe, unsafe_weight=unsafe)
        found = _found(model, folder, probe)
        about = {"safe_weight": safe, "unsafe_weight": unsafe, "score": choose(found, before), "adapter": str(folder)}
        rows.append(about | found)
    table = pd.DataFrame(rows)
    return attached(model, Path(table.adapter[table.score[1:].idxmax()])), table


def train_task_arithmetic(
    model: ChatModel, data: DefenceData, fit: Fit, *, method: TaskArithmetic, probe: Probe, out: Path | str
) -> TrainResult:
    """Task arithmetic from the beginning: both adapters, and the best of their merges, which ``probes`` lists.

    Raises:
        ReplibError: several processes, which would write the same merges.
    """
    if part()[1] > 1:
        raise ReplibError("Task arithmetic merges and measures adapters in one process: start it without torchrun.")
    tasks, logs = train_tasks(model, data, fit, out=out)
    best, table = merged_tasks(model, tasks, probe, method=method, out=out)
    steps = logs.config["train"]["steps"]
    probes = table.drop(columns="adapter").assign(step=[0, *[steps] * len(method.grid)])
    about = logs.config | {"method": method.name, "objective": asdict(method), "adapter_hash": adapter_hash(best.model)}
    return TrainResult(best, logs.history, probes, steps, about)


def _found(model: ChatModel, adapter: Path, probe: Probe) -> dict[str, float]:
    """What the probe measures under an adapter, which is gone afterwards."""
    bent = attached(model, adapter)
    try:
        return probe(bent)
    finally:
        detached(bent)
