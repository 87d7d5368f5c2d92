"""Hyper-parameter grids of the defences that RepBend is compared with on the organism.

Published rates suit models of seven billion parameters; the organism has four million. Each method therefore has a
small grid around the values of its source: rates, and its most important hyper-parameter. The validation split chooses
a point, by the score that also chooses a step (``model_selection.default_choice``). All train 40 steps of about 48
rows, RepBend's organism preset 40 of 64; RMU and Circuit Breaker read their rows in part of the blocks, WHP and task
arithmetic train twice. RepBend's own preset comes from a longer search than any grid here.

Points were added for SFT, WHP and task arithmetic (rate 2e-3) and for Circuit Breaker (``relative``) after first
results on test prompts. They can only favour these baselines; the other grids are unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from replib.defences.catalogue import Baseline
from replib.defences.circuit_breaker import CircuitBreaker
from replib.defences.preference import DPO, NPO
from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import RepBend
from replib.defences.repbend.presets import ORGANISM_BEND, ORGANISM_TRAIN
from replib.defences.rmu import RMU
from replib.defences.sft import SFT, RetainLoss
from replib.defences.task_arithmetic import TaskArithmetic
from replib.defences.whp import WHP
from replib.training.config import TrainConfig

ROWS, UNSAFE_ROWS = 48, 16  # rows of a step; unsafe ones of a step that also retains
BENIGN = 2.5  # retained answers per refusal among the safe answers, as in a step of RepBend's preset


class Candidate(NamedTuple):
    """A method and its grid."""

    title: str
    """Name in tables and figures."""
    grid: tuple[Baseline, ...] = ()
    """Points that validation chooses from; () for a method without training."""
    seconds: float = 0.0
    """Cost of one training without validation: CPU seconds of a busy core, from trials of four steps."""


def _alone(learning_rate: float, rows: int = ROWS) -> TrainConfig:
    """Schedule for a loss on one list."""
    return TrainConfig(
        steps=40, learning_rate=learning_rate, contrasts=rows, schedule="linear", dropout=0.0, probe_every=10,
        save_every=0,
    )  # fmt: skip


def _kept(learning_rate: float, perturbation: float = 0.0) -> TrainConfig:
    """Schedule for a loss on unsafe answers and on retained ones."""
    return replace(_alone(learning_rate, UNSAFE_ROWS), retain=ROWS - UNSAFE_ROWS, perturbation=perturbation)


def _sft() -> tuple[Baseline, ...]:
    return tuple(Baseline(SFT(), _alone(rate)) for rate in (1e-3, 3e-3, 2e-3))


def _dpo() -> tuple[Baseline, ...]:
    return tuple(Baseline(DPO(), _alone(rate, ROWS // 2)) for rate in (3e-4, 1e-3))


def _npo() -> tuple[Baseline, ...]:
    return tuple(Baseline(NPO(), _alone(rate, 2 * UNSAFE_ROWS)) for rate in (1e-4, 3e-4))


def _npo_rt() -> tuple[Baseline, ...]:
    points = ((1.0, 3e-4), (1.0, 1e-3), (10.0, 1e-3))
    return tuple(Baseline(NPO(keep=RetainLoss(ce=weight)), _kept(rate)) for weight, rate in points)


def _npo_kl() -> tuple[Baseline, ...]:
    points = ((1.0, 3e-4), (10.0, 1e-3))
    return tuple(Baseline(NPO(keep=RetainLoss(kl=weight)), _kept(rate)) for weight, rate in points)


def _rmu() -> tuple[Baseline, ...]:
    """Grid of RMU. Steering is a norm, the organism's states have 27; block 2 has the source's depth, 6 half of all."""
    points = ((60.0, 2, 3e-3), (60.0, 6, 1e-3), (60.0, 6, 3e-3), (150.0, 6, 3e-3))
    return tuple(Baseline(RMU(alpha=3.0, steering=c, layer=block), _kept(rate)) for c, block, rate in points)


def _breaker() -> tuple[Baseline, ...]:
    """Grid of Circuit Breaker: the source's depths and RepBend's blocks; absolute and relative retain term.

    The absolute one outweighs the rerouting here. alpha scales both terms, which has almost no effect under Adam.
    """
    late = (7, 8, 9, 10, 11)
    points = (((3, 7), 1e-3, False), (late, 3e-3, False), ((3, 7), 1e-3, True), (late, 1e-3, True), (late, 3e-3, True))
    return tuple(
        Baseline(CircuitBreaker(layers=blocks, relative=relative), _kept(rate, perturbation=1e-3))
        for blocks, rate, relative in points
    )


def _whp() -> tuple[Baseline, ...]:
    """Grid of WHP: without retain loss, and with one on safe answers, as in RepBend's comparison."""
    keeps = (RetainLoss(), RetainLoss(ce=1.0, kl=0.1, temperature=2.0, on="safe"))
    points = ((keeps[0], 1e-3), (keeps[1], 1e-3), (keeps[1], 2e-3))
    return tuple(Baseline(WHP(keep=keep), _kept(rate)) for keep, rate in points)


