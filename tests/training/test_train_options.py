"""What may be chosen about training, and what comes of it: each option against the same run without it."""

import json
from dataclasses import replace

import pytest
import torch

from helpers import tiny
from helpers.parts import items_of, sums
from helpers.tolerance import GRADIENT, close
from replib.core.errors import Diverged, ReplibError
from replib.data.mixtures import BendData
from replib.data.prompts import Contrast, Dialogue
from replib.defences.catalogue import baseline
from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import RepBend
from replib.models.forward import below_adapters, cache_frozen_blocks
from replib.models.load import load
from replib.training.config import TrainConfig
from replib.training.objective import Lora, reference
from replib.training.result import TrainResult
from replib.training.train import attach, train
from replib.training.trainer import check_sane

CONTRASTS = [Contrast(f"w{i} w{i + 1}", "w30 w31", "w32 w33 w34") for i in range(3)]
DATA = BendData(CONTRASTS, [Dialogue(f"w{i} w9", f"w{i} w8") for i in range(3)])
ITEMS = items_of(CONTRASTS, DATA.retain)
SMALL = TrainConfig(steps=2, contrasts=3, retain=3, rank=2, lora_alpha=2, dropout=0.0, learning_rate=1e-2)
OFF_START = replace(SMALL, perturbation=0.2)
BEND = BendConfig(target_layers=(1, 2))
QUIET = {"say": lambda text: None}


def gradient(chat, objective=None):
    """Loss of one micro-batch, and the gradient of all that is trained."""
    objective = objective or RepBend(BEND, tokens=16)
    chat.model.zero_grad()
    torch.manual_seed(0)  # for what is dropped
    loss = 0.0
    for part in objective.parts(chat, ITEMS, 0.0):
        part.loss.backward()
        loss += part.loss.item()
    return loss, torch.cat([p.grad.flatten() for p in chat.model.parameters() if p.grad is not None])


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    close(found[1], expected[1], depth=GRADIENT)
    assert found[1].norm() > 1e-3


# ------------------------------------------------------------------------------------------- blocks below adapters
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "falcon"])
def test_reading_lower_blocks_once_changes_nothing(kind, tmp_path, monkeypatch):
    chat = attach(load(tiny.save_model(tmp_path, kind)), replace(OFF_START, first_block=1))
    chat.model.eval()
    once = gradient(chat)
    monkeypatch.setattr("replib.models.forward.below_adapters", lambda chat: [])
    assert_same(once, gradient(chat))


def test_lower_blocks_compute_one_pass_of_a_batch_and_are_restored(tmp_path):
    chat = attach(load(tiny.save_model(tmp_path)), replace(OFF_START, first_block=2))
    assert below_adapters(chat) == chat.blocks[:2]
    calls = []
    handle = chat.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    batch = chat.encode(["w1 w2", "w3"])
    with cache_frozen_blocks(chat), torch.no_grad():
        with reference(chat):
            before = chat.forward(batch)
        after = chat.forward(batch)
    handle.remove()
    assert len(calls) == 1 and not torch.equal(before, after)
    assert not any("forward" in vars(block) for block in chat.blocks)
    with torch.no_grad():
        torch.testing.assert_close(chat.forward(batch), after)


def test_lower_blocks_are_restored_after_an_error(tmp_path):
    chat = attach(load(tiny.save_model(tmp_path)), replace(OFF_START, first_block=2))
    with pytest.raises(KeyError), cache_frozen_blocks(chat):
        raise KeyError
    assert not any("forward" in vars(block) for block in chat.blocks)


@pytest.mark.parametrize(("objective", "lowest"), [(RepBend(BEND), 1), (baseline("rmu").objective, 0)])
def test_adapters_above_what_the_loss_moves_are_refused(objective, lowest, tmp_path):
    data = DATA if isinstance(objective, RepBend) else _rows()
    with pytest.raises(ReplibError, match=f"first_block=2 is too high: .* changes the output of block {lowest}"):
        train(load(tiny.save_model(tmp_path)), data, objective, config=replace(SMALL, first_block=2), **QUIET)


