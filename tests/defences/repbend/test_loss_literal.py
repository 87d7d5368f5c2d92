"""RepBend's fast path equals the literal statement of `literal.py`, in value and in the gradient of every LoRA weight.

Errors are relative: of a value to its size, of a gradient to the largest entry. In float32 they are rounding, which the
norms of Gemma-2 enlarge most; in float64 nothing of them is left.
"""

from dataclasses import replace

import pytest
import torch

from helpers import literal, tiny, tolerance
from helpers.parts import bend_terms, items_of
from replib.data.prompts import Contrast, Dialogue
from replib.defences.repbend.batch import Plan, collate, read
from replib.defences.repbend.config import FIDELITIES, LOSS_MODES, BendConfig, Scope
from replib.defences.repbend.loss import BendTerms, bend_loss
from replib.defences.repbend.presets import ORGANISM_BEND
from replib.models.load import load
from replib.training.config import TrainConfig
from replib.training.train import attach

KINDS = ("llama", "gemma2", "qwen3", "gpt2")
LAYERS = (1, 2)  # the last block among them: the official hidden state N is behind the final norm
WEIGHTS = {"alpha": 0.4, "beta": 0.7, "gamma": 0.3}
# Far from the base model: near it float32 leaves little of a small difference of large states.
LORA = TrainConfig(rank=2, lora_alpha=4, dropout=0.0, perturbation=0.2)
FARTHER = {"gemma2": 0.5}
VALUE, GRADIENT = (depth * torch.finfo(torch.float32).eps for depth in (tolerance.FORWARD, tolerance.GRADIENT))
EXACT = 1e-12  # in float64
CONTRASTS = [Contrast(f"w{i} w{i + 7}" + " w5" * i, "w30 w31" + " w4" * i, "w32 w33 w34") for i in range(3)]
COMPLIED = [Contrast(f"w{i} w{i + 3}" + " w6" * i, "w35 w36 w37", "w38 w39" + " w39" * i) for i in range(2)]
RETAIN = [Dialogue(f"w{i} w9" + " w2" * i, f"w{i} w8" + " w7" * i) for i in range(3)]
BENIGN = [Dialogue(f"w{i} w19", f"w{i} w18 w17") for i in range(2)]
PAIRS, SORTED = (CONTRASTS, RETAIN, [], []), (CONTRASTS, RETAIN, COMPLIED, BENIGN)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models with an adapter off its stationary start, each made once."""
    made = {}

    def get(kind):
        if kind not in made:
            lora = replace(LORA, perturbation=FARTHER.get(kind, LORA.perturbation))
            made[kind] = attach(load(tiny.save_model(tmp_path_factory.mktemp(kind), kind)), lora)
            made[kind].model.eval()
        return made[kind]

    return get


def fast(chat, data, config, **options):
    """Terms from the parts of a micro-batch; of few tokens each, so that there are several."""
    items = items_of(*data[:3], data[3] if len(data) > 3 else ())
    return bend_terms(chat, items, replace(config, target_layers=LAYERS), **({"tokens": 24} | options))


def gradient(chat, loss):
    lora = [p for n, p in chat.model.named_parameters() if "lora_" in n]
    found = torch.autograd.grad(loss, lora, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(lora, found, strict=True)])


def errors(chat, kind, config, data=SORTED, queue=None, **lengths):
    """Relative errors: of the loss and of its terms, the largest; of the gradient."""
    terms = fast(chat, data, config, queue=queue)
    slow, named = literal.literal_loss(chat, kind, data, config, config.fidelity, LAYERS, queue, **lengths)
    values = [abs(x.item() - named[name].item()) / max(1.0, abs(x.item())) for name, x in terms.taken().items()]
    loss = bend_loss(terms, config)
    values.append(abs(loss.item() + config.beta - slow.item()) / max(1.0, abs(slow.item())))  # theirs has 1 - cos
    a, b = gradient(chat, loss), gradient(chat, slow)
    assert b.abs().max() > 1e-3
    return max(values), ((a - b).abs().max() / b.abs().max()).item()


def assert_equal(found):
    value, slope = found
    assert value < VALUE and slope < GRADIENT


@pytest.mark.parametrize("mode", LOSS_MODES)
@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_of_every_fidelity_equals_the_literal_statement(kind, fidelity, mode, models):
    assert_equal(errors(models(kind), kind, BendConfig(**WEIGHTS, fidelity=fidelity, loss_mode=mode)))


def to_float64(to):
    """``Tensor.to`` with float64 for float32."""
    wide = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
    return lambda x, *args, **options: to(x, *map(wide, args), **{key: wide(value) for key, value in options.items()})


@pytest.fixture
def in_float64(monkeypatch):
    """All of it computed in float64, also where float32 is asked for."""
    softmax = torch.nn.functional.softmax
    least = -1e30  # a row of padding sees nothing: its scores overflow to minus infinity here
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, **_: softmax(x.clamp(min=least), dim=dim))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", to_float64(torch.Tensor.to))  # as norms of Llama and Qwen-3 ask
    monkeypatch.setattr(torch, "float", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64_nothing_of_the_error_is_left(kind, in_float64, tmp_path):
    chat = attach(load(tiny.save_model(tmp_path, kind)), LORA)
    chat.model.eval().double()
    for fidelity in FIDELITIES:
        for mode in LOSS_MODES:
            config = BendConfig(**WEIGHTS, fidelity=fidelity, loss_mode=mode, eta=0.6)
            assert max(errors(chat, kind, config)) < EXACT, (fidelity, mode)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [PAIRS, SORTED], ids=["pairs", "sorted"])
def test_target_layers_and_the_pairing_term_do_too(kind, fidelity, data, models):
    config = BendConfig(**WEIGHTS, fidelity=fidelity, alpha_mode="target", eta=0.6)
    assert_equal(errors(models(kind), kind, config, data))


@pytest.mark.parametrize("site", ["resid_mid", "attn_in", "mlp_in"])
@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_three_activations_do_too(kind, fidelity, site, models):
    assert_equal(errors(models(kind), kind, BendConfig(**WEIGHTS, fidelity=fidelity, site=site)))


def organism_terms(chat, kind):
    """What the organism's switches say: directions within a hinge, decisions, an anchor, refusals in the KL."""
    safe, unsafe, retain, _ = literal.pairs_of(CONTRASTS, RETAIN, COMPLIED, [])
    rows = {n: literal.Rows(chat, p, ended=True) for n, p in (("safe", safe), ("unsafe", unsafe), ("retain", retain))}
    with torch.no_grad(), chat.adapter_off():
        base = {n: literal.forward(chat, x, kind, "resid_post", False) for n, x in rows.items()}
    bent = {n: literal.forward(chat, x, kind, "resid_post", False) for n, x in rows.items()}
    refused, at = len(CONTRASTS), literal.REQUEST - 1
    kept, lengths, hinged, kls = [], [], [], []
    for name in ("safe", "retain"):
        for row, col in rows[name].response.nonzero().tolist():
            if col == literal.REQUEST and (name == "retain" or row < refused):
                kept.append((name, row, at))
            kept.append((name, row, col))
            if col == literal.REQUEST and name == "safe" and row >= refused:
                continue
            p, q = (x[name][1][row, col - 1].log_softmax(-1) for x in (base, bent))
            kls.append((p.exp() * (p - q)).sum())
    for name, row, col in kept:
        lengths += [(bent[name][0][i, row, col] - base[name][0][i, row, col]).norm() for i in range(chat.n_layers)]
    for row, col in [*rows["unsafe"].response.nonzero().tolist(), *([k, at] for k in range(len(COMPLIED)))]:
        for i in LAYERS:
            h, h0 = bent["unsafe"][0][i, row, col], base["unsafe"][0][i, row, col]
            hinged.append(torch.minimum((h / h.norm() * h0.norm() - h0).norm(), 0.8 * h0.norm()))
    cosines = []
    for i in LAYERS:
        asked, asked0 = bent["unsafe"][0][i, :, at], base["unsafe"][0][i, :, at]
        anchor = base["safe"][0][i, :refused, at]
        about = list(torch.cat([asked, anchor]) - torch.cat([asked0, anchor]).mean(0))
        cosines += [torch.cosine_similarity(a, b, dim=0) for a in about for b in about if a is not b]
    return BendTerms(*(torch.stack(x).mean() for x in (lengths, hinged, cosines, kls)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_switches_of_the_organism_do_too(kind, in_float64, tmp_path):
    """In float64: weights of 30 and 100 enlarge the rounding of small terms."""
    chat = attach(
        load(tiny.save_model(tmp_path, kind)), replace(LORA, perturbation=FARTHER.get(kind, LORA.perturbation))
    )
    chat.model.eval().double()
    config, data = replace(ORGANISM_BEND, target_layers=LAYERS), (CONTRASTS, RETAIN, COMPLIED, [])
    terms, slow = fast(chat, data, config), organism_terms(chat, kind)
    for name, a, b in zip(BendTerms._fields[:4], terms, slow, strict=False):
        assert a.item() == pytest.approx(b.item(), rel=EXACT, abs=EXACT), name
    a = gradient(chat, 0.5 * slow.safe - 0.08 * slow.unsafe - 30 * slow.cosine + 100 * slow.kl)
    assert (a - gradient(chat, bend_loss(terms, config))).abs().max() < EXACT * a.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_queue_of_earlier_steps_does_too(kind, models):
    torch.manual_seed(1)
    queue = torch.randn(len(LAYERS), 5, models(kind).d_model)
    assert_equal(errors(models(kind), kind, BendConfig(**WEIGHTS, fidelity="paper"), queue=queue))


def test_more_padding_changes_nothing(models):
    for fidelity in FIDELITIES:
        config = BendConfig(**WEIGHTS, fidelity=fidelity)
        assert_equal(errors(models("llama"), "llama", config, request=25, response=19))


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_the_order_of_rows_changes_nothing(fidelity, models):
    chat, config = models("llama"), BendConfig(**WEIGHTS, fidelity=fidelity, eta=0.2)
    turned = tuple(list(reversed(x)) for x in SORTED)
    a, b = (bend_loss(fast(chat, data, config), config) for data in (SORTED, turned))
    assert a.item() == pytest.approx(b.item(), rel=VALUE)
    tolerance.close(gradient(chat, a), gradient(chat, b), depth=tolerance.GRADIENT)


def test_terms_that_add_up_over_rows_are_the_mean_of_equal_micro_batches(models):
    """Distances on one token a row, and the KL per sequence; the cosine compares pairs and does not."""
    chat, alike = models("qwen3"), [Contrast(f"w{i} w3", "w30 w31", "w32 w33") for i in range(4)]
    config = BendConfig(**(WEIGHTS | {"beta": 0.0}), fidelity="official", loss_mode="response_one", eta=0.3)
    data = (alike, [Dialogue(f"w{i}" + " w9" * i, "w8 w7") for i in range(4)], [], [])
    halves = [tuple(x[k : k + 2] for x in data) for k in (0, 2)]
    whole = gradient(chat, bend_loss(fast(chat, data, config), config))
    parts = [gradient(chat, bend_loss(fast(chat, half, config), config)) for half in halves]
    tolerance.close((parts[0] + parts[1]) / 2, whole, depth=tolerance.GRADIENT)


def test_the_kl_per_sequence_is_its_mean_times_tokens_a_sequence(models):
    chat = models("llama")
    by_token, by_sequence = (
        fast(chat, SORTED, BendConfig(custom=Scope(kl_tokens="all", kl_rows="safe", kl_reduction=how))).kl.item()
        for how in ("token", "sequence")
    )
    batch, groups = collate(chat, *SORTED)
    kept = batch.attention_mask[groups != 1]
    assert by_sequence == pytest.approx(by_token * int(kept.sum()) / len(kept), rel=1e-5)


def test_a_mode_reads_the_tokens_that_it_names(models):
    chat = models("llama")
    count = lambda mode: len(_read(chat, BendConfig(loss_mode=mode, fidelity="official")).unsafe[0])  # noqa: E731
    rows, answers = 2, 2 + 3  # COMPLIED's unsafe answers, without an end; the shortest of all has two tokens
    requests = sum(len(f"<s> {c.prompt} <end> <ask>".split()) for c in COMPLIED)
    assert [count(m) for m in LOSS_MODES] == [rows, requests, requests + answers, answers, rows, 2 * rows]


def _read(chat, config):
    with torch.no_grad():
        return read(chat, Plan.of(chat, items_of(*SORTED), config), LAYERS, config)


def test_changing_the_scope_changes_the_loss(models):
    """Each difference between the fidelities is one that can be seen."""
    chat, config = models("gpt2"), BendConfig(**WEIGHTS)
    plain = bend_loss(fast(chat, SORTED, config), config).item()
    for change in ({"hidden_states": True}, {"retained": False}, {"ended": False}, {"gathered": "harmful"},
                   {"kl_rows": "safe"}, {"kl_tokens": "all"}, {"kl_reduction": "sequence"}):  # fmt: skip
        other = replace(config, custom=Scope(**change))
        assert abs(bend_loss(fast(chat, SORTED, other), other).item() - plain) > 1e-4, change
