"""Weights between a model and its trained self: the arithmetic of merged weights, the choice, and what is refused."""

import pandas as pd
import pytest
import torch

from helpers import tiny
from replib.core.errors import ReplibError
from replib.models.adapters import attached_lora, merged, merged_copy, perturb
from replib.models.load import load
from replib.training.model_selection import interpolated
from replib.training.result import TrainResult

PROBES = pd.DataFrame([{"step": 0, "attack": 0.9, "harmless": 1.0}, {"step": 5, "attack": 0.0, "harmless": 0.8}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def result(folder) -> TrainResult:
    model = attached_lora(load(folder), rank=2, alpha=4)
    perturb(model, 0.2, seed=1)
    model.model.eval()
    return TrainResult(model, pd.DataFrame(), PROBES, 5, {"adapter_hash": "whole"})


def validation(**kept):
    """Finds so much harmless compliance at each norm of the adapter, in the order of calls."""
    found = iter(kept.values())
    return lambda model: {"attack": 0.0, "harmless": next(found)}


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.model.named_parameters()}


def test_it_is_the_interpolation_of_merged_weights(folder, result):
    base, whole = weights(load(folder)), weights(merged_copy(result.model))
    mixed = weights(merged(interpolated(result, validation(a=1.0), shares=(1.0, 0.3)).model))
    assert max((whole[n] - base[n]).abs().max() for n in base) > 0.1
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, base[name] + 0.3 * (whole[name] - base[name]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("found", "share"),
    [((0.9, 0.95), 0.5), ((0.95, 0.9), 0.7), ((0.8, 0.8), 1.0), ((0.7, 0.7), 1.0), ((1.0, 1.0), 0.7)],
)
def test_validation_chooses_and_of_equals_the_largest(result, found, share):
    before = weights(result.model)
    kept = interpolated(result, validation(a=found[0], b=found[1]), shares=(1.0, 0.7, 0.5))
    assert kept.config["share"] == share and [row["share"] for row in kept.config["shares"]] == [1.0, 0.7, 0.5]
    assert [row["harmless"] for row in kept.config["shares"]] == [0.8, *found]
    for name, weight in weights(kept.model).items():
        torch.testing.assert_close(weight, before[name] * (share if "lora_B" in name else 1))
    assert (kept.config["adapter_hash"] != "whole") and kept.step == 5


def test_the_probe_sees_the_share_that_it_measures(result):
    before, seen = weights(result.model), []
    name = next(n for n in before if "lora_B" in n)

    def look(model):
        seen.append(float(weights(model)[name].norm() / before[name].norm()))
        return {"attack": 0.0, "harmless": 1.0}

    interpolated(result, look, shares=(0.25, 1.0, 0.5))
    assert seen == pytest.approx([0.25, 0.5])


def test_it_is_saved_and_read_with_its_share(folder, result, tmp_path):
    about = {"model": "m", "method": "x", "objective": {}, "train": {"full": False, "steps": 5, "seed": 0}, "data": {}}
    given = TrainResult(result.model, PROBES, PROBES, 5, about)
    kept = interpolated(given, validation(a=1.0), shares=(1.0, 0.3))
    text, logits = (kept.save(tmp_path / "a") / "README.md").read_text(), kept.model.forward(kept.model.encode(["w1"]))
    again = TrainResult.load(load(folder), tmp_path / "a")
    torch.testing.assert_close(again.model.forward(again.model.encode(["w1"])), logits)
    assert again.config["share"] == 0.3 and "0.3 of the change" in text


@pytest.mark.parametrize("shares", [(), (0.0,), (1.2,), (float("nan"),)])
def test_shares_without_sense_are_named(result, shares):
    with pytest.raises(ReplibError, match="above 0 and at most 1"):
        interpolated(result, validation(), shares=shares)


def test_what_cannot_be_interpolated_says_why(folder, result):
    with pytest.raises(ReplibError, match="no LoRA adapter"):
        interpolated(TrainResult(load(folder), pd.DataFrame(), PROBES, 5), validation())
    for probes in (PROBES.iloc[:1], pd.DataFrame({"step": []})):
        with pytest.raises(ReplibError, match="had no validation"):
            interpolated(TrainResult(result.model, pd.DataFrame(), probes, 5), validation())