def test_where_no_block_is_left_it_is_said(tmp_path):
    with pytest.raises(ReplibError, match="first_block=2 leaves no block to adapt"):
        attach(load(tiny.save_model(tmp_path)), replace(SMALL, first_block=2), Lora((0, 1)))


def _rows():
    from replib.data.mixtures import defence_data

    return defence_data(DATA)


# ------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("site", ["resid_post", "mlp_in"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointing_changes_no_gradient(kind, site, tmp_path):
    folder, objective = tiny.save_model(tmp_path, kind), RepBend(replace(BEND, site=site), tokens=16)
    chats = [attach(load(folder), replace(OFF_START, checkpointing=on)) for on in (False, True)]
    for chat in chats:
        chat.model.train()  # only then are blocks computed anew
    assert_same(*(gradient(chat, objective) for chat in reversed(chats)))


# ------------------------------------------------------------------------------------------- all weights
def test_all_weights_train_and_the_reference_is_the_model_as_it_was(tmp_path):
    folder = tiny.save_model(tmp_path / "llama")
    said = []
    config = replace(SMALL, full=True, learning_rate=1e-3)
    result = train(load(folder), DATA, RepBend(BEND), config=config, out=tmp_path / "out", say=said.append)
    assert "All weights are trained" in said[0] and result.history["unsafe"].iloc[-1] > 0
    before = dict(load(folder).causal_lm.named_parameters())
    batch = result.model.encode(["w1 w2"])
    for name, weight in result.model.causal_lm.named_parameters():
        assert not torch.equal(weight, before[name]), name
    with reference(result.model) as base:
        assert torch.equal(base.forward(batch), load(folder).forward(batch).detach())
    again = TrainResult.load(load(folder), result.save(tmp_path / "saved"))
    with torch.no_grad():
        torch.testing.assert_close(again.model.forward(batch), result.model.forward(batch))


def test_a_model_in_full_training_is_given_back_after_an_error(tmp_path):
    folder = tiny.save_model(tmp_path / "llama")
    model, left = load(folder), iter([{"attack": 1.0}])
    with pytest.raises(StopIteration):
        train(model, DATA, RepBend(), config=replace(SMALL, full=True, probe_every=1), validation=lambda _: next(left),
              out=tmp_path / "out", **QUIET)  # fmt: skip
    for (name, weight), before in zip(model.model.named_parameters(), load(folder).model.parameters(), strict=True):
        assert torch.equal(weight, before), name


