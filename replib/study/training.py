"""Training of defences on the model of a study; a repeated call reads the saved adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from replib.ablation.adaptive_attack import success
from replib.core.errors import ReplibError, check_choice
from replib.core.storage import content_hash, key_of, versions
from replib.data.mixtures import BendData, DefenceData, circuit_breaker_mix, defence_data, repbend_mix
from replib.defences.adversary import EditDistribution
from replib.defences.catalogue import Baseline, baseline, prepares, train_baseline
from replib.defences.hardening import Hardened, Hardening
from replib.defences.organism_grid import BENIGN, ORGANISM
from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import References, RepBend
from replib.defences.sft import RetainLoss, Retention
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.study.study import VALIDATION_KINDS, Study
from replib.training.config import TrainConfig
from replib.training.model_selection import Measure, interpolated
from replib.training.objective import Objective
from replib.training.result import TrainResult
from replib.training.train import FitDefence, train


def baseline_for(study: Study, name: str) -> Baseline:
    """Defence with the values for this model: from the comparison on the organism, else from its source.

    Raises:
        ReplibError: no defence has that name.
    """
    known = {known: found for known, found in ORGANISM.items() if "repbend" not in known}
    if not study.organism:
        return baseline(name)
    if name not in known:
        raise ReplibError(f"No defence is called {name!r}: use one of {', '.join(known)}.")
    return known[name]


_MIX_FILES = {
    "repbend": ("wildjailbreak", "answers", "wildguard", "chat"),
    "circuit_breaker": ("breakers", "xstest", "chat"),
}
"""Files of each paper's training mix; for their content see ``repbend_mix`` and ``circuit_breaker_mix``."""


def paper_mix(study: Study, mix: str, files: Mapping[str, str] | None = None) -> DefenceData:
    """Rows of a paper's training mix, without the study's validation and test prompts.

    The organism has both mixes; elsewhere the public sets are read.

    Args:
        study: gives prompts and seed.
        mix: "repbend" or "circuit_breaker".
        files: file or hub id by name in ``_MIX_FILES``, in place of the default public set.

    Raises:
        ReplibError: an unknown mix or file name; a set that cannot be read.
    """
    check_choice("mix", mix, tuple(_MIX_FILES))
    for name in files or ():
        check_choice("file of the mix", name, _MIX_FILES[mix])
    avoid = [p for prompts in (study.harmful, study.harmless) for p in (*prompts.val, *prompts.test)]
    place = {"source": "organism", "n": None} if study.organism else {"source": "public"}
    options: dict[str, Any] = place | {"seed": study.settings.seed, "avoid": avoid} | dict(files or {})
    if mix == "circuit_breaker":
        return circuit_breaker_mix(**options)
    return defence_data(repbend_mix(**options), benign=BENIGN)


def defend(
    study: Study,
    name: str,
    chosen: Baseline | None = None,
    *,
    mix: str | None = None,
    files: Mapping[str, str] | None = None,
) -> TrainResult:
    """Train a baseline of RepBend; validation prompts choose the step.

    The adapter lies in ``<out>/defences``. After an interrupt the same call resumes from the last checkpoint; a defence
    of two trainings keeps the finished one.

    Args:
        study: study whose model is consumed; the result holds it, with the adapter on.
        name: name of the folder, and of a defence in ``baseline_for``.
        chosen: objective and schedule instead of those of ``baseline_for``.
        mix: training mix of a paper, see ``paper_mix``; None trains on the rows of ``study.bend``.
        files: files of the mix.

    Raises:
        ReplibError: an unknown name or mix; data or configuration that defence or trainer reject.
    """
    chosen = chosen or baseline_for(study, name)
    config = replace(chosen.config, seed=study.settings.seed)
    rows = content_hash([*study.contrasts, *study.harmless.fit])
    drawn = [mix, dict(files or {})] if mix else []
    key = key_of(repr(chosen.objective), asdict(config), rows, study.model.provenance() | versions(), *drawn)
    folder = study.settings.out / "defences" / f"{Path(study.settings.model).name}-{name}-{key}"

    def make() -> TrainResult:
        data = paper_mix(study, mix, files) if mix else defence_data(study.bend_data, benign=BENIGN)
        validation = study.validation_measure()
        fit = _fitter(chosen._replace(config=config), validation, folder)
        return train_baseline(chosen.objective, study.model, data, fit, validation=validation, out=_parts(folder))

    return TrainResult.kept(study.model, folder, make)


def _parts(folder: Path) -> Path:
    """Folder of intermediate adapters."""
    return folder.with_name(f"{folder.name}-parts")


def _fitter(chosen: Baseline, validation: Measure, folder: Path) -> FitDefence:
    def fit(model: ChatModel, data: DefenceData, objective: Objective) -> TrainResult:
        if not prepares(objective, chosen.objective):
            return train(model, data, objective, config=chosen.config, validation=validation, out=folder)
        place = _parts(folder) / objective.about(model.n_layers)["side"]
        return TrainResult.kept(model, place, lambda: train(model, data, objective, config=chosen.config, out=place))

    return fit


