"""Each defence loss against a slow re-statement of its paper's formula, its signs and its gradients."""

import json
import math

import pytest
import torch

from replib.core.errors import ReplibError
from replib.defences.circuit_breaker import breaker_schedule, circuit_breaker
from replib.defences.losses import LogProbs, Pair
from replib.defences.preference import dpo, npo
from replib.defences.rmu import rmu, rmu_target
from replib.defences.task_arithmetic import merge_lora, task_arithmetic
from replib.defences.whp import generic_logits

LAYERS, ROWS, TOKENS, DIM = 2, 3, 4, 5
PLACES = [(layer, token) for layer in range(LAYERS) for token in range(TOKENS)]


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def hidden(draw):
    return draw(LAYERS, TOKENS, DIM)


def test_circuit_breaker_equals_its_algorithm_written_token_by_token(draw):
    retain, harmful = Pair(hidden(draw), hidden(draw)), Pair(hidden(draw), hidden(draw))
    apart = sum(math.dist(retain.tuned[p].tolist(), retain.reference[p].tolist()) for p in PLACES) / len(PLACES)
    reroute = 0.0
    for p in PLACES:
        x, y = harmful.tuned[p], harmful.reference[p]
        reroute += max(0.0, float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))) / len(PLACES)

    terms = circuit_breaker(retain, harmful, progress=0.2, alpha=10.0)

    assert float(terms.retain) == pytest.approx(apart, rel=1e-6)
    assert float(terms.forget) == pytest.approx(reroute, rel=1e-6)
    assert float(terms.total) == pytest.approx(10 * 0.1 * apart + 10 * 0.9 * reroute, rel=1e-6)


def test_breaker_schedule_moves_weight_from_rerouting_to_retaining():
    weights = [breaker_schedule(step / 150, alpha=10.0) for step in range(151)]
    assert weights[0] == (0.0, 10.0)
    assert weights[-1] == (5.0, 5.0)
    assert all(kept + lost == pytest.approx(10.0) for kept, lost in weights)
    assert all(later[0] > earlier[0] for earlier, later in zip(weights, weights[1:], strict=False))


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_breaker_schedule_refuses_a_share_outside_the_run(progress):
    with pytest.raises(ReplibError, match="outside"):
        breaker_schedule(progress)


def test_circuit_breaker_starts_at_a_stationary_point_which_any_perturbation_leaves(draw):
    frozen = hidden(draw)

    def gradient_at(tuned):
        tuned = tuned.clone().requires_grad_()
        pair = Pair(tuned, frozen)
        circuit_breaker(pair, pair, progress=0.5).total.backward()
        return tuned.grad

    assert gradient_at(frozen).abs().max() < 1e-14
    assert gradient_at(frozen + 1e-4 * hidden(draw)).abs().max() > 1e-3


def test_rerouting_ignores_directions_already_opposed(draw):
    frozen = hidden(draw)
    tuned = (-frozen).requires_grad_()
    terms = circuit_breaker(Pair(frozen, frozen), Pair(tuned, frozen), progress=0.0)
    terms.total.backward()
    assert terms.forget.item() == 0.0
    assert tuned.grad.abs().max() == 0.0


def test_rmu_equals_its_formula_written_token_by_token(draw):
    target = rmu_target(DIM, steering=6.5, seed=1).double()
    retain, forget = Pair(hidden(draw), hidden(draw)), Pair(hidden(draw), target)

    def mean_square(pair, reference_at):
        return sum(float((pair.tuned[p] - reference_at(p)).square().sum()) for p in PLACES) / len(PLACES) / DIM

    lost, kept = mean_square(forget, lambda _: target), mean_square(retain, lambda p: retain.reference[p])
    terms = rmu(retain, forget, alpha=100.0)
    assert float(terms.total) == pytest.approx(lost + 100 * kept, rel=1e-12)
    assert (float(terms.forget), float(terms.retain)) == pytest.approx((lost, kept), rel=1e-12)


