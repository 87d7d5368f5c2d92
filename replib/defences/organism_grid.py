"""What RepBend is compared with on the organism, and the values that each of them is tried at before it is compared.

Published rates suit models of seven billion parameters; the organism has four million, so that every method gets a
small grid around what its source says: a rate by what is decisive for the method. The validation split chooses among
them, by the score that also chooses a step (``keeper.default_choice``). All train 40 steps of about 48 rows, as
RepBend's organism preset trains 40 of 64; RMU and Circuit Breaker read their rows in part of the blocks, WHP and task
arithmetic train twice. RepBend's own preset comes from a longer search than any grid here.

Points were added for SFT, WHP and task arithmetic (rate 2e-3) and for Circuit Breaker (``relative``) when first results
on test prompts had been seen. They could only help these rivals; the grids of the others were left as they were.
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

ROWS, UNSAFE = 48, 16  # rows of a step, and those of them that are unsafe where others are retained
BENIGN = 2.5  # retained answers among the safe ones, for each refusal: so many RepBend's preset reads in a step


class Candidate(NamedTuple):
    """A method with what it is tried at."""

    title: str
    """Its name in tables and figures."""
    grid: tuple[Baseline, ...] = ()
    """What validation chooses from; () where nothing is trained."""
    seconds: float = 0.0
    """What one training takes, without probes: CPU seconds of a busy core, from trials of four steps."""


def _alone(learning_rate: float, rows: int = ROWS) -> TrainConfig:
    """For a loss on one list."""
    return TrainConfig(
        steps=40, learning_rate=learning_rate, contrasts=rows, schedule="linear", dropout=0.0, probe_every=10,
        save_every=0,
    )  # fmt: skip


def _kept(learning_rate: float, perturbation: float = 0.0) -> TrainConfig:
    """For a loss on unsafe answers and on those to keep."""
    return replace(_alone(learning_rate, UNSAFE), retain=ROWS - UNSAFE, perturbation=perturbation)


def _sft() -> tuple[Baseline, ...]:
    return tuple(Baseline(SFT(), _alone(rate)) for rate in (1e-3, 3e-3, 2e-3))


def _dpo() -> tuple[Baseline, ...]:
    return tuple(Baseline(DPO(), _alone(rate, ROWS // 2)) for rate in (3e-4, 1e-3))


def _npo() -> tuple[Baseline, ...]:
    return tuple(Baseline(NPO(), _alone(rate, 2 * UNSAFE)) for rate in (1e-4, 3e-4))


def _npo_rt() -> tuple[Baseline, ...]:
    points = ((1.0, 3e-4), (1.0, 1e-3), (10.0, 1e-3))
    return tuple(Baseline(NPO(keep=RetainLoss(ce=weight)), _kept(rate)) for weight, rate in points)


def _npo_kl() -> tuple[Baseline, ...]:
    points = ((1.0, 3e-4), (10.0, 1e-3))
    return tuple(Baseline(NPO(keep=RetainLoss(kl=weight)), _kept(rate)) for weight, rate in points)


def _rmu() -> tuple[Baseline, ...]:
    """Steering is a length: that of the organism's states is 27. Block 2 is as deep as the source's, 6 half way."""
    points = ((60.0, 2, 3e-3), (60.0, 6, 1e-3), (60.0, 6, 3e-3), (150.0, 6, 3e-3))
    return tuple(Baseline(RMU(alpha=3.0, steering=c, layer=block), _kept(rate)) for c, block, rate in points)


def _breaker() -> tuple[Baseline, ...]:
    """The source's depths, and RepBend's blocks; its retain term, which here outweighs the rerouting, and relative.

    Under Adam alpha, which weighs both terms, does next to nothing.
    """
    late = (7, 8, 9, 10, 11)
    points = (((3, 7), 1e-3, False), (late, 3e-3, False), ((3, 7), 1e-3, True), (late, 1e-3, True), (late, 3e-3, True))
    return tuple(
        Baseline(CircuitBreaker(layers=blocks, relative=relative), _kept(rate, perturbation=1e-3))
        for blocks, rate, relative in points
    )


def _whp() -> tuple[Baseline, ...]:
    """Both of RepBend's comparison: nothing kept, and safe answers kept."""
    keeps = (RetainLoss(), RetainLoss(ce=1.0, kl=0.1, temperature=2.0, on="safe"))
    points = ((keeps[0], 1e-3), (keeps[1], 1e-3), (keeps[1], 2e-3))
    return tuple(Baseline(WHP(keep=keep), _kept(rate)) for keep, rate in points)


def _arithmetic() -> tuple[Baseline, ...]:
    """Six weights each; an unsafe weight of zero is SFT itself."""
    weights = TaskArithmetic(tuple((safe, unsafe) for safe in (0.5, 1.0) for unsafe in (0.1, 0.3, 1.0)))
    return tuple(Baseline(weights, _alone(rate, ROWS // 2)) for rate in (3e-4, 1e-3, 2e-3))


def _repbend() -> tuple[Baseline, ...]:
    return (Baseline(RepBend(ORGANISM_BEND), replace(ORGANISM_TRAIN, probe_every=10, save_every=0)),)


def _official() -> tuple[Baseline, ...]:
    """The authors' code: published weights, nothing held back, dropout, no schedule."""
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
"""By name, in the order of the table."""
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
"""The point of each grid that validation chose; what ``--pack`` of the comparison prints."""
ORGANISM = {name: CONTENDERS[name].grid[point] for name, point in CHOSEN.items()}
"""The methods with the values for the organism, as ``replib.defences.catalogue.DEFENCES`` has those of the sources."""
