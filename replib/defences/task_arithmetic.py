"""The defences RepBend is compared with: each loss a pure function of tensors, named as in its own paper.

Hidden states come as `[layers tokens dim]`, counted tokens only, as in `replib.defences.repbend.config`; log-probabilities as
one number a response, in nats. Every loss is a scalar to be minimised, computed in float32 or wider.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor

from replib.core.distributed import part
from replib.core.errors import ReplibError, check_coefficients
from replib.data.mixtures import DefenceData, check_lists
from replib.defences.sft import SFT
from replib.models.adapters import attached, detached
from replib.models.architecture import adapter_hash
from replib.models.chat_model import ChatModel
from replib.training.model_selection import Measure, default_choice
from replib.training.result import TrainResult
from replib.training.train import Fit


def task_arithmetic(
    safe: str | Path,
    unsafe: str | Path,
    *,
    out: str | Path,
    safe_weight: float = 1.0,
    unsafe_weight: float = 1.0,
) -> Path:
    """Write the LoRA adapter of `merge_lora` for two saved adapters of one base model; returns its folder.

    Ilharco et al. 2023 (arXiv 2212.04089): θ = θ₀ + w_s ΔW_safe − w_u ΔW_unsafe. The base is not touched.
    """
    from safetensors.torch import load_file, save_file

    configs = [_read_adapter(Path(folder)) for folder in (safe, unsafe)]
    if configs[0]["base_model_name_or_path"] != configs[1]["base_model_name_or_path"]:
        raise ReplibError(f"adapters '{safe}' and '{unsafe}' were trained on different base models; merge only like.")
    signed = (safe_weight * _scaling(configs[0]), -unsafe_weight * _scaling(configs[1]))
    states = [load_file(Path(folder) / "adapter_model.safetensors") for folder in (safe, unsafe)]
    merged = merge_lora(states[0], states[1], weights=signed)
    rank = configs[0]["r"] + configs[1]["r"]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(merged, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {**configs[0], "r": rank, "lora_alpha": rank, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def merge_lora(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, weights: tuple[float, float]
) -> dict[str, Tensor]:
    """LoRA state whose delta is w₁ B₁A₁ + w₂ B₂A₂, exactly: the ranks are stacked, the weights go into B."""
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[:3]
        raise ReplibError(f"the adapters do not touch the same modules, e.g. {odd}; train both on the same targets.")
    return {name: _stack(name, first[name], second[name], weights) for name in first}


def _stack(name: str, first: Tensor, second: Tensor, weights: tuple[float, float]) -> Tensor:
    if ".lora_A." in name:
        return torch.cat([first, second], dim=0).contiguous()
    if ".lora_B." in name:
        return torch.cat([weights[0] * first, weights[1] * second], dim=1).contiguous()
    raise ReplibError(f"'{name}' is no plain LoRA matrix (DoRA, bias or a saved module); only LoRA can be merged.")


def _read_adapter(folder: Path) -> dict:
    """The adapter's configuration; refused where one scaling does not hold for all of its modules."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReplibError(f"'{folder}' has no adapter_config.json; give the folder of a saved LoRA adapter.") from error
    odd = [key for key in ("use_dora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or odd:
        raise ReplibError(f"'{folder}' is not a plain LoRA adapter ({odd or config.get('peft_type')}); retrain it.")
    return config


def _scaling(config: dict) -> float:
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


GRID = tuple((safe, unsafe) for safe in (0.5, 1.0, 1.2) for unsafe in (0.0, 0.1, 0.2))
"""Weights (safe, unsafe) that RepBend's scripts merge with; its paper reports (0.5, 0.1)."""


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
    validation: Measure,
    *,
    method: TaskArithmetic,
    choose: Callable[[dict[str, float], dict[str, float]], float] = default_choice,
    out: Path | str,
) -> tuple[ChatModel, pd.DataFrame]:
    """Task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089): θ₀ + w_s ΔW_safe − w_u ΔW_unsafe, weights by validation.

    Args:
        model: the model that both adapters were trained on, without an adapter.
        tasks: folders of the safe and of the unsafe adapter.
        validation: measures a merged model on validation prompts.
        method: the weights (w_s, w_u), zero or more: the minus is in the formula.
        choose: score of a measurement given that of the model itself; the highest is kept.
        out: folder in which every merged adapter is written.

    Returns:
        The model with the best adapter on it, and the grid: safe_weight, unsafe_weight, score, adapter, and the probe.
        Its first row is the model itself, of weights zero and no adapter; it is not chosen.

    Raises:
        ReplibError: adapters that cannot be merged.
    """
    before = validation(model)
    rows = [{"safe_weight": 0.0, "unsafe_weight": 0.0, "score": choose(before, before), "adapter": ""} | before]
    for safe, unsafe in method.grid:
        folder = Path(out) / f"safe-{safe:g}-unsafe-{unsafe:g}"
        task_arithmetic(*tasks, out=folder, safe_weight=safe, unsafe_weight=unsafe)
        found = _found(model, folder, validation)
        about = {"safe_weight": safe, "unsafe_weight": unsafe, "score": choose(found, before), "adapter": str(folder)}
        rows.append(about | found)
    table = pd.DataFrame(rows)
    return attached(model, Path(table.adapter[table.score[1:].idxmax()])), table


def train_task_arithmetic(
    model: ChatModel, data: DefenceData, fit: Fit, *, method: TaskArithmetic, validation: Measure, out: Path | str
) -> TrainResult:
    """Task arithmetic from the beginning: both adapters, and the best of their merges, which ``probes`` lists.

    Raises:
        ReplibError: several processes, which would write the same merges.
    """
    if part()[1] > 1:
        raise ReplibError("Task arithmetic merges and measures adapters in one process: start it without torchrun.")
    tasks, logs = train_tasks(model, data, fit, out=out)
    best, table = merged_tasks(model, tasks, validation, method=method, out=out)
    steps = logs.config["train"]["steps"]
    probes = table.drop(columns="adapter").assign(step=[0, *[steps] * len(method.grid)])
    about = logs.config | {"method": method.name, "objective": asdict(method), "adapter_hash": adapter_hash(best.model)}
    return TrainResult(best, logs.history, probes, steps, about)


def _found(model: ChatModel, adapter: Path, validation: Measure) -> dict[str, float]:
    """What the probe measures under an adapter, which is gone afterwards."""
    bent = attached(model, adapter)
    try:
        return validation(bent)
    finally:
        detached(bent)