def test_an_adapter_and_full_training_exclude_each_other(tmp_path):
    bent = attach(load(tiny.save_model(tmp_path)), SMALL)
    with pytest.raises(ReplibError, match="cannot be trained in full: it carries an adapter"):
        attach(bent, replace(SMALL, full=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["4bit", "8bit"])
def test_an_adapter_trains_on_quantised_weights(form, tmp_path):
    """QLoRA: at LoRA's start the model is its own reference, afterwards it is not."""
    pytest.importorskip("bitsandbytes", reason="pip install 'replib[quantized]'")
    folder = tiny.save_model(tmp_path / "llama", hidden_size=64, intermediate_size=128)
    model = load(folder, quantize=form, dtype=torch.bfloat16)
    history = train(model, DATA, RepBend(BEND), config=SMALL, out=tmp_path / "out", **QUIET).history
    assert history["unsafe"].iloc[0] == 0 and history["unsafe"].iloc[1] > 0 and history["loss"].notna().all()


# ------------------------------------------------------------------------------------------- lengths
def test_long_rows_are_cut_and_counted(tmp_path):
    long = BendData([replace(c, unsafe_response="w32 " * 30) for c in CONTRASTS], DATA.retain)
    with pytest.warns(UserWarning, match="3 of 6 dialogues were longer than 512 tokens of prompt or 4 of answer"):
        train(
            load(tiny.save_model(tmp_path)),
            long,
            RepBend(),
            config=replace(SMALL, response_tokens=4),
            out=tmp_path / "o",
            **QUIET,
        )


def test_a_limit_that_cuts_all_answers_away_is_refused(tmp_path):
    with pytest.raises(ReplibError, match="prompts or answers would be empty"):
        train(load(tiny.save_model(tmp_path)), DATA, RepBend(), config=replace(SMALL, response_tokens=0), **QUIET)


# ------------------------------------------------------------------------------------------- an end in time
def test_what_is_no_number_names_its_term_and_what_to_lower():
    found = {"loss": float("nan"), "safe": 1.0, "kl": float("inf"), "safe_norm": 3.0}
    with pytest.raises(Diverged, match="step 7 loss, kl is not finite .*rate 0.01 or the weight of kl"):
        check_sane(7, found, [], SMALL, "torch.float32")
    with pytest.raises(Diverged, match="float16 overflow where bfloat16 does not"):
        check_sane(7, found, [], SMALL, "torch.float16")


def test_growth_ends_training_where_it_was_forbidden_alone():
    first, now = {"loss": 1.0, "unsafe_norm": 2.0}, {"loss": -1e6, "unsafe_norm": 21.0}
    check_sane(3, now, [first], SMALL, "torch.float32")
    check_sane(3, now, [first], replace(SMALL, max_growth=11.0), "torch.float32")
    with pytest.raises(Diverged, match="unsafe_norm is 21, more than 10 times .*allow more with max_growth"):
        check_sane(3, now, [first], replace(SMALL, max_growth=10.0), "torch.float32")


def test_the_best_adapter_outlives_a_run_that_diverged(tmp_path):
    folder, left = tiny.save_model(tmp_path / "llama"), iter([0.9, 0.4, 0.6, 0.7, 0.8, 0.9])
    config = replace(SMALL, steps=9, probe_every=1, learning_rate=3.0, max_growth=1.5)
    model, out = load(folder), tmp_path / "out"
    with pytest.raises(Diverged, match=r"Step 1 is kept in .*out-last-good"):
        train(model, DATA, RepBend(BEND), config=config, validation=lambda _: {"attack": next(left)}, out=out, **QUIET)
    batch = model.encode(["w1 w2"])
    assert torch.equal(model.forward(batch), load(folder).forward(batch))  # the model is as it was
    kept = TrainResult.load(load(folder), tmp_path / "out-last-good")
    assert kept.step == 1 and not torch.equal(kept.model.forward(batch), model.forward(batch))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"dropout": 1.0}, "dropout=1"),
    ],
)
def test_impossible_values_are_refused_by_name(wrong, named):
    with pytest.raises(ReplibError, match=named):
        TrainConfig(**wrong)


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "eta"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_coefficients_are_finite_and_not_negative(name, value):
    with pytest.raises(ReplibError, match=f"{name}={value} must be a finite number, zero or more"):
        BendConfig(**{name: value})


def test_an_overflow_in_float16_is_named(tmp_path):
    model = load(tiny.save_model(tmp_path), dtype=torch.float16)
    with torch.no_grad():
        model.blocks[0].mlp.down_proj.weight.mul_(3e4)
    with pytest.raises(Diverged, match="Weights in float16 overflow where bfloat16 does not"):
        train(model, DATA, RepBend(BEND), config=SMALL, out=tmp_path / "out", **QUIET)


# ------------------------------------------------------------------------------------------- the card
def test_an_adapter_carries_a_card_that_peft_and_the_hub_can_read(tmp_path):
    folder = tiny.save_model(tmp_path / "llama")
    result = train(load(folder), DATA, RepBend(BEND), config=SMALL, out=tmp_path / "o",
                   validation=lambda _: {"attack": 0.25}, **QUIET)  # fmt: skip
    saved = result.save(tmp_path / "adapter")
    text = (saved / "README.md").read_text()
    assert text.startswith(f"---\nbase_model: {folder}\nlibrary_name: peft\n")
    assert "| target_layers | (1, 2) |" in text.replace("[1, 2]", "(1, 2)") and "| learning_rate | 0.01 |" in text
    assert "| 0 | 0.25 |" in text and "that chose the step are too good" in text
    assert json.loads((saved / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_loss_of_a_micro_batch_is_the_sum_of_its_parts(tmp_path):
    chat = attach(load(tiny.save_model(tmp_path)), OFF_START)
    chat.model.eval()
    few, one = (sums(RepBend(BEND, tokens=n), chat, ITEMS)["loss"].item() for n in (8, 4096))
    assert few == pytest.approx(one, rel=1e-5)