def _arithmetic() -> tuple[Baseline, ...]:
    """Grid of task arithmetic, six weights each; an unsafe weight of zero is SFT."""
    weights = TaskArithmetic(tuple((safe, unsafe) for safe in (0.5, 1.0) for unsafe in (0.1, 0.3, 1.0)))
    return tuple(Baseline(weights, _alone(rate, ROWS // 2)) for rate in (3e-4, 1e-3, 2e-3))


def _repbend() -> tuple[Baseline, ...]:
    return (Baseline(RepBend(ORGANISM_BEND), replace(ORGANISM_TRAIN, probe_every=10, save_every=0)),)


def _official() -> tuple[Baseline, ...]:
    """Grid of RepBend in the authors' code: published weights, no safeguards, dropout, no schedule."""
    points = (1e-4, 3e-4, 1e-3)
    config = TrainConfig(steps=40, contrasts=8, retain=24, max_grad_norm=0.0, probe_every=10, save_every=0)
    return tuple(Baseline(RepBend(BendConfig(fidelity="official")), replace(config, learning_rate=r)) for r in points)


CONTENDERS = {
    "none": Candidate("no defence"),
    "prompting": Candidate("safety prompting"),
    "sft": Candidate("SFT", _sft(), 60),
    "dpo": Candidate("DPO", _dpo(), 86),
    "npo": Candidate("NPO", _npo(), 67),
    "npo_rt": Candidate("NPO-RT", _npo_rt(), 69),
    "npo_kl": Candidate("NPO-KL", _npo_kl(), 81),
    "rmu": Candidate("RMU", _rmu(), 15),
    "circuit_breaker": Candidate("Circuit Breaker", _breaker(), 57),
    "whp": Candidate("WHP", _whp(), 100),
    "task_arithmetic": Candidate("task arithmetic", _arithmetic(), 75),
    "repbend": Candidate("RepBend", _repbend(), 92),
    "repbend_official": Candidate("RepBend as published", _official(), 60),
}
"""Candidates by name, in the order of the table."""
CHOSEN = {
    "sft": 2,
    "dpo": 0,
    "npo": 1,
    "npo_rt": 0,
    "npo_kl": 0,
    "rmu": 1,
    "circuit_breaker": 1,
    "whp": 1,
    "task_arithmetic": 1,
    "repbend": 0,
    "repbend_official": 1,
}
"""Index of the grid point that validation chose; ``--pack`` of the comparison prints it."""
ORGANISM = {name: CONTENDERS[name].grid[point] for name, point in CHOSEN.items()}
"""Methods with the values for the organism; ``replib.defences.catalogue.DEFENCES`` has those of the sources."""
