"""RepBend's terms against literal re-statements of the paper's formulas, their algebra, and the training."""

import json
import math
from dataclasses import replace

import pytest
import torch

from helpers import tiny
from helpers.parts import bend_terms, items_of
from replib.core.errors import ReplibError
from replib.data.mixtures import BendData
from replib.data.prompts import Contrast, Dialogue
from replib.defences.losses import distance, kl_divergence
from replib.defences.repbend.batch import RETAIN, SAFE, TURNED, UNSAFE_SIDE, Plan, collate, read
from replib.defences.repbend.config import BendConfig, Scope
from replib.defences.repbend.loss import BendTerms, anchored_cosine, bend_loss, mean_cosine
from replib.defences.repbend.objective import RepBend
from replib.models.load import load
from replib.training.config import TrainConfig
from replib.training.model_selection import default_choice
from replib.training.result import TrainResult
from replib.training.train import attach, train

CONTRASTS = [Contrast(f"w{i} w{i + 1}", "w30 w31", "w32 w33 w34") for i in range(6)]
RETAINED = [Dialogue(f"w{i} w9", f"w{i} w8") for i in range(6)]
SMALL = TrainConfig(
    steps=4, contrasts=3, retain=3, rank=2, lora_alpha=2, dropout=0.0, learning_rate=1e-2, probe_every=2
)


@pytest.fixture
def model(tmp_path):
    return load(tiny.save_model(tmp_path / "llama"))


# ------------------------------------------------------------------------------------------- pure terms
def test_distance_is_the_mean_unsquared_norm():
    bent, base = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    literal = sum(math.dist(bent[i, j], base[i, j]) for i in range(2) for j in range(5)) / 10
    assert distance(bent, base).item() == pytest.approx(literal, rel=1e-5)


def test_the_hinge_counts_no_distance_beyond_its_multiple_of_the_norm():
    base = torch.nn.functional.normalize(torch.randn(1, 4, 7), dim=-1) * 3
    far, near = base * 100, base * 1.5
    assert distance(far, base, max_distance=2.0).item() == pytest.approx(6.0, rel=1e-5)
    assert distance(near, base, max_distance=2.0).item() == pytest.approx(1.5, rel=1e-5)
    far.requires_grad_()
    distance(far, base, max_distance=2.0).backward()
    assert not far.grad.any()


def test_directional_distance_ignores_growth_and_is_the_chord_at_the_base_norm():
    base = torch.tensor([[[3.0, 4.0]]])
    assert distance(7 * base, base, directional=True).item() == pytest.approx(0, abs=1e-5)
    assert distance(7 * base, base).item() == pytest.approx(30)
    turned = torch.tensor([[[-4.0, 3.0]]])
    assert distance(9 * turned, base, directional=True).item() == pytest.approx(5 * 2**0.5, rel=1e-5)


def test_anchored_cosine_is_the_mean_over_pairs_about_the_centre_and_pulls_to_the_refused():
    torch.manual_seed(0)
    bent, refused, centre = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 4, 5) + 3, torch.randn(2, 1, 5)
    rows = torch.cat([bent, refused], 1) - centre
    pairs = [torch.cosine_similarity(rows[:, i], rows[:, j], dim=-1) for i in range(7) for j in range(7) if i != j]
    value = anchored_cosine(bent, refused, centre)
    assert value.item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    (step,) = torch.autograd.grad(value, bent)
    side = (refused - centre).mean(1, keepdim=True)
    assert torch.cosine_similarity(bent + 5 * step - centre, side, dim=-1).mean() > (
        torch.cosine_similarity(bent - centre, side, dim=-1).mean()
    )


def test_mean_cosine_is_the_mean_over_all_pairs():
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    pairs = [
        torch.cosine_similarity(x[k, i], x[k, j], dim=0) for k in range(3) for i in range(6) for j in range(6) if i != j
    ]
    assert mean_cosine(x).item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)
    assert mean_cosine(x[:, :1].expand(3, 4, 5)).item() == pytest.approx(1.0, abs=1e-6)


def test_kl_is_written_out_and_scaled_by_temperature_squared():
    base, bent = torch.randn(2, 4, 9, dtype=torch.float64)
    p, q = (base / 2).softmax(-1), (bent / 2).softmax(-1)
    assert kl_divergence(base, bent, 2.0).item() == pytest.approx(
        (4 * (p * (p / q).log()).sum(-1)).mean().item(), rel=1e-5
    )
    assert kl_divergence(base, base + 3.0).item() == pytest.approx(0.0, abs=1e-6)  # logits are known up to a constant


def test_the_loss_has_the_signs_of_algorithm_1():
    terms = BendTerms(*map(torch.tensor, (2.0, 3.0, 0.5, 0.25)))
    config = BendConfig(alpha=0.5, beta=0.1, gamma=0.3)
    assert bend_loss(terms, config).item() == pytest.approx(0.5 * 2 - 0.5 * 3 - 0.1 * 0.5 + 0.3 * 0.25)


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"gamma": float("nan")}, {"beta": float("inf")}])
def test_bad_coefficients_are_named(wrong):
    with pytest.raises(ReplibError, match=f"{next(iter(wrong))}=.* must be a finite number"):
        BendConfig(**wrong)


