"""Each rival's parts sum to the literal statement of `literal_rivals.py`, in value and in the gradient of all of LoRA.

Errors are relative: of a value to its size, of a gradient to its largest entry.
"""

import math
import warnings
from dataclasses import replace

import pytest
import torch

from defences.repbend.test_loss_literal import GRADIENT, KINDS, VALUE, in_float64  # noqa: F401 - a fixture
from helpers import literal_rivals as literal
from helpers import tiny
from replib.core.errors import ReplibError
from replib.data.mixtures import DefenceData
from replib.data.prompts import Contrast, Dialogue, Prompt
from replib.defences.catalogue import DEFENCES, INSTRUCTIONS, baseline, safety_prompted, train_baseline
from replib.defences.circuit_breaker import CircuitBreaker
from replib.defences.preference import DPO, NPO
from replib.defences.rmu import RMU
from replib.defences.sft import SFT, RetainLoss
from replib.defences.task_arithmetic import TaskArithmetic, merged_tasks, train_tasks
from replib.defences.whp import WHP, LabelledDialogue, relabelled, train_whp
from replib.models import forward as passes
from replib.models.adapters import attached_lora, detached, perturb
from replib.models.chat_model import ChatModel
from replib.models.forward import answer_batch, answer_states, answer_tokens
from replib.models.load import PUBLISHED, known_table, load
from replib.training.config import TrainConfig
from replib.training.objective import reference
from replib.training.train import train

NEARER = {"gemma2": 0.1}  # its capped logits round more the farther it is from the base
DOWN = {"gpt2": ("mlp.c_proj",)}
UNSAFE = [Dialogue(f"w{i} w{i + 3}" + " w6" * i, "w38 w39" + " w37" * i) for i in range(3)]
RETAIN = [Dialogue(f"w{i} w9" + " w2" * i, f"w{i} w8" + " w7" * (3 - i)) for i in range(3)]
SAFE = [Dialogue(f"w{i} w{i + 7}", "w30 w31" + " w4" * i) for i in range(2)]
PAIRS = [Contrast(f"w{i} w{i + 7}" + " w5" * i, "w30 w31" + " w4" * i, "w32 w33 w34") for i in range(3)]
ITEMS = {"unsafe": UNSAFE, "retain": RETAIN, "safe": SAFE, "pairs": PAIRS}
DATA = DefenceData(**ITEMS)
FULL = RetainLoss(ce=0.7, kl=0.4, temperature=2.0, on="safe")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Saved tiny models, each made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tiny.save_model(tmp_path_factory.mktemp(kind), kind)
        return load(str(made[kind]))

    return get


@pytest.fixture(scope="module")
def models(bases):
    """Models with an adapter on an objective's weights, moved off its start; each made once."""
    made = {}

    def get(kind, objective=None):
        where = objective.lora(3) if objective else None
        if (kind, where) not in made:
            made[kind, where] = adapted(bases(kind), where, NEARER.get(kind, 0.2))
        return made[kind, where]

    return get


def adapted(base, where=None, std=0.2):
    places = {} if where is None else {"blocks": where.blocks, "modules": where.modules}
    torch.manual_seed(0)
    chat = attached_lora(base, rank=2, alpha=4, **places)
    perturb(chat, std, seed=1)
    chat.model.eval()
    return chat


def total(chat, objective, items=ITEMS, progress=0.4):
    return sum(part.loss for part in objective.parts(chat, items, progress))


def logits_of(chat, batch):
    return chat.logits(answer_states(chat, batch))


def gradient(chat, loss):
    lora = [p for n, p in chat.model.named_parameters() if "lora_" in n]
    found = torch.autograd.grad(loss, lora, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(lora, found, strict=True)])


def assert_equal(chat, fast, slow, value=VALUE, slope=GRADIENT):
    assert abs(fast.item() - slow.item()) <= value * max(1.0, abs(slow.item()))
    a, b = gradient(chat, fast), gradient(chat, slow)
    assert b.abs().max() > 1e-4
    assert (a - b).abs().max() <= slope * b.abs().max()