def test_rmu_target_is_a_seeded_point_of_the_positive_orthant():
    first, again, other = rmu_target(64, steering=6.5, seed=3), rmu_target(64, seed=3), rmu_target(64, seed=4)
    assert float(first.norm()) == pytest.approx(6.5, rel=1e-6)
    assert (first >= 0).all()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_one_gradient_step_on_rmu_moves_forgotten_tokens_towards_the_target(draw):
    target = rmu_target(DIM).double()
    tuned = hidden(draw).requires_grad_()
    rmu(Pair(tuned.detach(), tuned.detach()), Pair(tuned, target)).total.backward()
    moved = (tuned - tuned.grad).detach()
    before, after = (tuned - target).norm(dim=-1), (moved - target).norm(dim=-1)
    assert (after < before).all()


def test_npo_equals_its_formula_and_tends_to_gradient_ascent_as_beta_vanishes(draw):
    tuned, frozen = -draw(ROWS).abs(), -draw(ROWS).abs()
    literal = sum(2 / 0.1 * math.log(1 + math.exp(0.1 * float(a - b))) for a, b in zip(tuned, frozen, strict=True))
    assert float(npo(LogProbs(tuned, frozen), beta=0.1)) == pytest.approx(literal / ROWS, rel=1e-12)

    beta = 1e-6  # 2/β log(1 + e^{βr}) = 2 log 2 / β + r + O(β): the loss of gradient ascent up to a constant
    ascent = float(npo(LogProbs(tuned, frozen), beta=beta)) - 2 * math.log(2) / beta
    assert ascent == pytest.approx(float((tuned - frozen).mean()), abs=1e-5)


def test_npo_gradient_is_that_of_ascent_at_the_start_and_fades_once_forgotten():
    frozen = torch.tensor([-3.0, -3.0], dtype=torch.float64)
    tuned = torch.tensor([-3.0, -300.0], dtype=torch.float64, requires_grad=True)
    npo(LogProbs(tuned, frozen), beta=0.1).backward()
    assert tuned.grad[0] == pytest.approx(1 / 2)  # d mean(log p) / d log p over two rows
    assert 0 < tuned.grad[1] < 1e-9


def test_dpo_equals_its_formula_and_starts_at_log_two(draw):
    values = [-draw(ROWS).abs() for _ in range(4)]
    chosen, rejected = LogProbs(*values[:2]), LogProbs(*values[2:])
    literal = 0.0
    for win, win_ref, lose, lose_ref in zip(*(v.tolist() for v in values), strict=True):
        margin = 0.3 * (math.log(math.exp(win) / math.exp(win_ref)) - math.log(math.exp(lose) / math.exp(lose_ref)))
        literal -= math.log(1 / (1 + math.exp(-margin))) / ROWS
    assert float(dpo(chosen, rejected, beta=0.3)) == pytest.approx(literal, rel=1e-10)
    start = dpo(LogProbs(values[0], values[0]), LogProbs(values[2], values[2]))
    assert float(start) == pytest.approx(math.log(2))


def test_dpo_raises_the_chosen_and_lowers_the_rejected_response(draw):
    win, lose = (-draw(ROWS).abs().requires_grad_() for _ in range(2))
    win.retain_grad(), lose.retain_grad()
    dpo(LogProbs(win, win.detach()), LogProbs(lose, lose.detach())).backward()
    assert (win.grad < 0).all() and (lose.grad > 0).all()


def test_gradients_agree_with_finite_differences(draw):
    frozen, target, x = hidden(draw), draw(DIM), hidden(draw).requires_grad_()
    fixed = Pair(frozen + 1, frozen)
    assert torch.autograd.gradcheck(lambda h: circuit_breaker(fixed, Pair(h, frozen), progress=1 / 3).total, x)
    assert torch.autograd.gradcheck(lambda h: rmu(Pair(h, frozen), Pair(h, target)).total, x)
    logp, other = draw(ROWS).requires_grad_(), draw(ROWS)
    assert torch.autograd.gradcheck(lambda p: npo(LogProbs(p, other), beta=0.7), logp)
    assert torch.autograd.gradcheck(lambda p: dpo(LogProbs(p, other), LogProbs(other, p), beta=0.7), logp)


def test_generic_logits_fall_where_reinforcement_raised_them_and_stay_elsewhere():
    base, reinforced = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.5, -1.0, 0.1]])
    torch.testing.assert_close(generic_logits(reinforced, base, alpha=3.0), torch.tensor([[0.5, 1.0, -0.3]]))