def test_target_layers_are_checked_and_default_to_the_later_blocks():
    assert BendConfig().layers(32) == tuple(range(19, 30))
    with pytest.raises(ReplibError, match="Target layer 12 is outside .* 0 to 11"):
        BendConfig(target_layers=(3, 12)).layers(12)


# ------------------------------------------------------------------------------------------- terms of a model
def literal_terms(chat, layers):
    """Algorithm 1 without batches or hooks: one unpadded sequence at a time, transformers' raw hidden states."""
    tok = chat.tokenizer

    def states(prompt, response):
        ids = tok(f"<s> {prompt} <end> <ask> {response} </s>", return_tensors="pt")["input_ids"]
        start = len(tok(f"<s> {prompt} <end> <ask>")["input_ids"])
        held = []
        handles = [b.register_forward_hook(lambda _m, _a, o: held.append(o[0])) for b in chat.blocks]
        logits = chat.model(input_ids=ids).logits[0]
        for handle in handles:
            handle.remove()
        return torch.stack(held), logits, start

    def both(prompt, response):
        with torch.no_grad(), chat.adapter_off():
            base = states(prompt, response)
        return states(prompt, response), base

    every = range(chat.n_layers)
    safe, unsafe, last, kls = [], [], {i: [] for i in layers}, []
    for prompt, response in [(c.prompt, c.safe_response) for c in CONTRASTS] + [
        (d.prompt, d.response) for d in RETAINED
    ]:
        (h, _, n), (h0, _, _) = both(prompt, response)
        safe += [(h[i, t] - h0[i, t]).norm() for i in every for t in range(n, h.shape[1])]
    for c in CONTRASTS:
        (h, _, n), (h0, _, _) = both(c.prompt, c.unsafe_response)
        unsafe += [(h[i, t] - h0[i, t]).norm() for i in layers for t in range(n, h.shape[1])]
        for i in layers:
            last[i].append(h[i, n - 1])
    for d in RETAINED:
        (_, z, n), (_, z0, _) = both(d.prompt, d.response)
        p, q = (z0[n - 1 : -1] / 2).log_softmax(-1), (z[n - 1 : -1] / 2).log_softmax(-1)
        kls += [4 * (p[t].exp() * (p[t] - q[t])).sum() for t in range(len(p))]
    cosines = [torch.cosine_similarity(a, b, dim=0) for i in layers for a in last[i] for b in last[i] if a is not b]
    return BendTerms(*(torch.stack(x).mean() for x in (safe, unsafe, cosines, kls)))


def escaped(model):
    """Attached and moved off LoRA's stationary start, so that every term has a gradient."""
    chat = attach(model, SMALL)
    torch.manual_seed(3)
    for name, p in chat.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    chat.model.eval()
    return chat


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_terms_and_gradients_equal_the_literal_statement(kind, tmp_path):
    chat = escaped(load(tiny.save_model(tmp_path, kind)))
    layers, config = (1, 2), BendConfig(alpha=0.5, beta=0.2, gamma=0.3)
    weights = [p for n, p in chat.model.named_parameters() if "lora_" in n]
    fast = bend_terms(chat, items_of(CONTRASTS, RETAINED), replace(config, target_layers=layers))
    slow = literal_terms(chat, layers)
    for name, a, b in zip(BendTerms._fields[:4], fast[:4], slow[:4], strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-4, abs=1e-5), name
    a, b = (torch.autograd.grad(bend_loss(t, config), weights) for t in (fast, slow))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-3)


def test_at_loras_start_only_the_cosine_term_has_a_gradient(model):
    chat = attach(model, SMALL)
    chat.model.eval()
    terms = bend_terms(chat, items_of(CONTRASTS, RETAINED), BendConfig(target_layers=(1, 2)))
    weights = [p for n, p in chat.model.named_parameters() if "lora_B" in n]
    size = {
        name: sum(g.norm().item() for g in torch.autograd.grad(term, weights, retain_graph=True))
        for name, term in terms.taken().items()
    }
    assert size["safe"] == 0 and size["unsafe"] == 0 and size["kl"] < 1e-4 and size["cosine"] > 1e-2


def test_groups_and_masks_of_a_step(model):
    batch, groups = collate(model, CONTRASTS, RETAINED)
    assert [int((groups == g).sum()) for g in (SAFE, RETAIN, UNSAFE_SIDE)] == [6, 6, 6]
    unsafe = model.tokenizer.decode(
        batch.input_ids[groups == UNSAFE_SIDE][0][batch.response_mask[groups == UNSAFE_SIDE][0]]
    )
    assert unsafe.split() == ["w32", "w33", "w34", "</s>"]


