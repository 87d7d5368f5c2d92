"""Each defence loss against a slow re-statement of its paper's formula, its signs and its gradients."""

import math

import pytest
import torch

from replib.core.errors import ReplibError
from replib.defences.circuit_breaker import breaker_schedule, rerouting
from replib.defences.losses import StatePair, distance
from replib.defences.preference import LogProbs, dpo, npo
from replib.defences.rmu import mean_square, rmu_target
from replib.defences.whp import generic_logits

LAYERS, ROWS, TOKENS, DIM = 2, 3, 4, 5
PLACES = [(layer, token) for layer in range(LAYERS) for token in range(TOKENS)]


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def hidden(draw):
    return draw(LAYERS, TOKENS, DIM)


def test_distance_and_rerouting_equal_their_formulas_written_token_by_token(draw):
    retain, harmful = StatePair(hidden(draw), hidden(draw)), StatePair(hidden(draw), hidden(draw))
    apart = sum(math.dist(retain.tuned[p].tolist(), retain.reference[p].tolist()) for p in PLACES) / len(PLACES)
    reroute = 0.0
    for p in PLACES:
        x, y = harmful.tuned[p], harmful.reference[p]
        reroute += max(0.0, float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))) / len(PLACES)

    assert float(distance(*retain)) == pytest.approx(apart, rel=1e-6)
    assert float(rerouting(harmful)) == pytest.approx(reroute, rel=1e-6)
    assert breaker_schedule(0.2, alpha=10.0) == pytest.approx((10 * 0.1, 10 * 0.9))


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
        pair = StatePair(tuned, frozen)
        retain, reroute = breaker_schedule(0.5)
        (retain * distance(*pair) + reroute * rerouting(pair)).backward()
        return tuned.grad

    assert gradient_at(frozen).abs().max() < 1e-14
    assert gradient_at(frozen + 1e-4 * hidden(draw)).abs().max() > 1e-3


def test_rerouting_ignores_directions_already_opposed(draw):
    frozen = hidden(draw)
    tuned = (-frozen).requires_grad_()
    loss = rerouting(StatePair(tuned, frozen))
    loss.backward()
    assert loss.item() == 0.0
    assert tuned.grad.abs().max() == 0.0


def test_mean_square_equals_its_formula_written_token_by_token(draw):
    target = rmu_target(DIM, steering=6.5, seed=1).double()
    retain, forget = StatePair(hidden(draw), hidden(draw)), StatePair(hidden(draw), target)

    def literal(pair, reference_at):
        return sum(float((pair.tuned[p] - reference_at(p)).square().sum()) for p in PLACES) / len(PLACES) / DIM

    assert float(mean_square(forget)) == pytest.approx(literal(forget, lambda _: target), rel=1e-12)
    assert float(mean_square(retain)) == pytest.approx(literal(retain, lambda p: retain.reference[p]), rel=1e-12)


def test_rmu_target_is_a_seeded_point_of_the_positive_orthant():
    first, again, other = rmu_target(64, steering=6.5, seed=3), rmu_target(64, seed=3), rmu_target(64, seed=4)
    assert float(first.norm()) == pytest.approx(6.5, rel=1e-6)
    assert (first >= 0).all()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_one_gradient_step_on_rmu_moves_forgotten_tokens_towards_the_target(draw):
    target = rmu_target(DIM).double()
    tuned = hidden(draw).requires_grad_()
    mean_square(StatePair(tuned, target)).backward()
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
    assert torch.autograd.gradcheck(lambda h: rerouting(StatePair(h, frozen)), x)
    assert torch.autograd.gradcheck(lambda h: mean_square(StatePair(h, frozen)) + mean_square(StatePair(h, target)), x)
    logp, other = draw(ROWS).requires_grad_(), draw(ROWS)
    assert torch.autograd.gradcheck(lambda p: npo(LogProbs(p, other), beta=0.7), logp)
    assert torch.autograd.gradcheck(lambda p: dpo(LogProbs(p, other), LogProbs(other, p), beta=0.7), logp)


def test_generic_logits_fall_where_reinforcement_raised_them_and_stay_elsewhere():
    base, reinforced = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.5, -1.0, 0.1]])
    torch.testing.assert_close(generic_logits(reinforced, base, alpha=3.0), torch.tensor([[0.5, 1.0, -0.3]]))


def test_retaining_pulls_every_token_home_with_equal_force(draw):
    frozen, tuned = hidden(draw), hidden(draw).requires_grad_()
    distance(tuned, frozen).backward()
    outward = torch.nn.functional.normalize((tuned - frozen).detach(), dim=-1)
    torch.testing.assert_close(tuned.grad, outward / len(PLACES), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loss", [rerouting, mean_square])
def test_a_batch_without_tokens_is_refused(draw, loss):
    with pytest.raises(ReplibError, match="no token counts"):
        loss(StatePair(draw(LAYERS, 0, DIM), draw(LAYERS, 0, DIM)))


def test_half_precision_is_widened_before_the_norm():
    big = torch.full((1, 1, DIM), 300.0, dtype=torch.float16)  # 300² overflows float16
    assert float(distance(big, -big)) == pytest.approx(600 * math.sqrt(DIM), rel=1e-3)
    assert float(mean_square(StatePair(big, -big))) == pytest.approx(600**2, rel=1e-3)
    assert float(rerouting(StatePair(big, big))) == pytest.approx(1.0, rel=1e-3)