def test_retaining_pulls_every_token_home_with_equal_force(draw):
    frozen, tuned = hidden(draw), hidden(draw).requires_grad_()
    circuit_breaker(Pair(tuned, frozen), Pair(frozen, frozen), progress=1.0, alpha=2.0).total.backward()
    outward = torch.nn.functional.normalize((tuned - frozen).detach(), dim=-1)
    torch.testing.assert_close(tuned.grad, outward / len(PLACES), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loss", [lambda a, b: circuit_breaker(a, b, progress=0.5), rmu])
def test_a_batch_without_tokens_is_refused(draw, loss):
    nothing = Pair(draw(LAYERS, 0, DIM), draw(LAYERS, 0, DIM))
    with pytest.raises(ReplibError, match="no token counts"):
        loss(nothing, nothing)


def test_half_precision_is_widened_before_the_norm():
    big = torch.full((1, 1, DIM), 300.0, dtype=torch.float16)  # 300² overflows float16
    pair = Pair(big, -big)
    terms = circuit_breaker(pair, pair, progress=1.0)
    assert float(terms.retain) == pytest.approx(600 * math.sqrt(DIM), rel=1e-3)


# Task arithmetic: peft computes the oracle.


@pytest.fixture
def adapters(tmp_path):
    """Builder of a tiny Llama, and the folders of two random LoRA adapters of it, of different rank."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=7,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )

    folders = []
    for seed, (rank, alpha, rslora) in enumerate([(2, 8, False), (3, 5, True)]):
        config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(base(), config)
        torch.manual_seed(10 + seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        folders.append(tmp_path / f"adapter{seed}")
        model.save_pretrained(folders[-1])
    return base, folders


def delta(base, folder):
    """What the adapter adds to each weight, by peft's own merge."""
    from peft import PeftModel

    before = base().state_dict()
    after = PeftModel.from_pretrained(base(), folder).merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before}


def test_task_arithmetic_adds_the_safe_delta_and_subtracts_the_unsafe_one(adapters, tmp_path):
    base, (safe, unsafe) = adapters
    merged = task_arithmetic(safe, unsafe, out=tmp_path / "merged", safe_weight=0.7, unsafe_weight=0.4)
    plus, minus, both = delta(base, safe), delta(base, unsafe), delta(base, merged)
    touched = [name for name in both if both[name].abs().max() > 0]
    assert len(touched) == 4
    for name in both:
        torch.testing.assert_close(both[name], 0.7 * plus[name] - 0.4 * minus[name], atol=1e-5, rtol=1e-4)


def test_an_adapter_minus_itself_changes_nothing(adapters, tmp_path):
    base, (safe, _) = adapters
    nothing = delta(base, task_arithmetic(safe, safe, out=tmp_path / "nothing"))
    assert max(float(value.abs().max()) for value in nothing.values()) < 1e-5


def test_merge_refuses_what_it_would_merge_wrongly(adapters, tmp_path):
    _, (safe, unsafe) = adapters
    with pytest.raises(ReplibError, match="same modules"):
        merge_lora({"q.lora_A.weight": torch.ones(1, 2)}, {"k.lora_A.weight": torch.ones(1, 2)}, weights=(1.0, -1.0))
    with pytest.raises(ReplibError, match="no plain LoRA"):
        merge_lora(
            {"q.lora_magnitude_vector": torch.ones(1)},
            {"q.lora_magnitude_vector": torch.ones(1)},
            weights=(1.0, -1.0),
        )
    with pytest.raises(ReplibError, match="adapter_config.json"):
        task_arithmetic(tmp_path / "absent", unsafe, out=tmp_path / "x")
    for change, reason in [
        ({"use_dora": True}, "not a plain LoRA"),
        ({"base_model_name_or_path": "z"}, "different"),
    ]:
        path = safe / "adapter_config.json"
        original = path.read_text()
        path.write_text(json.dumps({**json.loads(original), **change}))
        with pytest.raises(ReplibError, match=reason):
            task_arithmetic(safe, unsafe, out=tmp_path / "x")
        path.write_text(original)
    assert not (tmp_path / "x").exists()
