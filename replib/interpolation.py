"""Weights between a model and what training made of it: W + share · ΔW, the share chosen on validation prompts.

After WiSE-FT (arXiv 2109.01903, equation 1): interpolated weights often keep what fine-tuning taught and lose less of
what the model could do before. ΔW of LoRA is a product, so that scaling one factor of it is the interpolation itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from replib.core.errors import ReplibError
from replib.keeper import Probe, default_choice
from replib.models.architecture import adapter_hash
from replib.models.chat_model import ChatModel
from replib.results import TrainResult

SHARES = (1.0, 0.85, 0.7)


def interpolated(
    result: TrainResult,
    probe: Probe,
    choose: Callable[[dict[str, float], dict[str, float]], float] = default_choice,
    shares: Sequence[float] = SHARES,
) -> TrainResult:
    """The trained model with the share of its adapter that validation likes best; of equal ones the largest.

    The adapter is scaled in place. Every share and what was found for it stand in ``config["shares"]``.

    Args:
        result: of a training with this probe.
        probe: measures a model on validation prompts.
        choose: score of a probe given that of the model before training.
        shares: of ΔW, above 0 and at most 1.

    Raises:
        ReplibError: a share outside that, no adapter, or a training without a probe.
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
        return probe(result.model)

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
        raise ReplibError("This training was not probed: train it with the probe that chooses the share.")


def _factors(model: ChatModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.model.named_parameters() if ".lora_B." in name}


@torch.no_grad()
def _scale(weights: dict[str, Tensor], originals: dict[str, Tensor], share: float) -> None:
    for name, weight in weights.items():
        weight.copy_(share * originals[name])
