"""Harden the model of a study in one call; what was trained once is read the next time."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from replib.adversary import Arsenal
from replib.hardening import Hardened, Hardening
from replib.likelihood import Keep, Retention
from replib.mixtures import DefenceData, defence_data
from replib.objective import Objective
from replib.recipe import TrainConfig
from replib.repbend import RepBend
from replib.results import TrainResult
from replib.siege import besieged
from replib.store import key_of
from replib.study import Study
from replib.train import BendData, train

# Found on the validation split of the aligned organism.
HARDENING = Hardening(
    edits=6,
    rows=4,
    forced=0.6,
    arsenal=Arsenal(
        reads=("last_prompt", "response"), positions=("last_prompt", "response", "all"), strength=(0.7, 1.0)
    ),
)
RETENTION = Retention(Keep(kl=200.0))
TRAIN = TrainConfig(
    steps=80, retain=40, contrasts=8, dropout=0.0, learning_rate=3e-3, schedule="linear", probe_every=20, save_every=20
)


def hardened(study: Study, inner: Objective = RETENTION, hardening: Hardening = HARDENING) -> Hardened:
    """The objective for a study: its contrasts are refused, its harmless dialogues are what edits aim at."""
    harmless = [d for d in study.bend_data.retain if d.label in ("", "harmless")]
    return Hardened(inner, study.contrasts, harmless, hardening, study.settings.seed)


def rows_for(study: Study, objective: Objective) -> BendData | DefenceData:
    """What an objective, hardened or not, trains on."""
    inner = objective.inner if isinstance(objective, Hardened) else objective
    return study.bend_data if isinstance(inner, RepBend) else defence_data(study.bend_data)


def harden(
    study: Study, inner: Objective = RETENTION, hardening: Hardening = HARDENING, config: TrainConfig = TRAIN
) -> TrainResult:
    """Train a hardened objective, or read the adapter that the same call trained before.

    Args:
        study: whose model is hardened; it is used up, as in ``Study.bend``.
        inner: what is trained beside it; the default holds the model in place and does nothing else.
        hardening: how edits and refusals are drawn.
        config: length and rate; its seed is the study's. Validation chooses the step, see ``siege.besieged``.
    """
    objective, config = hardened(study, inner, hardening), replace(config, seed=study.settings.seed)
    key = key_of(objective.about(study.model.n_layers), asdict(config), study.model.provenance())
    folder = study.settings.out / "harden" / f"{Path(study.settings.model).name}-{key}"
    if (folder / "replib.json").exists():
        return TrainResult.load(study.model, folder)
    rows, probe = rows_for(study, objective), besieged(study)
    result = train(study.model, rows, objective, config=config, probe=probe, out=folder)
    result.save(folder)
    return result