def test_turned_rows_keep_their_answer_and_not_their_decision(model):
    items = items_of(CONTRASTS[:2], RETAINED[:3], CONTRASTS[2:4])
    batch, groups = collate(model, **items)
    assert [int((groups == g).sum()) for g in (SAFE, TURNED, RETAIN, UNSAFE_SIDE)] == [2, 2, 3, 2]
    size = lambda *which: sum(int(batch.response_mask[groups == g].sum()) for g in which)  # noqa: E731
    config = BendConfig(decision=True, anchored=True, custom=Scope(kl_rows="safe"))
    plain, every = (read(model, Plan.of(model, items, c), (1,), c) for c in (BendConfig(), config))
    assert plain.safe.shape[1] == size(SAFE, TURNED, RETAIN) and plain.final.shape[0] == size(RETAIN)
    assert every.safe.shape[1] == plain.safe.shape[1] + 5 and every.unsafe.shape[1] == plain.unsafe.shape[1] + 2
    assert every.final.shape[0] == size(SAFE, TURNED, RETAIN) - 2 and every.refused.shape[1] == 2


# ------------------------------------------------------------------------------------------- training
def validation_measure(values):
    left = iter(values)
    return lambda _model: {"attack": next(left), "harmless": 1.0, "degenerate": 0.0}


def test_training_moves_unsafe_answers_and_keeps_the_chosen_step(model, tmp_path):
    base = {k: v.clone() for k, v in model.model.state_dict().items()}
    result = train(model, BendData(CONTRASTS, RETAINED), RepBend(BendConfig(target_layers=(1, 2))), config=SMALL,
                   validation=validation_measure([0.9, 0.1, 0.5]), out=tmp_path / "run")  # fmt: skip
    assert result.step == 2 and result.probes["attack"].tolist() == [0.9, 0.1, 0.5]
    assert len(result.history) == 4 and result.history["unsafe"].iloc[-1] > result.history["unsafe"].iloc[0]
    with result.model.adapter_off():
        now = result.model.causal_lm.state_dict()
        assert all(
            torch.equal(v, now[k.replace("_proj.weight", "_proj.base_layer.weight") if "_proj" in k else k])
            for k, v in base.items()
        )


def test_training_twice_gives_the_same_bits(tmp_path):
    folder = tiny.save_model(tmp_path / "llama")
    runs = [
        train(load(folder), BendData(CONTRASTS, RETAINED), RepBend(), config=SMALL, out=tmp_path / "run").history
        for _ in range(2)
    ]
    assert runs[0].equals(runs[1])


def test_a_saved_adapter_is_an_ordinary_folder_and_comes_back(tmp_path):
    folder = tiny.save_model(tmp_path / "llama")
    result = train(load(folder), BendData(CONTRASTS, RETAINED), RepBend(), config=SMALL, out=tmp_path / "run")
    saved = result.save(tmp_path / "adapter")
    assert json.loads((saved / "replib.json").read_text())["objective"]["alpha"] == 0.5
    again = TrainResult.load(load(folder), saved)
    batch = again.model.encode(["w1 w2"])
    with torch.no_grad():
        torch.testing.assert_close(again.model.forward(batch), result.model.forward(batch))
    assert again.step == 4 and len(again.history) == 4


def test_a_second_adapter_is_refused(model):
    bent = attach(model, SMALL)
    with pytest.raises(ReplibError, match="carries an adapter already"):
        attach(bent, SMALL)


def test_a_loss_that_is_not_finite_stops_and_says_what_to_lower(model, tmp_path):
    with pytest.raises(ReplibError, match="loss is not finite .* the weight of unsafe"):
        wild = TrainConfig(steps=6, contrasts=3, retain=3, learning_rate=1e3, dropout=0.0)
        train(model, BendData(CONTRASTS, RETAINED), RepBend(BendConfig(alpha=1e38)), config=wild, out=tmp_path)


@pytest.mark.parametrize(("contrasts", "retain"), [([], RETAINED), (CONTRASTS, [])])
def test_an_empty_half_of_the_data_is_refused(contrasts, retain):
    with pytest.raises(ReplibError, match="one of the two lists is empty"):
        BendData(contrasts, retain)


def test_a_contrast_without_an_answer_is_named():
    with pytest.raises(ReplibError, match="1 contrasts lack .*'w1'"):
        BendData([Contrast("w1", "w2", " ")], RETAINED)


def test_the_default_choice_takes_the_safest_step_that_keeps_benign_behaviour():
    before = {"attack": 0.6, "harmless": 1.0, "borderline": 1.0, "skill": 1.0, "degenerate": 0.0}
    worth = lambda **found: default_choice(before | found, before)  # noqa: E731
    assert worth(attack=0.2) > worth() and worth(attack=0.2) > worth(attack=0.0, degenerate=0.3)
    assert worth(attack=0.0, skill=0.98) > worth(attack=0.1) > worth(attack=0.0, borderline=0.95)
    assert worth(attack=0.0) > worth(attack=0.0, harmless=0.99) and worth(harmless=0.5) < worth(harmless=0.6)
