"""The defences RepBend is compared with: each loss a pure function of tensors, named as in its own paper.

Hidden states come as `[layers tokens dim]`, counted tokens only, as in `replib.bend`; log-probabilities as
one number a response, in nats. Every loss is a scalar to be minimised, computed in float32 or wider.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from replib.bend import distance
from replib.core.errors import ReplibError


class Pair(NamedTuple):
    """Hidden states of the same tokens under the tuned model, and what they are held against."""

    tuned: Float[Tensor, "layers tokens dim"]
    reference: Float[Tensor, "... dim"]


class LogProbs(NamedTuple):
    """Summed log-probability of each response under the tuned and the frozen model, nats."""

    tuned: Float[Tensor, " rows"]
    frozen: Float[Tensor, " rows"]


class DefenceTerms(NamedTuple):
    """The loss to minimise and its two unweighted halves: on what must stay, and on what must go."""

    total: Float[Tensor, ""]
    retain: Float[Tensor, ""]
    forget: Float[Tensor, ""]


def circuit_breaker(retain: Pair, harmful: Pair, *, progress: float, alpha: float = 10.0) -> DefenceTerms:
    """Circuit breaking by representation rerouting, Zou et al. 2024 (arXiv 2406.04313), Algorithm 1.

    L = c_r ‖h'_retain − h‖₂ + c_s ReLU(cos(h'_harmful, h)),  c_r = α p/2,  c_s = α (1 − p/2),  p from 0 to 1

    Both terms are means over layers and counted tokens (the official code divides the first by padding too).
    At h' = h both gradients are zero: cos is at its maximum, the distance at its kink. A LoRA adapter, which
    starts there, leaves only by rounding noise, so perturb `lora_B` before training for runs that repeat.
    """
    weight_retain, weight_reroute = breaker_schedule(progress, alpha=alpha)
    apart, reroute = distance(*_wide(retain)), rerouting(harmful)
    return DefenceTerms(weight_retain * apart + weight_reroute * reroute, apart, reroute)


def rerouting(harmful: Pair) -> Float[Tensor, ""]:
    """Mean ReLU(cos(h', h)) over layers and tokens: 0 where no state points its old way any more."""
    return F.cosine_similarity(*_wide(harmful), dim=-1).relu().mean()


def breaker_schedule(progress: float, *, alpha: float = 10.0) -> tuple[float, float]:
    """Weights (c_r, c_s) of retaining and rerouting after a share of training; they sum to alpha and end equal."""
    if not 0 <= progress <= 1:
        raise ReplibError(f"progress={progress} lies outside 0 to 1: give the share of training that is behind.")
    return alpha * progress / 2, alpha * (1 - progress / 2)


def rmu(retain: Pair, forget: Pair, *, alpha: float = 1200.0) -> DefenceTerms:
    """Representation misdirection for unlearning, Li et al. 2024 (arXiv 2403.03218), §4.

    L = mean ‖h'_forget − c·u‖² + α mean ‖h'_retain − h‖², with `forget.reference` the constant `rmu_target`.
    The squares are averaged, not summed, over dimensions, as in the official code: both terms scale alike.
    """
    lost, kept = mean_square(forget), mean_square(retain)
    return DefenceTerms(lost + alpha * kept, kept, lost)


def mean_square(pair: Pair) -> Float[Tensor, ""]:
    """Mean squared difference over layers, tokens and dimensions."""
    tuned, goal = _wide(pair)
    return (tuned - goal).square().mean()


def rmu_target(dim: int, *, steering: float = 6.5, seed: int = 0) -> Float[Tensor, " dim"]:
    """The point c·u to which RMU drives forgotten tokens: uniform in [0, 1)^dim, made `steering` long."""
    noise = torch.rand(dim, generator=torch.Generator().manual_seed(seed))
    return steering * noise / noise.norm()


def npo(forget: LogProbs, *, beta: float = 0.1) -> Float[Tensor, ""]:
    """Negative preference optimisation, Zhang et al. 2024 (arXiv 2404.05868), Eq. 3.

    L = −(2/β) E log σ(−β log(π/π_ref)): gradient ascent on the forgotten responses that fades as they become
    unlikely; for β → 0 it is plain gradient ascent.
    """
    return -(2 / beta) * F.logsigmoid(-beta * (forget.tuned - forget.frozen)).mean()


def dpo(chosen: LogProbs, rejected: LogProbs, *, beta: float = 0.1) -> Float[Tensor, ""]:
    """Direct preference optimisation, Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7; refusals are chosen.

    L = −E log σ(β log(π/π_ref)(chosen) − β log(π/π_ref)(rejected)).
    """
    margin = (chosen.tuned - chosen.frozen) - (rejected.tuned - rejected.frozen)
    return -F.logsigmoid(beta * margin).mean()


def generic_logits(
    reinforced: Float[Tensor, "tokens vocab"], base: Float[Tensor, "tokens vocab"], *, alpha: float = 5.0
) -> Float[Tensor, "tokens vocab"]:
    """What a model would say that never read it, Eldan & Russinovich 2023 (arXiv 2310.02238), §2.

    v_generic = v_base − α ReLU(v_reinforced − v_base): tokens that became likelier by training on what shall be
    forgotten are pushed down, the others stay.
    """
    return base - alpha * (reinforced - base).relu()


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


def _wide(pair: Pair) -> Pair:
    """At least float32: in half precision the norms of residuals overflow and their differences vanish."""
    if not pair.tuned.shape[1]:
        raise ReplibError("no token counts in this batch: the hidden states are empty; check how it was encoded.")
    dtype = torch.promote_types(pair.tuned.dtype, torch.float32)
    return Pair(pair.tuned.to(dtype), pair.reference.to(dtype))
