"""The self-check: it passes on sound models, fails on each kind of broken one, and says what that means."""

import pytest
import torch

from helpers import tiny
from replib.models.architecture import Architecture
from replib.models.load import load
from replib.models.self_check import next_logits, self_check, ticks, tolerance

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")  # absolute positions, and dropout


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return tiny.save_adapter(tmp_path_factory.mktemp("adapter"), folder)


def report(model, base=None):
    return ticks(self_check(model, PROMPTS, base=base), model.dtype)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sound_models_pass_in_any_precision(kind, dtype, tmp_path):
    said = report(load(tiny.save_model(tmp_path, kind), dtype=dtype))
    assert said.count("✓") == 2 and "– adapter off = base (no adapter)" in said and "✗" not in said


def test_a_sound_adapter_passes_and_the_line_is_said_on_loading(folder, adapter, capsys):
    load(folder, adapter=adapter, check=True)
    said = capsys.readouterr().out
    assert said.count("✓") == 3 and "✓ adapter off = base (0)" in said and said.count("\n") == 1
    load(folder, adapter=adapter, check=False)
    load(folder)  # nobody looks on
    assert capsys.readouterr().out == ""


def test_a_model_that_reads_its_padding_fails(folder, monkeypatch):
    model = load(folder)
    forward = model.model.forward
    blind = lambda **options: forward(**options | {"position_ids": None})  # noqa: E731
    monkeypatch.setattr(model.model, "forward", blind)
    said = report(model)
    assert "✗ batch = single" in said and "depends on its neighbours" in said and "✓ lens = logits" in said


def test_a_base_that_the_adapter_changed_fails(folder, adapter):
    base = next_logits(load(folder), PROMPTS)
    bent = load(folder, adapter=adapter)
    assert "✓ adapter off = base (0)" in report(bent, base)
    with torch.no_grad():
        bent.blocks[0].mlp.c_fc.base_layer.weight[0] += 0.5
    said = report(bent, base)
    assert "✗ adapter off = base" in said and "comparisons with the base are void" in said


def test_a_wrong_norm_fails(folder):
    model = load(folder, architecture=Architecture("transformer.h", "transformer.h.0.ln_1", "lm_head"))
    said = report(model)
    assert "✗ lens = logits" in said and "the logit lens misleads" in said.replace(
        "so the logit lens", "the logit lens"
    )


def test_a_model_left_in_training_mode_is_checked_without_dropout(folder):
    model = load(folder)
    model.model.train()
    assert "✗" not in report(model) and model.model.training


def test_numbers_that_are_none_fail():
    assert "✗ batch = single (not finite)" in ticks({"padded": float("nan"), "lens": 0.0, "scale": 1.0}, torch.float32)


def test_what_rounding_explains_grows_with_the_logits_and_with_fewer_bits():
    assert tolerance(torch.float32, 20.0) == pytest.approx(2e-3)
    assert tolerance(torch.bfloat16, 20.0) == pytest.approx(4 * 2**-7 * 20)
