"""Task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089): the unsafe task vector is subtracted, the safe one added."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from peft import PeftConfig, PeftModel
from safetensors import safe_open

from replib.core.distributed import part
from replib.core.errors import ReplibError, check_coefficients
from replib.data.mixtures import DefenceData, check_lists
from replib.defences.sft import SFT
from replib.models.adapters import attached, detached
from replib.models.architecture import adapter_hash
from replib.models.chat_model import ChatModel
from replib.training.model_selection import Measure, default_choice
from replib.training.result import TrainResult
from replib.training.train import FitDefence


def task_arithmetic(
    model: ChatModel,
    safe: str | Path,
    unsafe: str | Path,
    *,
    out: str | Path,
    safe_weight: float = 1.0,
    unsafe_weight: float = 1.0,
) -> Path:
    """Write the LoRA adapter with ΔW = w_s ΔW_safe − w_u ΔW_unsafe for two saved adapters; returns its folder.

    Ilharco et al. 2023 (arXiv 2212.04089). The merge is exact: ranks add up. ``model`` is unchanged afterwards.

    Raises:
        ReplibError: a folder without an adapter, adapters of different bases or modules, or other than plain LoRA.
    """
    _check_mergeable(Path(safe), Path(unsafe))
    both = PeftModel.from_pretrained(model.causal_lm, safe, adapter_name="safe")
    try:
        both.load_adapter(str(unsafe), "unsafe")
        both.peft_config["safe"].use_rslora = False  # the merge inherits it, and peft would scale by √rank once more
        both.add_weighted_adapter(["safe", "unsafe"], [safe_weight, -unsafe_weight], "default", combination_type="cat")
        both.save_pretrained(str(out), selected_adapters=["default"])
    finally:
        both.unload()
    return Path(out)


def _check_mergeable(safe: Path, unsafe: Path) -> None:
    if odd := sorted(_lora_matrices(safe) ^ _lora_matrices(unsafe))[:3]:
        raise ReplibError(f"the adapters do not touch the same modules, e.g. {odd}; train both on the same targets.")
    bases = {PeftConfig.from_pretrained(folder).base_model_name_or_path for folder in (safe, unsafe)}
    if len(bases) > 1:
        raise ReplibError(f"the adapters were trained on different base models {bases}; train both on the same one.")


def _lora_matrices(folder: Path) -> set[str]:
    if not (folder / "adapter_config.json").exists():
        raise ReplibError(f"'{folder}' has no adapter_config.json; give the folder of a saved LoRA adapter.")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    other = sorted(name for name in names if not re.search(r"\.lora_[AB]\.", name))
    if (bias := getattr(PeftConfig.from_pretrained(folder), "bias", "none")) != "none":
        other.append(f"bias={bias}")
    if other:
        raise ReplibError(f"'{folder}' is not a plain LoRA adapter: it has {other[0]}; retrain it.")
    return names


GRID = tuple((safe, unsafe) for safe in (0.5, 1.0, 1.2) for unsafe in (0.0, 0.1, 0.2))
"""Weights (safe, unsafe) that RepBend's scripts merge with; its paper reports (0.5, 0.1)."""


@dataclass(frozen=True)
class TaskArithmetic:
    """Two SFT runs and their merge, with weights chosen from a grid; see ``merged_tasks``."""

    name: ClassVar[str] = "task arithmetic"
    grid: tuple[tuple[float, float], ...] = GRID
    """Pairs (safe, unsafe) of weights, zero or more."""

    def __post_init__(self) -> None:
        if not self.grid:
            raise ReplibError("The grid of weights is empty: give at least one pair (safe, unsafe).")
        for safe, unsafe in self.grid:
            check_coefficients(safe_weight=safe, unsafe_weight=unsafe)


def train_tasks(
    model: ChatModel, data: DefenceData, fit: FitDefence, *, out: Path | str
) -> tuple[tuple[Path, Path], TrainResult]:
    """Train both adapters of task arithmetic, first on safe answers, then on unsafe ones.

    Returns:
        Folders of both, and a result whose history has both runs, told apart by the column ``side``.
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
    """Merge at every pair of weights, θ₀ + w_s ΔW_safe − w_u ΔW_unsafe, and attach the best merge by validation.

    Args:
        model: the common base of both adapters, without an adapter.
        tasks: folders of the safe and of the unsafe adapter.
        validation: measures a merged model on validation prompts.
        method: grid of weights (w_s, w_u).
        choose: score of a measurement given that of the base; the highest wins.
        out: folder of all merged adapters.

    Returns:
        The model with the best adapter, and a table: safe_weight, unsafe_weight, score, adapter, and the measurement.
        Its first row is the base, with weights zero and no adapter; it cannot win.

    Raises:
        ReplibError: adapters that cannot be merged.
    """
    before = validation(model)
    rows = [{"safe_weight": 0.0, "unsafe_weight": 0.0, "score": choose(before, before), "adapter": ""} | before]
    for safe, unsafe in method.grid:
        folder = Path(out) / f"safe-{safe:g}-unsafe-{unsafe:g}"
        task_arithmetic(model, *tasks, out=folder, safe_weight=safe, unsafe_weight=unsafe)
        measured = _measured(model, folder, validation)
        merge: dict[str, Any] = {"safe_weight": safe, "unsafe_weight": unsafe, "score": choose(measured, before)}
        rows.append(merge | {"adapter": str(folder)} | measured)
    table = pd.DataFrame(rows)
    return attached(model, Path(table.adapter[table.score[1:].idxmax()])), table


def train_task_arithmetic(
    model: ChatModel,
    data: DefenceData,
    fit: FitDefence,
    *,
    method: TaskArithmetic,
    validation: Measure,
    out: Path | str,
) -> TrainResult:
    """Train task arithmetic in full: both adapters, then the best merge; ``probes`` lists all merges.

    Raises:
        ReplibError: several processes, which would write the same files.
    """
    if part()[1] > 1:
        raise ReplibError("Task arithmetic merges and measures adapters in one process: start it without torchrun.")
    tasks, logs = train_tasks(model, data, fit, out=out)
    best, table = merged_tasks(model, tasks, validation, method=method, out=out)
    steps = logs.config["train"]["steps"]
    probes = table.drop(columns="adapter").assign(step=[0, *[steps] * len(method.grid)])
    about = logs.config | {"method": method.name, "objective": asdict(method), "adapter_hash": adapter_hash(best.model)}
    return TrainResult(best, logs.history, probes, steps, about)


def _measured(model: ChatModel, adapter: Path, validation: Measure) -> dict[str, float]:
    """Measurement of the model under an adapter, which is detached afterwards."""
    bent = attached(model, adapter)
    try:
        return validation(bent)
    finally:
        detached(bent)
