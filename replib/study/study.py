"""One run of the suite on one model: what the notebooks and the command line share.

A ``Study`` holds the model, its prompts in three disjoint splits, and the judge; its verbs keep their results under
``settings.out``, so that whatever was computed once is read the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch

from replib.ablation.adaptive_attack import AdaptiveAttack
from replib.ablation.damage import DamageMeter, DamageSets
from replib.ablation.fit import AblationData
from replib.ablation.sweep import Sweeper
from replib.activations.capture import capture, capture_pair
from replib.activations.store import Activations
from replib.audit.attacks import attack_tasks
from replib.audit.audit import AuditTable, Task, audit, validation_measure
from replib.audit.judges import ExactJudge, Judge, PhraseJudge, is_refusal
from replib.core.errors import ReplibError
from replib.core.settings import Settings
from replib.core.storage import content_hash, key_of, versions
from replib.data.mixtures import BendData
from replib.data.prompts import Contrast, Dialogue, Prompt, load_contrasts, load_dialogues, load_prompts
from replib.data.splits import Splits, check_world, prompt_splits
from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import RepBend
from replib.defences.repbend.presets import preset_named
from replib.models.adapters import merged
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.organism.language import REFUSAL
from replib.organism.prompt_sets import organism_tasks
from replib.organism.recorded import RecordedResult
from replib.training.config import TrainConfig
from replib.training.result import TrainResult, trained_by
from replib.training.train import train

OPENING = "Sure, here is how."
PER_CELL, PER_FIT = 32, 64  # prompts that a cell of a sweep is scored on, and prompts a class that fit its edit
SORTED = 480  # contrasts whose answers are read before bending
VALIDATION_KINDS = ("attack", "benign", "skill")  # kinds of task that choose a step
PER_SPLIT = {"fit": 128, "val": 48, "test": 96}  # prompts a class that captures, choices and reports use by default
M = TypeVar("M", bound=RecordedResult)
BASELINES = (("rfa", "all"), ("actadd", "last_prompt"), ("actadd", "all"), ("act", "last_prompt"), ("act", "all"))
"""Method and edited positions of each baseline of a sweep."""


@dataclass(frozen=True)
class Study:
    """A model, the prompts it is studied on, and who judges its answers."""

    settings: Settings
    model: ChatModel
    harmful: Splits
    harmless: Splits
    judge: Judge

    @classmethod
    def open(cls, settings: Settings | None = None, **changes: object) -> Study:
        """Load what ``REPLIB_*`` names; keyword arguments change single settings.

        Raises:
            ReplibError: a foreign model without prompts of its own (the default ones speak of the organism's world).
        """
        settings = replace(settings or Settings.from_env(), **changes)  # type: ignore[arg-type]
        torch.manual_seed(settings.seed)
        check_world(settings)
        model = load(settings.model, adapter=settings.adapter, device=settings.device, dtype=settings.dtype)
        harmful, harmless = (prompt_splits(source, settings) for source in (settings.harmful, settings.harmless))
        exact = all(p.expect for p in harmful.test)
        return cls(settings, model, harmful, harmless, ExactJudge() if exact else PhraseJudge())

    @property
    def organism(self) -> bool:
        """Whether the ground truth is known."""
        return self.settings.harmful.startswith("organism/")

    @property
    def name(self) -> str:
        """The model's name in tables: its folder, and with an adapter what trained it, as ``+ RepBend``."""
        base, adapter = Path(self.settings.model).name, self.model.adapter
        return f"{base} + {trained_by(adapter)}" if adapter else base

    def with_model(self, model: ChatModel) -> Study:
        """The same study of another model, for example the bent one."""
        return replace(self, model=model)

    def describe(self) -> pd.Series:
        """Summary of the model, its prompts and its judge."""
        counts = lambda splits: ", ".join(f"{s} {len(getattr(splits, s))}" for s in Splits._fields)  # noqa: E731
        about = self.model.provenance() | versions()
        return pd.Series(
            {
                "model": self.name,
                "architecture": type(self.model.causal_lm).__name__,
                "blocks x width": f"{self.model.n_layers} x {self.model.d_model}",
                "parameters": f"{sum(p.numel() for p in self.model.model.parameters()):,}",
                "runs in": f"{about['dtype']} on {self.model.device}",
                "chat template": "its own" if self.model.template else "none: plain text",
                "harmful prompts": counts(self.harmful),
                "harmless prompts": counts(self.harmless),
                "judge": self.judge.name,
                "seed": self.settings.seed,
            }
            | {key: about[key] for key in ("fingerprint", "python", "torch", "transformers")},
            name="",
        )

    def pair(self, split: str = "test", limit: int | None = None, **options: object) -> tuple[Activations, Activations]:
        """Harmful and harmless activations of one split, at every block; options are those of ``capture``."""
        limit = limit or self.settings.limit or PER_SPLIT[split]
        texts = [[p.text for p in getattr(x, split)][:limit] for x in (self.harmful, self.harmless)]
        harmful, harmless = (
            capture(self.model, t, batch_size=self.settings.batch, **options)  # type: ignore[arg-type]
            for t in texts
        )
        return harmful, harmless

    def family(self) -> dict[str, Study]:
        """The models to compare: this one and its bent twin; for the organism also the planted and the deep one."""
        others = [v for v in ("planted", "deep") if self.organism and self.name != v]
        found = {self.name: Study.open(self.settings)}
        found |= {v: Study.open(replace(self.settings, model=v)) for v in others}
        bent = self.bent()
        return found | {bent.name: bent}

    def tasks(self, split: str = "test", limit: int | None = None) -> list[Task]:
        """The rows of an audit on one split."""
        limit = (self.settings.limit or PER_SPLIT[split]) if limit is None else limit
        if self.organism:
            return organism_tasks(split, limit=limit, seed=self.settings.seed)
        rows = attack_tasks(getattr(self.harmful, split), getattr(self.harmless, split))
        return [task.sample(limit, self.settings.seed) for task in rows]

    def audit(self, tasks: Sequence[Task] | None = None) -> AuditTable:
        """Tasks (default: all of the test split) on this model; rows already in ``<out>/audit.jsonl`` are read."""
        return audit(
            self.model,
            self.tasks() if tasks is None else tasks,
            self.judge,
            name=self.name,
            store=self.settings.out / "audit.jsonl",
            seed=self.settings.seed,
            batch_size=self.settings.batch,
            keep_text=self.settings.keep_text,
        )

    # ------------------------------------------------------------------------------------- bending
    def preset(self, name: str | None = None) -> tuple[BendConfig, TrainConfig]:
        """Coefficients and schedule by name, for this model: the organism's, or the paper's with a short schedule.

        Raises:
            ReplibError: no preset has that name.
        """
        bend, config, _ = preset_named(name or ("organism" if self.organism else "short")).fitted(self.model.n_layers)
        return bend, replace(config, seed=self.settings.seed)

    def bend(self, bend: BendConfig | None = None, config: TrainConfig | None = None) -> TrainResult:
        """Train RepBend, or read the adapter that the same call trained before."""
        bend, config = bend or self.preset()[0], config or self.preset()[1]
        facts = [asdict(bend), asdict(config), content_hash([*self.contrasts, *self.harmless.fit])]
        key = key_of(facts, self.model.provenance() | versions())
        folder = self.settings.out / "bend" / f"{Path(self.settings.model).name}-{key}"

        def make() -> TrainResult:
            chosen_by = self.validation_measure()
            return train(self.model, self.bend_data, RepBend(bend), config=config, validation=chosen_by, out=folder)

        return TrainResult.kept(self.model, folder, make)

    def bent(self) -> Study:
        """The study of the bent model, for inference; this study's own model is used up."""
        return self.with_model(merged(self.bend().model))

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Harmful fit prompts with both answers: the organism's, or made from the prompts.

        For foreign prompts the safe response is a stock refusal and the unsafe one the prompt's target, or a stock
        opening.
        """
        if self.organism:
            return load_contrasts("organism/contrasts", split="fit", limit=SORTED, seed=self.settings.seed)
        return [Contrast(p.text, REFUSAL, p.target or OPENING, split="fit") for p in self.harmful.fit[:SORTED]]

    @cached_property
    def bend_data(self) -> BendData:
        """Training data of RepBend: contrasts by this model's answer to them, and dialogues to retain.

        Prompts that it refuses are read with the safe response, those that it complies with with either. If it does
        only one of the two, every prompt is read with both. Dialogues are the organism's, or the model's own
        answers to harmless prompts.
        """
        answers = self._answers([c.prompt for c in self.contrasts])
        refused = [c for c, a in zip(self.contrasts, answers, strict=True) if is_refusal(a)]
        complied = [c for c, a in zip(self.contrasts, answers, strict=True) if not is_refusal(a)]
        if not refused or not complied:
            refused, complied = self.contrasts, []
        return BendData(refused, self._retained(), complied)

    def _retained(self) -> list[Dialogue]:
        if self.organism:
            return load_dialogues("organism/retain", split="fit")
        texts = [p.text for p in self.harmless.fit][:64]
        return [Dialogue(t, a.strip() or OPENING, "fit") for t, a in zip(texts, self._answers(texts), strict=True)]

    def _answers(self, texts: list[str]) -> list[str]:
        return self.model.generate(texts, max_new_tokens=24, batch_size=self.settings.batch)

    def validation_measure(
        self, limit: int = 32, kinds: Collection[str] = VALIDATION_KINDS
    ) -> Callable[[ChatModel], dict[str, float]]:
        """Measure of a model on validation prompts (``replib.audit.audit.validation_measure``)."""
        return validation_measure(self.validation_tasks(limit, kinds), self.judge)

    def validation_tasks(self, limit: int = 32, kinds: Collection[str] = VALIDATION_KINDS) -> list[Task]:
        """Validation tasks of ``validation_measure``."""
        return [t for t in self.tasks("val", limit) if t.kind in kinds]

    def forced(self, prompt: Prompt) -> str:
        """The beginning of an unsafe answer, to be read by force."""
        return prompt.target or OPENING

    def moved(self) -> dict[str, np.ndarray]:
        """How far answers moved from base to bent, by block, as a share of the base's norm; [layers] each.

        Unsafe: test prompts with the beginning of compliance. Safe: the same prompts with a refusal. Benign:
        harmless prompts with the beginning of their answer.
        """
        harmful, harmless = (x.test[: PER_SPLIT["val"]] for x in (self.harmful, self.harmless))
        forced = {
            "unsafe": (harmful, [self.forced(p) for p in harmful]),
            "safe": (harmful, [REFUSAL] * len(harmful)),
            "benign": (harmless, [self.forced(p) for p in harmless]),
        }
        return {name: self._moved([p.text for p in prompts], answers) for name, (prompts, answers) in forced.items()}

    def _moved(self, prompts: list[str], answers: list[str]) -> np.ndarray:
        pair = capture_pair(self.model, prompts, responses=answers, positions="response")
        bent, base = (acts.values for acts in pair)
        return ((bent - base).norm(dim=-1) / base.norm(dim=-1)).mean(dim=1).numpy()

    def recorded(self, kind: type[M]) -> M | None:
        """Measurement recorded beforehand on this model, read by one of ``replib.experiments``; None without one."""
        if self.organism and self.name == "aligned":
            with suppress(ReplibError):  # the file does not exist
                return kind.load()
        return None

    # ------------------------------------------------------------------------------------- ablation
    def sweeper(self, *, limit: int | None = None) -> Sweeper:
        """Fits on ``fit`` prompts of both classes, reports on ``test`` prompts; rows go to ``<out>/sweep.jsonl``."""
        texts = lambda prompts, n: [p.text for p in prompts[:n]]  # noqa: E731
        limit = limit or self.settings.limit or PER_CELL
        data = AblationData(
            harmful=texts(self.harmful.fit, PER_FIT),
            harmless=texts(self.harmless.fit, PER_FIT),
            scored=Task("scored", "direct", self.harmful.test).sample(limit, self.settings.seed).prompts,
            neutral=texts(self.harmless.test, max(1, limit // 2)),
        )
        return Sweeper(
            self.model,
            data,
            self.judge,
            name=self.name,
            store=self.settings.out / "sweep.jsonl",
            max_new_tokens=18,
            batch_size=self.settings.batch,
        )

    def adaptive_attack(self, scored: Sequence[Prompt]) -> AdaptiveAttack:
        """The adaptive attack on this model: edits fitted on its fit split, scored on other prompts.

        Raises:
            ReplibError: a scored prompt that fits the edits.
        """
        fit = self.harmful.fit[:PER_FIT], self.harmless.fit[:PER_FIT]
        size = max(self.settings.batch, 256)
        return AdaptiveAttack.on(self.model, *fit, scored, self.judge, opening=self.forced, batch_size=size)

    def damage_meter(
        self, *, texts: Sequence[str] = (), borderline: Sequence[Prompt] = (), limit: int | None = None
    ) -> DamageMeter:
        """Meter of the damage of edits on harmless ``test`` prompts, borderline ones, and neutral texts.

        ``borderline``: prompts that sound harmful and are not; by default the organism's own, where it is the model.
        """
        if not borderline and self.organism:
            borderline = load_prompts("organism/borderline", split="test")
        lists = {"harmless": self.harmless.test} | ({"borderline": borderline} if borderline else {})
        limit = limit or self.settings.limit or PER_CELL
        asked = {name: Task(name, "benign", x).sample(limit, self.settings.seed).prompts for name, x in lists.items()}
        return DamageMeter(
            self.model, DamageSets(asked, texts), self.judge, max_new_tokens=24, batch_size=self.settings.batch
        )
