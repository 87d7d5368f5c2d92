"""Hardened refusals: their loss row by row, its gradient through edits, what stays unedited, and resumption."""

import json

import pytest
import torch

from helpers import tiny
from helpers.resumed import CONFIG, DATA, drift, outcome, paper, same, stopping
from helpers.tolerance import close
from replib.core.errors import ReplibError
from replib.data.mixtures import DefenceData
from replib.data.prompts import Contrast, Dialogue
from replib.defences.adversary import Adversary, EditDistribution, SampledEdit
from replib.defences.hardening import Hardened, Hardening, refusal_loss, refusals
from replib.defences.sft import SFT, RetainLoss, Retention, cross_entropy
from replib.models.adapters import attached_lora, perturb
from replib.models.chat_model import ChatModel
from replib.models.forward import without_checkpointing
from replib.models.load import load
from replib.training.config import TrainConfig
from replib.training.train import attach, train
from replib.transport.affine import AffineEdit

HARMFUL = [Contrast(f"w{i} w{i + 5}" + " w6" * (i % 3), "w30 w31" + " w4" * (i % 2), "w32 w33 w34") for i in range(8)]
HARMLESS = [Dialogue(f"w{i} w9 w3", f"w{i} w8") for i in range(8)]
KEPT = DefenceData(retain=HARMLESS, unsafe=[])
SMALL = Hardening(edits=3, plain=1, rows=2, refit=2, prefix=2, arsenal=EditDistribution(ks=(1, 2), prompts=6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def chat(folder) -> ChatModel:
    torch.manual_seed(0)
    made = attached_lora(load(folder), rank=2, alpha=4)
    perturb(made, 0.2, seed=1)
    made.model.eval()
    return made


def hardened(inner=None, hardening=SMALL, seed=0) -> Hardened:
    return Hardened(inner or Retention(), HARMFUL, HARMLESS, hardening, seed)


def gradients(chat, loss):
    chat.model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in chat.model.named_parameters() if p.grad is not None}


def assert_near(found, wanted):
    assert found.keys() == wanted.keys()
    largest = max(g.abs().max() for g in wanted.values())
    assert largest > 1e-3 and all((found[n] - g).abs().max() < 1e-4 * largest for n, g in wanted.items())


# ------------------------------------------------------------------------------------------- the loss
def test_a_refusal_follows_the_first_tokens_of_the_unsafe_answer(chat):
    batch, mask = refusals(chat, HARMFUL[:3], [0, 2, 9])
    texts = [chat.tokenizer.decode(ids[m]) for ids, m in zip(batch.input_ids, batch.response_mask, strict=True)]
    assert texts == ["w30 w31 </s>", "w32 w33 w30 w31 w4 </s>", "w32 w33 w34 w30 w31 </s>"]
    learned = [chat.tokenizer.decode(ids[m]) for ids, m in zip(batch.input_ids, mask, strict=True)]
    assert learned == ["w30 w31 </s>", "w30 w31 w4 </s>", "w30 w31 </s>"]


def test_the_loss_is_the_mean_over_tokens_row_by_row(chat):
    rows, heads, losses = HARMFUL[:4], [0, 1, 2, 0], []
    for c, head in zip(rows, heads, strict=True):
        begun = c.unsafe_response.split()[:head]
        row = chat.tokenize([c.prompt], [" ".join([*begun, c.safe_response]) + " </s>"])[0]
        logp = chat.forward(chat.pad([row]))[0].log_softmax(-1)
        losses += [-logp[i - 1, row.ids[i]] for i in range(row.prompt + head, len(row))]
    close(refusal_loss(chat, rows, heads), torch.stack(losses).mean())


def test_without_edits_and_beginnings_it_is_supervised_fine_tuning(chat):
    safe = [Dialogue(c.prompt, c.safe_response) for c in HARMFUL]
    close(refusal_loss(chat, HARMFUL, [0] * 8), cross_entropy(chat, safe))


def test_the_gradient_flows_through_the_edited_pass(chat):
    """Against the edit written out as a dense map, put into the block by hand."""
    torch.manual_seed(5)
    edit = AffineEdit(torch.randn(16, 2), torch.randn(16, 2), torch.randn(16))
    dense, rows, heads = torch.eye(16) + edit.v @ edit.u.mT, HARMFUL[:4], [0, 1, 0, 2]
    for where in ("last_prompt", "all_prompt", "response", "all"):
        objective = hardened()
        objective.adversary.sample = lambda rows, n: rows[:4]
        objective._head = iter(heads).__next__
        found = gradients(chat, objective._refused(chat, [SampledEdit({("resid_post", 1): edit}, where)]))
        batch, _ = refusals(chat, rows, heads)
        last = torch.zeros_like(batch.prompt_mask).scatter(1, batch.last_prompt[:, None], True)
        whole = batch.prompt_mask | batch.response_mask
        masks = {"last_prompt": last, "all_prompt": batch.prompt_mask, "response": batch.response_mask, "all": whole}

        def by_hand(_module, _args, hidden, mask=masks[where]):
            return torch.where(mask[..., None], hidden @ dense + edit.c, hidden)

        handle = chat.blocks[1].register_forward_hook(by_hand)
        wanted = gradients(chat, refusal_loss(chat, rows, heads))
        handle.remove()
        assert_near(found, wanted)


def test_gradients_are_the_same_with_checkpointing_which_stays_on(folder):
    found = []
    for checkpointing in (False, True):
        chat = attach(load(folder), TrainConfig(rank=2, checkpointing=checkpointing, dropout=0.0, perturbation=0.2))
        chat.model.train()
        objective = hardened()
        objective.adversary.fit(chat)
        drawn = [objective.adversary.draw(chat) for _ in range(3)]
        found.append(gradients(chat, objective._refused(chat, drawn)))
        on = [m.gradient_checkpointing for m in chat.model.modules() if hasattr(m, "gradient_checkpointing")]
        assert on and all(x is checkpointing for x in on)
    assert_near(found[1], found[0])


def test_checkpointing_is_on_again_after_an_exception(folder):
    chat = attach(load(folder), TrainConfig(rank=2, checkpointing=True))
    with pytest.raises(ZeroDivisionError), without_checkpointing(chat):
        assert not any(getattr(m, "gradient_checkpointing", False) for m in chat.model.modules())
        raise ZeroDivisionError
    assert any(getattr(m, "gradient_checkpointing", False) for m in chat.model.modules())


# ------------------------------------------------------------------------------------------- around an objective
def test_the_inner_loss_is_the_inner_objectives_and_the_hardened_part_is_weighted(chat):
    items = {"retain": HARMLESS[:3]}
    inner = Retention(RetainLoss(ce=1.0))
    alone = [p.loss for p in inner.parts(chat, items, 0.0)]
    for weight in (1.0, 2.5):
        (kept, hard) = hardened(inner, Hardening(**(vars(SMALL) | {"weight": weight}))).parts(chat, items, 0.0)
        assert torch.equal(kept.loss, alone[0]) and hard.terms.keys() == {"hardening"}
        torch.testing.assert_close(hard.loss, weight * hard.terms["hardening"])


def test_what_edits_are_fitted_on_is_read_anew_when_it_is_due(chat, monkeypatch):
    read = []
    monkeypatch.setattr(
        Adversary, "fit", lambda self, chat, fit=Adversary.fit: (read.append(objective.met), fit(self, chat))
    )
    objective = hardened()
    for _ in range(5):
        list(objective.parts(chat, {"retain": HARMLESS[:2]}, 0.0))
    assert read == [0, 2, 4]
    read.clear()
    list(hardened(hardening=Hardening(edits=0, rows=2)).parts(chat, {"retain": HARMLESS[:2]}, 0.0))
    assert read == []


def test_an_interrupt_inside_the_edited_pass_leaves_the_model_as_it_was(folder, tmp_path, monkeypatch):
    model = load(folder)
    before = model.forward(model.encode(["w1 w2"]))
    monkeypatch.setattr("replib.defences.hardening.token_losses", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(model, KEPT, hardened(), config=TrainConfig(steps=2), out=tmp_path / "run", say=lambda _: None)
    assert torch.equal(model.forward(model.encode(["w1 w2"])), before) and not model.provenance()["adapter_hash"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


@pytest.mark.parametrize("at", [6, 12])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(folder, tmp_path, monkeypatch, at):
    """Checkpoints fall between two readings of the model, and the inner objective has a queue of its own."""
    run = {"config": CONFIG, "validation": drift, "say": lambda _: None}
    odd = Hardening(**(vars(SMALL) | {"refit": 3}))
    whole = outcome(train(load(folder), DATA, hardened(paper(), odd), out=tmp_path / "whole", **run))
    stopping(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        train(load(folder), DATA, hardened(paper(), odd), out=tmp_path / "run", **run)
    resumed = outcome(train(load(folder), DATA, hardened(paper(), odd), out=tmp_path / "run", **run))
    assert same(resumed, whole) and "hardening" in whole[1] and "cosine" in whole[1]


def test_the_card_says_what_was_used(folder, tmp_path):
    result = train(
        load(folder), KEPT, hardened(), config=TrainConfig(steps=1), out=tmp_path / "run", say=lambda _: None
    )
    record = json.loads((result.save(tmp_path / "adapter") / "replib.json").read_text())
    assert record["method"] == "retention + hardening" and record["objective"]["inner"]["keep"]["kl"] == 1.0
    assert record["objective"]["hardening"]["arsenal"]["methods"] == ["pca_ot", "rfa", "actadd", "act"]
    assert len(record["objective"]["harmful"]) == 16


# ------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"edits": 0, "plain": 0}, "no row is hardened"),
        ({"rows": 0}, "no row is hardened"),
        ({"refit": 0}, "no row is hardened"),
        ({"edits": -1, "plain": 3}, "no row is hardened"),
        ({"forced": 1.2}, "forced=1.2 is a share"),
        ({"weight": float("nan")}, "weight=nan"),
    ],
)
def test_a_hardening_without_sense_is_named(change, reason):
    with pytest.raises(ReplibError, match=reason):
        Hardening(**change)


def test_what_is_missing_is_named_before_anything_is_attached(folder):
    model, lacking = load(folder), [*HARMFUL, Contrast("w1", "", "w2")]
    with pytest.raises(ReplibError, match="1 of 9 harmful prompts lack an answer"):
        train(model, KEPT, Hardened(Retention(), lacking, HARMLESS, SMALL))
    with pytest.raises(ReplibError, match="SFT trains on `safe`"):
        train(model, KEPT, hardened(SFT()))
    with pytest.raises(ReplibError, match="Retention with both weights 0 has no loss"):
        train(model, KEPT, hardened(Retention(RetainLoss())))
    with pytest.raises(ReplibError, match="outside the model's blocks"):
        train(model, KEPT, hardened(hardening=Hardening(arsenal=EditDistribution(layers=(7,), ks=(1,), prompts=6))))
    assert not model.provenance()["adapter_hash"]