def statement(chat, objective, items=ITEMS, progress=0.4, **lengths):
    """The literal loss of an objective."""
    unsafe, retain = items["unsafe"], items["retain"]
    match objective:
        case SFT(side=side):
            return literal.sft(chat, items[side], **lengths)
        case DPO(beta=beta):
            return literal.dpo(chat, items["pairs"], beta, **lengths)
        case NPO(beta=beta, keep=keep):
            loss = literal.npo(chat, unsafe, beta, **lengths)
            kept = (items[keep.on], keep.ce, keep.kl, keep.temperature)
            return loss + literal.keep(chat, *kept, **lengths) if keep.lists else loss
        case RMU(alpha=alpha, steering=steering, layer=layer, seed=seed):
            return literal.rmu(chat, unsafe, retain, layer, alpha, steering, seed, **lengths)
        case CircuitBreaker(alpha=alpha, layers=layers, relative=relative):
            hidden, kept = [i + 1 for i in layers], min(max(layers) + 2, chat.n_layers)
            return literal.circuit_breaker(chat, unsafe, retain, hidden, kept, alpha, progress, relative, **lengths)


RIVALS = {
    "sft": SFT(),
    "sft_unsafe": SFT(side="unsafe"),
    "dpo": DPO(beta=0.3),
    "npo": NPO(),
    "npo_rt": NPO(beta=0.2, keep=RetainLoss(ce=1.0)),
    "npo_kl": NPO(keep=RetainLoss(kl=1.0)),
    "npo_both": NPO(keep=FULL),
    "rmu": RMU(alpha=3.0, layer=1, seed=3),
    "rmu_first": RMU(alpha=1200.0, layer=0),
    "rmu_last": RMU(alpha=3.0, layer=2),
    "circuit_breaker": CircuitBreaker(layers=(0, 1)),
    "circuit_breaker_cut": CircuitBreaker(alpha=5.0, layers=(0,)),
    "circuit_breaker_relative": CircuitBreaker(layers=(0, 1), relative=True),
}


def of_kind(name, kind):
    objective = RIVALS[name]
    return replace(objective, modules=DOWN[kind]) if isinstance(objective, RMU) and kind in DOWN else objective


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_sum_to_the_literal_statement(kind, name, models):
    objective = of_kind(name, kind)
    chat = models(kind, objective)
    assert_equal(chat, total(chat, objective), statement(chat, objective))


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64_nothing_of_the_error_is_left(kind, in_float64, bases):  # noqa: F811
    for name in ("dpo", "npo_both", "rmu", "circuit_breaker"):
        objective = of_kind(name, kind)
        chat = adapted(bases(kind), objective.lora(3))
        chat.model.double()
        assert_equal(chat, total(chat, objective), statement(chat, objective), 1e-12, 1e-11)


@pytest.mark.parametrize("name", RIVALS)
def test_more_padding_and_another_order_change_nothing(name, models):
    objective = RIVALS[name]
    chat = models("llama", objective)
    turned = {name: list(reversed(rows)) for name, rows in ITEMS.items()}
    assert_equal(chat, total(chat, objective, turned), statement(chat, objective, request=25, response=19))


@pytest.mark.parametrize("name", ["dpo", "npo"])
def test_a_mean_over_rows_is_the_mean_of_equal_micro_batches(name, models):
    chat, objective = models("qwen3"), RIVALS[name]
    each = [total(chat, objective, {key: rows[i : i + 1] for key, rows in ITEMS.items()}) for i in range(3)]
    whole = {key: rows[:3] for key, rows in ITEMS.items()}
    assert_equal(chat, total(chat, objective, whole), sum(each) / 3)


@pytest.mark.parametrize("name", RIVALS)
def test_terms_are_logged_unweighted_and_hold_no_graph(name, models):
    chat = models("llama", RIVALS[name])
    terms = [part.terms for part in RIVALS[name].parts(chat, ITEMS, 0.4)]
    assert all(value.ndim == 0 and not value.requires_grad for part in terms for value in part.values())
    assert sum(map(len, terms)) == len({key for part in terms for key in part})