# Chosen on the validation split of the aligned organism, with seed 0.
HARDENING = Hardening(
    edits=6,
    rows=4,
    forced=0.6,
    arsenal=EditDistribution(
        reads=("last_prompt", "response"),
        positions=("last_prompt", "response", "all", "all", "all"),
        late=3,
        strength=(0.8, 1.0),
    ),
)
TRAIN = TrainConfig(
    steps=110, retain=40, contrasts=8, dropout=0.0, learning_rate=3e-3, schedule="linear", probe_every=22, save_every=22
)
RETENTION = Retention(RetainLoss(kl=200.0))
"""KL divergence to the base on retained dialogues alone."""
ELSEWHERE = replace(TRAIN, learning_rate=1e-4, retain=4, contrasts=4)
"""Schedule for other models, as ``presets.SHORT_TRAIN``; a rate of 3e-3 suits 4 million parameters."""


def adaptive_validation(
    study: Study, limit: int = 16, layers: Sequence[int] = ()
) -> Callable[[ChatModel], dict[str, float]]:
    """Measure of a model as ``study.validation_measure``, with edits and prefill among the attacks.

    ``attack`` is the mean success of wrappers, of prefill, and of the best of a few edits re-fitted on the model.
    """
    measure, prompts = study.validation_measure(limit, (*VALIDATION_KINDS, "prefill")), study.harmful.val[:limit]

    def run(model: ChatModel) -> dict[str, float]:
        attack = study.with_model(model).adaptive_attack(prompts)
        blocks = layers or range(model.n_layers // 4, model.n_layers, 2)
        found = measure(model)
        worst = attack.table(("ot_last", "ot_all"), blocks, (2,)).outcomes.map(success).max()
        return found | {"edited": worst, "attack": (found["attack"] + found["prefill"] + worst) / 3}

    return run


def inner_of(study: Study, name: str) -> Objective:
    """Objective trained beside hardening: ``repbend`` with the values for this model, or ``retention``.

    Raises:
        ReplibError: another name.
    """
    check_choice("inner", name, ("repbend", "retention"))
    return RepBend(study.preset()[0]) if name == "repbend" else RETENTION


def schedule(study: Study) -> TrainConfig:
    """Training configuration for this model, with the seed of the study."""
    return replace(TRAIN if study.organism else ELSEWHERE, seed=study.settings.seed)


def hardened(study: Study, inner: Objective = RETENTION, hardening: Hardening = HARDENING) -> Hardened:
    """Hardened objective of a study; edits are fitted from its contrasts towards its harmless dialogues.

    If either class has fewer rows than an edit takes, all of them fit it, with fewer components.
    """
    harmless = [d for d in study.bend_data.retain if d.label in ("", "harmless")]
    arsenal = hardening.arsenal.within(min(len(study.contrasts), len(harmless)))
    hardening = replace(hardening, arsenal=arsenal)
    return Hardened(inner, study.contrasts, harmless, hardening, study.settings.seed)


def rows_for(study: Study, objective: Objective) -> BendData | DefenceData:
    """Training data of an objective, hardened or not."""
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
        study: study whose model is hardened and consumed, as in ``Study.bend``.
        inner: inner objective; None is RepBend, see ``inner_of``.
        hardening: distribution of edits and refusals.
        config: training configuration; None is ``schedule(study)``. ``adaptive_validation`` chooses the step and the
            share of ΔW, see ``interpolated``.

    Raises:
        ReplibError: too few prompts to fit an edit on; data or configuration that the trainer rejects.
    """
    objective = hardened(study, inner or inner_of(study, "repbend"), hardening)
    config = config or schedule(study)
    key = key_of(objective.about(study.model.n_layers), asdict(config), study.model.provenance())
    folder = study.settings.out / "harden" / f"{Path(study.settings.model).name}-{key}"

    def make() -> TrainResult:
        rows, validation = rows_for(study, objective), adaptive_validation(study)
        return interpolated(
            train(study.model, rows, objective, config=config, validation=validation, out=folder), validation
        )

    return TrainResult.kept(study.model, folder, make)


_AVERAGED_STEPS = 4  # steps up to the best one over which the KL is averaged, since one batch is noisy


@dataclass(frozen=True)
class StudyObjective:
    """Training of RepBend at given coefficients, on a fresh copy of the study's model each time."""

    study: Study
    bend: BendConfig
    config: TrainConfig

    def __call__(self, *, alpha: float, beta: float, gamma: float) -> dict[str, float]:
        """Outcome of the chosen step: rates on validation prompts, and the KL on training dialogues.

        Raises:
            Diverged: the loss is not finite.
        """
        s, out = self.study.settings, self.study.settings.out / "tune"
        model = load(s.model, adapter=s.adapter, device=s.device, dtype=s.dtype)
        bend = RepBend(replace(self.bend, alpha=alpha, beta=beta, gamma=gamma), References(out / "base"))
        data, scratch = self.study.bend_data, out / key_of(alpha, beta, gamma, asdict(self.config))
        found = train(
            model, data, bend, config=self.config, validation=self.validation, out=scratch, say=lambda _: None
        )
        kept = found.probes.set_index("step").loc[found.step].to_dict()
        recent = found.history[found.history.step.between(found.step - _AVERAGED_STEPS + 1, found.step)]
        rates = {"attack_success": kept.pop("attack"), "harmless_compliance": kept.pop("harmless")}
        return rates | {"kl": float(recent["kl"].mean())} | kept | {"step": float(found.step)}

    @cached_property
    def validation(self) -> Measure:
        """Validation measure, shared by all trials."""
        return self.study.validation_measure()


def study_objective(study: Study, bend: BendConfig | None = None, config: TrainConfig | None = None) -> StudyObjective:
    """Objective of a study for ``tune``, from its preset or the given configuration."""
    preset = study.preset()
    return StudyObjective(study, bend or preset[0], config or preset[1])
