"""The defences that RepBend is compared with, by name: what is trained, and how long and fast its source trains it.

Sources are the methods' own papers and code, and RepBend's comparison (arXiv 2504.01550, A.2) where it is the only one.
A step count of one epoch is that of 20 000 rows. Values found for the organism stand beside these, once they are.
"""

from __future__ import annotations

from typing import NamedTuple

from replib.errors import ReplibError
from replib.likelihood import DPO, NPO, SFT, Keep
from replib.objective import Objective
from replib.recipe import TrainConfig
from replib.reinforced import WHP
from replib.rerouting import RMU, CircuitBreaker


class Rival(NamedTuple):
    """A defence with its source's hyper-parameters."""

    objective: Objective
    """What the trainer trains, for a model of any depth."""
    config: TrainConfig
    """How long and how fast."""
    first: tuple[Objective, ...] = ()
    """What is trained before, each an adapter of its own: see ``replib.reinforced``."""


def _published(steps: int, learning_rate: float, batch: int = 16) -> TrainConfig:
    return TrainConfig(steps=steps, learning_rate=learning_rate, contrasts=batch, retain=batch)


EPOCH = 1250  # steps of 16 rows
DEFENCES = {
    "sft": Rival(SFT(), _published(EPOCH, 5e-5)),
    "dpo": Rival(DPO(), _published(EPOCH, 1e-4)),
    "npo": Rival(NPO(), _published(600, 5e-5)),
    "npo_rt": Rival(NPO(keep=Keep(ce=1.0)), _published(600, 5e-5)),
    "npo_kl": Rival(NPO(keep=Keep(kl=1.0)), _published(600, 5e-5)),
    "rmu": Rival(RMU(), _published(150, 5e-5, batch=4)),
    "circuit_breaker": Rival(CircuitBreaker(), _published(150, 1e-4)),
    "whp": Rival(WHP(), _published(150, 5e-5), first=(SFT(side="unsafe"),)),
    "whp_retain": Rival(
        WHP(keep=Keep(ce=1.0, kl=0.1, temperature=2.0, on="safe")), _published(150, 5e-5), first=(SFT(side="unsafe"),)
    ),
    "task_arithmetic": Rival(SFT(), _published(EPOCH, 5e-5), first=(SFT(side="unsafe"),)),
}
"""By name. ``whp`` needs ``reinforced.train_whp``, ``task_arithmetic`` ``train_tasks`` and ``merged_tasks``."""


def rival(name: str) -> Rival:
    """A defence by its name; ReplibError lists the known ones."""
    if name not in DEFENCES:
        raise ReplibError(f"No defence is called {name!r}: use one of {', '.join(DEFENCES)}.")
    return DEFENCES[name]