# --------------------------------------------------------------------------------------------- likelihood
def test_sft_is_the_loss_that_transformers_reports_for_the_same_labels(models):
    chat = models("gpt2")
    batch = answer_batch(chat, [(d.prompt, d.response) for d in SAFE])
    told = batch.input_ids.masked_fill(~batch.response_mask, -100)
    with torch.no_grad():
        theirs = chat.model(**batch.inputs(), labels=told).loss
    assert total(chat, SFT()).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_answers_end_and_each_token_is_predicted_from_the_one_before(models):
    chat = models("llama")
    batch = answer_batch(chat, [(d.prompt, d.response) for d in SAFE])
    words = [chat.tokenizer.decode(t) for t in answer_tokens(batch)]
    assert words == "w30 w31 </s> w30 w31 w4 </s>".split()
    with torch.no_grad():
        full, lean = chat.forward(batch), logits_of(chat, batch)
    places = batch.response_mask.nonzero().tolist()
    torch.testing.assert_close(lean, torch.stack([full[i, t - 1] for i, t in places]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sft", "dpo", "npo_both"])
def test_logits_made_a_few_at_a_time_give_the_same(name, models, monkeypatch):
    chat = models("llama")
    whole = total(chat, RIVALS[name])
    labels = relabelled(chat, UNSAFE)
    monkeypatch.setattr(passes, "LOGITS", 3 * chat.unembed.out_features)
    assert_equal(chat, total(chat, RIVALS[name]), whole)
    assert relabelled(chat, UNSAFE) == labels


def test_a_step_down_npo_makes_unsafe_answers_less_likely(bases):
    chat = adapted(bases("llama"), std=0.0)
    before = total(chat, SFT(side="unsafe")).item()
    step(chat, total(chat, NPO()), 0.05)
    assert total(chat, SFT(side="unsafe")).item() > before + 0.01


def step(chat, loss, size):
    """One step of gradient descent on LoRA."""
    lora = [p for n, p in chat.model.named_parameters() if "lora_" in n]
    with torch.no_grad():
        for weight, slope in zip(lora, torch.autograd.grad(loss, lora, allow_unused=True), strict=True):
            weight.sub_(size * (0 if slope is None else slope))


def test_dpo_starts_at_log_two_without_a_margin(bases):
    part = next(DPO().parts(adapted(bases("llama"), std=0.0), ITEMS, 0.0))
    assert part.loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert part.terms["margin"].item() == pytest.approx(0.0, abs=1e-5)


def test_the_reference_is_the_base_whatever_the_adapter_and_its_dropout(bases):
    base = bases("qwen3")
    batch = answer_batch(base, [(d.prompt, d.response) for d in SAFE])
    with torch.no_grad():
        plain = logits_of(base, batch)
    chat = attached_lora(base, rank=2, alpha=4, dropout=0.5)
    perturb(chat, 0.3, seed=0)
    chat.model.train()
    with reference(chat) as frozen:
        assert torch.equal(logits_of(frozen, batch), plain)
    assert chat.model.training
    assert not torch.allclose(logits_of(chat, batch), plain, atol=1e-2)


# --------------------------------------------------------------------------------------------- rerouting
def test_rmu_steers_the_output_of_its_block_and_not_its_input(models):
    """The hidden state that has the block's own number is the output of the block before."""
    objective = RIVALS["rmu"]
    chat = models("llama", objective)
    off_by_one = literal.rmu(chat, UNSAFE, RETAIN, 0, 3.0, 6.5, 3)
    assert abs(total(chat, objective).item() - off_by_one.item()) > 1e-2


def test_rmu_adapts_the_down_projections_of_three_blocks_alone(models):
    objective = RMU(layer=2, modules=("mlp.c_proj",))
    names = {n for n, _ in models("gpt2", objective).model.named_parameters() if "lora_" in n}
    assert len(names) == 6 and all(".mlp.c_proj." in n for n in names)
    assert [objective.lora(12).blocks, RMU().lora(32).blocks, RMU().lora(3).blocks] == [(0, 1, 2), (5, 6, 7), (0,)]


def test_rmu_names_the_layers_there_are_where_its_own_do_not_exist(bases):
    with pytest.raises(ReplibError, match="no linear layers called down_proj.*mlp.c_proj"):
        adapted(bases("gpt2"), RMU().lora(3))


def test_passes_stop_above_what_is_read(models):
    for objective, last in ((RIVALS["rmu"], 1), (RIVALS["circuit_breaker_cut"], 1)):
        chat, run = models("llama", objective), []
        taps = [b.register_forward_hook(lambda *_, i=i, run=run: run.append(i)) for i, b in enumerate(chat.blocks)]
        total(chat, objective)
        for tap in taps:
            tap.remove()
        assert max(run) == last


def test_circuit_breaker_has_no_gradient_at_loras_start_and_one_beside_it(bases):
    base, objective = bases("llama"), RIVALS["circuit_breaker"]
    start = adapted(base, objective.lora(3), std=0.0)
    assert gradient(start, total(start, objective)).abs().max() < 1e-4
    detached(start)
    moved = adapted(base, objective.lora(3), std=1e-2)
    assert gradient(moved, total(moved, objective)).abs().max() > 0.1


def test_circuit_breaker_warns_that_its_start_is_stationary():
    with pytest.warns(UserWarning, match="perturbation=1e-3"):
        CircuitBreaker().announced(TrainConfig(), 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "blocks 9, 19 of 32" in CircuitBreaker().announced(TrainConfig(perturbation=1e-3), 32)


def test_circuit_breaker_takes_the_published_depths():
    assert CircuitBreaker().lora(32).blocks == tuple(range(21))  # as the official code for Llama-3-8B
    assert CircuitBreaker().blocks(12) == (3, 7)
    assert CircuitBreaker().about(12)["layers"] == (3, 7)
    assert RMU().about(32)["layer"] == 7


def test_circuit_breaker_shifts_its_weight_during_training(models):
    chat, objective = models("llama", RIVALS["circuit_breaker"]), RIVALS["circuit_breaker"]
    for progress, retain, reroute in ((0.0, 0.0, 10.0), (1.0, 5.0, 5.0)):
        parts = list(objective.parts(chat, ITEMS, progress))
        weights = [part.loss.item() / value.item() for part in parts for value in part.terms.values()]
        assert weights == pytest.approx([reroute, retain], rel=1e-5)


# --------------------------------------------------------------------------------------------- reinforced
@pytest.mark.parametrize("kind", KINDS)
def test_whp_learns_the_argmax_of_the_generic_logits(kind, models):
    chat = models(kind)
    rows = relabelled(chat, UNSAFE, alpha=2.0, batch_size=2)
    told, padded = literal.generic(chat, UNSAFE, alpha=2.0)
    assert [t for row in rows for t in row.labels] == told[told >= 0].tolist()
    assert [(r.prompt, r.response) for r in rows] == [(d.prompt, d.response) for d in UNSAFE]
    assert told[told >= 0].tolist() != padded.ids[told >= 0].tolist()
    objective = WHP(keep=FULL)
    slow = literal.mean_loss(literal.forward(chat, padded).logits, told) + literal.keep(chat, SAFE, 0.7, 0.4, 2.0)
    assert_equal(chat, total(chat, objective, ITEMS | {"unsafe": rows}), slow)


def test_whp_refuses_answers_without_labels_and_labels_of_another_tokenizer(models):
    with pytest.raises(ReplibError, match="3 of 3 unsafe answers have no labels.*relabelled"):
        WHP().check(models("llama"), DATA)
    wrong = [LabelledDialogue("w1 w2", "w3 w4", labels=(1,))]
    with pytest.raises(ReplibError, match="3 answer tokens have 1 labels"):
        list(WHP().parts(models("llama"), {"unsafe": wrong}, 0.0))


SHORT = TrainConfig(steps=2, learning_rate=0.02, contrasts=2, retain=2, rank=2, dropout=0.0, perturbation=1e-2)


def fit(model, data, objective):
    """The trainer itself, for two steps."""
    return train(model, data, objective, config=SHORT, say=lambda _: None, out="unused")


def likelihood(chat: ChatModel) -> dict[str, float]:
    with torch.no_grad():
        return {side: -total(chat, SFT(side=side)).item() for side in ("safe", "unsafe")}


def test_whp_is_trained_on_the_model_without_its_reinforced_adapter(bases):
    base = bases("llama")
    before = likelihood(base)
    result = train_whp(base, DATA, fit, whp=WHP(), alpha=5.0)
    assert likelihood(result.model)["unsafe"] < before["unsafe"]
    with result.model.adapter_off():
        assert likelihood(result.model) == before


def test_task_arithmetic_adds_what_is_safe_and_subtracts_what_is_not(bases, tmp_path):
    base = bases("llama")
    before = likelihood(base)
    tasks, logs = train_tasks(base, DATA, fit, out=tmp_path)
    assert logs.history.groupby("side").step.max().to_dict() == {"safe": 2, "unsafe": 2}
    method = TaskArithmetic(grid=((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 0.5)))
    choose = lambda now, was: now["safe"] - now["unsafe"]  # noqa: E731
    best, table = merged_tasks(base, tasks, likelihood, method=method, choose=choose, out=tmp_path)
    itself, nothing, learned, unlearned, _ = table.to_dict("records")
    assert itself["safe"] == before["safe"] and itself["adapter"] == ""
    assert nothing["safe"] == pytest.approx(before["safe"], rel=1e-5)
    assert learned["safe"] > before["safe"] + 0.01
    assert unlearned["unsafe"] < before["unsafe"] - 0.01
    chosen = table.loc[table.score.idxmax()]
    assert likelihood(best) == pytest.approx(chosen[["safe", "unsafe"]].to_dict(), rel=1e-5)


def test_task_arithmetic_equals_the_sum_of_weights(bases, tmp_path):
    base = bases("qwen3")
    weight = lambda chat: chat.model.merge_and_unload().state_dict()["model.layers.1.mlp.down_proj.weight"].clone()  # noqa: E731
    start = base.model.state_dict()["model.layers.1.mlp.down_proj.weight"].clone()
    tasks, _ = train_tasks(base, DATA, fit, out=tmp_path)
    best, _ = merged_tasks(
        base, tasks, likelihood, method=TaskArithmetic(((0.5, 0.2),)), choose=lambda *_: 0.0, out=tmp_path
    )
    plus, minus = (weight(load(bases("qwen3").name, adapter=task)) - start for task in tasks)
    assert minus.abs().max() > 1e-3
    torch.testing.assert_close(weight(best), start + 0.5 * plus - 0.2 * minus, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("grid", "reason"), [((), "grid of weights is empty"), (((1.0, -0.1),), "unsafe_weight=-0.1")])
def test_a_grid_that_says_nothing_or_the_minus_twice_is_refused(grid, reason):
    with pytest.raises(ReplibError, match=reason):
        TaskArithmetic(grid)


def test_an_adapter_comes_off_and_leaves_the_model_as_it_was(bases):
    base = bases("gpt2")
    before = likelihood(base)
    bare = detached(adapted(base))
    assert likelihood(bare) == before == likelihood(base)
    with pytest.raises(ReplibError, match="no adapter"):
        detached(bare)


# --------------------------------------------------------------------------------------------- what is refused
LISTS = {"sft": "safe", "dpo": "pairs", "npo": "unsafe", "npo_rt": "retain", "npo_both": "safe", "rmu": "retain",
         "circuit_breaker": "unsafe"}  # fmt: skip


@pytest.mark.parametrize(("name", "missing"), LISTS.items())
def test_a_missing_list_is_named_with_what_makes_it(name, missing, bases):
    chat = bases("llama")
    RIVALS[name].check(chat, DATA)
    with pytest.raises(ReplibError, match=rf"`{missing}`.*is empty: give DefenceData\({missing}="):
        RIVALS[name].check(chat, replace(DATA, **{missing: []}))
    field = "unsafe_response" if missing == "pairs" else "response"
    hollow = [replace(ITEMS[missing][0], **{field: " "})]
    with pytest.raises(ReplibError, match=f"1 of 1 rows of `{missing}` lack an answer"):
        RIVALS[name].check(chat, replace(DATA, **{missing: hollow}))
    with pytest.raises(ReplibError, match="defence_data"):
        RIVALS[name].check(chat, object())


@pytest.mark.parametrize(
    "objective", [RMU(layer=3), RMU(layer=-1), CircuitBreaker(layers=(1, 3)), CircuitBreaker(layers=(-1,))]
)
def test_layers_outside_the_model_are_refused(objective, bases):
    with pytest.raises(ReplibError, match="outside the model's blocks 0 to 2"):
        objective.check(bases("llama"), DATA)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_coefficients_that_are_no_weights_are_refused(bad):
    for made in (lambda: DPO(beta=bad), lambda: NPO(beta=bad), lambda: RetainLoss(ce=bad), lambda: RetainLoss(kl=bad),
                 lambda: RetainLoss(temperature=bad), lambda: RMU(alpha=bad), lambda: RMU(steering=bad),
                 lambda: CircuitBreaker(alpha=bad)):  # fmt: skip
        with pytest.raises(ReplibError, match="must be a finite number"):
            made()
    for word in (lambda: SFT(side="both"), lambda: RetainLoss(on="unsafe")):
        with pytest.raises(ReplibError, match="is unknown"):
            word()


# --------------------------------------------------------------------------------------------- by name
@pytest.mark.parametrize("name", ["dpo", "npo_kl", "rmu", "circuit_breaker", "whp_retain", "task_arithmetic"])
def test_a_rival_is_trained_by_name_with_what_it_draws(name, bases, tmp_path):
    base, found = bases("llama"), baseline(name)
    before = likelihood(base)
    validation = lambda chat: {"attack": likelihood(chat)["unsafe"]}  # noqa: E731
    result = train_baseline(found.objective, base, DATA, fit, validation=validation, out=tmp_path)
    bent = result.model
    assert result.config["method"] == found.objective.name and {"step", "loss"} <= set(result.history)
    assert (result.save(tmp_path / "defence") / "README.md").read_text().count(found.objective.name) >= 2
    assert likelihood(bent) != before
    with bent.adapter_off():
        assert likelihood(bent) == before


def test_every_rival_has_a_card_and_weights_to_adapt():
    for name, found in DEFENCES.items():
        if name != "task_arithmetic":
            assert found.objective.about(32) is not None and found.objective.lora(32)
            assert set(found.objective.draws(found.config)) <= set(ITEMS)


def test_a_name_that_is_none_is_answered_with_the_known_ones():
    with pytest.raises(ReplibError, match="circuit_breaker"):
        baseline("circuit-breaker")


def test_known_checkpoints_are_ids_of_the_hub():
    assert all(known.id.count("/") == known.base.count("/") == 1 for known in PUBLISHED)
    table = known_table()
    assert list(table.columns) == ["id", "base", "method", "paper", "is_adapter"] and table.id.is_unique


def test_a_safety_prompt_stands_before_the_request_and_hangs_on_its_text_alone():
    prompts = [Prompt(f"how do I do {i}?", label="harmful", group="g") for i in range(40)]
    shown = safety_prompted(prompts, seed=1)
    assert all(a.text == f"{a.text.split(chr(10))[0]}\n\n{b.text}" for a, b in zip(shown, prompts, strict=True))
    assert {a.text.split("\n")[0] for a in shown} == set(INSTRUCTIONS)
    assert safety_prompted(prompts[::-1], seed=1) == shown[::-1] != safety_prompted(prompts[::-1], seed=2)
    assert all((a.label, a.group) == (b.label, b.group) for a, b in zip(shown, prompts, strict=True))
