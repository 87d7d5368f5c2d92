"""Harden the model of a study in one call; what was trained once is read the next time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from replib.ablation.adaptive_attack import success
from replib.core.errors import check_choice
from replib.core.storage import key_of
from replib.data.mixtures import BendData, DefenceData, defence_data
from replib.defences.adversary import Arsenal
from replib.defences.hardening import Hardened, Hardening
from replib.defences.repbend.objective import RepBend
from replib.defences.sft import Keep, Retention
from replib.models.chat_model import ChatModel
from replib.study import PROBED, Study
from replib.training.config import TrainConfig
from replib.training.model_selection import interpolated
from replib.training.objective import Objective
from replib.training.result import TrainResult
from replib.training.train import train

# Found on the validation split of the aligned organism, with seed 0.
HARDENING = Hardening(
    edits=6,
    rows=4,
    forced=0.6,
    arsenal=Arsenal(
        reads=("last_prompt", "response"),
        positions=("last_prompt", "response", "all", "all", "all"),
        late=3,
        strength=(0.8, 1.0),
    ),
)
TRAIN = TrainConfig(
    steps=110, retain=40, contrasts=8, dropout=0.0, learning_rate=3e-3, schedule="linear", probe_every=22, save_every=22
)
RETENTION = Retention(Keep(kl=200.0))
"""Holds the model in place and does nothing else."""
ELSEWHERE = replace(TRAIN, learning_rate=1e-4, retain=4, contrasts=4)
"""For other models, as ``presets.SHORT_TRAIN``: a rate of 3e-3 suits one of 4 million parameters."""


def besieged(study: Study, limit: int = 16, layers: Sequence[int] = ()) -> Callable[[ChatModel], dict[str, float]]:
    """A measure of a model on validation prompts: that of ``study.probe``, with edits and prefill among the attacks.

    ``attack`` is the mean of three: wrappers, prefill, and the most successful of a few edits re-fitted on the model.
    """
    measure, prompts = study.probe(limit, (*PROBED, "prefill")), study.harmful.val[:limit]

    def run(model: ChatModel) -> dict[str, float]:
        siege = study.with_model(model).siege(prompts)
        blocks = layers or range(model.n_layers // 4, model.n_layers, 2)
        cells = siege.cells(("ot_last", "ot_all"), blocks, (2,))
        found = measure(model)
        worst = max(map(success, siege.outcomes(cells).values()))
        return found | {"edited": worst, "attack": (found["attack"] + found["prefill"] + worst) / 3}

    return run


def inner_of(study: Study, name: str) -> Objective:
    """What hardening is trained beside: ``repbend`` with the values for this model, or ``retention``.

    Raises:
        ReplibError: another name.
    """
    check_choice("inner", name, ("repbend", "retention"))
    return RepBend(study.preset()[0]) if name == "repbend" else RETENTION


def schedule(study: Study) -> TrainConfig:
    """Length and rate for this model, with the study's seed."""
    return replace(TRAIN if study.organism else ELSEWHERE, seed=study.settings.seed)


def hardened(study: Study, inner: Objective = RETENTION, hardening: Hardening = HARDENING) -> Hardened:
    """The objective for a study: its contrasts are refused, its harmless dialogues are what edits aim at.

    Where there are few of either, all of them fit the edits, and components are as many as they allow.
    """
    harmless = [d for d in study.bend_data.retain if d.label in ("", "harmless")]
    arsenal = hardening.arsenal.within(min(len(study.contrasts), len(harmless)))
    hardening = replace(hardening, arsenal=arsenal)
    return Hardened(inner, study.contrasts, harmless, hardening, study.settings.seed)


def rows_for(study: Study, objective: Objective) -> BendData | DefenceData:
    """What an objective, hardened or not, trains on."""
    inner = objective.inner if isinstance(objective, Hardened) else objective
    return study.bend_data if isinstance(inner, RepBend) else defence_data(study.bend_data)


def harden(
    study: Study,
    inner: Objective | None = None,
    hardening: Hardening = HARDENING,
    config: TrainConfig | None = None,
) -> TrainResult:
    """Train a hardened objective, or read the adapter that the same call trained before.

    Args:
        study: whose model is hardened; it is used up, as in ``Study.bend``.
        inner: what is trained beside it; None is RepBend, see ``inner_of``.
        hardening: how edits and refusals are drawn.
        config: length and rate; None is ``schedule(study)``. Validation chooses the step, and the share of the change
            in weights that is kept: see ``besieged`` and ``interpolated``.

    Raises:
        ReplibError: too few prompts to fit an edit on; what the trainer refuses.
    """
    objective = hardened(study, inner or inner_of(study, "repbend"), hardening)
    config = config or schedule(study)
    key = key_of(objective.about(study.model.n_layers), asdict(config), study.model.provenance())
    folder = study.settings.out / "harden" / f"{Path(study.settings.model).name}-{key}"

    def make() -> TrainResult:
        rows, probe = rows_for(study, objective), besieged(study)
        return interpolated(train(study.model, rows, objective, config=config, probe=probe, out=folder), probe)

    return TrainResult.kept(study.model, folder, make)
