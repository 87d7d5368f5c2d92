"""Train a defence in a study by its name, or read what the same call trained before."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from replib.core.errors import ReplibError
from replib.core.storage import content_hash, key_of, versions
from replib.data.mixtures import DefenceData, defence_data
from replib.defences.catalogue import Rival, prepares, rival, train_rival
from replib.defences.organism_grid import BENIGN, ORGANISM
from replib.models.chat_model import ChatModel
from replib.study import Study
from replib.training.model_selection import Probe
from replib.training.objective import Objective
from replib.training.result import TrainResult
from replib.training.train import Fit, train


def suited(study: Study, name: str) -> Rival:
    """A defence with the values for this model: for the organism those of its comparison, else those of its source.

    Raises:
        ReplibError: no defence has that name.
    """
    known = {known: found for known, found in ORGANISM.items() if "repbend" not in known}
    if not study.organism:
        return rival(name)
    if name not in known:
        raise ReplibError(f"No defence is called {name!r}: use one of {', '.join(known)}.")
    return known[name]


def defend(study: Study, name: str, chosen: Rival | None = None) -> TrainResult:
    """Train a rival of RepBend on the rows that ``study.bend`` trains on; the step is chosen on validation prompts.

    The adapter lies in ``<out>/defences``. Stopped or killed, the same call goes on from the last checkpoint; of a
    defence that takes two trainings, a finished one is not made again.

    Args:
        study: its model is used up: the result holds it, with the adapter on.
        name: of the folder, and of a defence in ``suited``.
        chosen: what is trained, other than ``suited``.

    Raises:
        ReplibError: an unknown name; what the defence or the trainer refuses.
    """
    chosen = chosen or suited(study, name)
    config = replace(chosen.config, seed=study.settings.seed)
    rows = content_hash([*study.contrasts, *study.harmless.fit])
    key = key_of(repr(chosen.objective), asdict(config), rows, study.model.provenance() | versions())
    folder = study.settings.out / "defences" / f"{Path(study.settings.model).name}-{name}-{key}"

    def make() -> TrainResult:
        data, probe = defence_data(study.bend_data, benign=BENIGN), study.probe()
        fit = _fitter(chosen._replace(config=config), probe, folder)
        return train_rival(chosen.objective, study.model, data, fit, probe=probe, out=_parts(folder))

    return TrainResult.kept(study.model, folder, make)


def _parts(folder: Path) -> Path:
    """Where what only leads to a defence lies."""
    return folder.with_name(f"{folder.name}-parts")


def _fitter(chosen: Rival, probe: Probe, folder: Path) -> Fit:
    def fit(model: ChatModel, data: DefenceData, objective: Objective) -> TrainResult:
        if not prepares(objective, chosen.objective):
            return train(model, data, objective, config=chosen.config, probe=probe, out=folder)
        place = _parts(folder) / objective.about(model.n_layers)["side"]
        return TrainResult.kept(model, place, lambda: train(model, data, objective, config=chosen.config, out=place))

    return fit
