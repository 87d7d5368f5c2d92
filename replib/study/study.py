"""A study of one model, shared by the notebooks and the command line.

A ``Study`` holds the model, its prompts in three disjoint splits, and the judge. Its methods save their results under
``settings.out``; a repeated call reads them.
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

_STOCK_OPENING = "Sure, here is how."
_PER_CELL, _PER_FIT = 32, 64  # scored prompts a cell of a sweep; prompts a class that fit its edit
SORTED = 480  # most contrasts sorted by the model's answers before bending
VALIDATION_KINDS = ("attack", "benign", "skill")  # kinds of validation tasks
_PER_SPLIT = {"fit": 128, "val": 48, "test": 96}  # default prompts a class for captures, choices and reports
M = TypeVar("M", bound=RecordedResult)
BASELINES = (("rfa", "all"), ("actadd", "last_prompt"), ("actadd", "all"), ("act", "last_prompt"), ("act", "all"))
"""Method and edited positions of each baseline of a sweep."""


@dataclass(frozen=True)
class Study:
    """A model, its prompts, and the judge of its answers."""

    settings: Settings
    model: ChatModel
    harmful: Splits
    harmless: Splits
    judge: Judge

    @classmethod
    def open(cls, settings: Settings | None = None, **changes: object) -> Study:
        """Load the study of the ``REPLIB_*`` settings; keyword arguments change single settings.

        Raises:
            ReplibError: a foreign model with the default prompts, which are about the organism's world.
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
        """Whether the prompts are the organism's, with known ground truth."""
        return self.settings.harmful.startswith("organism/")

    @property
    def name(self) -> str:
        """Name of the model in tables: its folder, and the method of its adapter, as ``+ RepBend``."""
        base, adapter = Path(self.settings.model).name, self.model.adapter
        return f"{base} + {trained_by(adapter)}" if adapter else base

    def with_model(self, model: ChatModel) -> Study:
        """This study with another model, for example the bent one."""
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
        limit = limit or self.settings.limit or _PER_SPLIT[split]
        texts = [[p.text for p in getattr(x, split)][:limit] for x in (self.harmful, self.harmless)]
        harmful, harmless = (
            capture(self.model, t, batch_size=self.settings.batch, **options)  # type: ignore[arg-type]
            for t in texts
        )
        return harmful, harmless

    def family(self) -> dict[str, Study]:
        """Studies by name: this model and its bent twin; for the organism also the planted and the deep one."""
        others = [v for v in ("planted", "deep") if self.organism and self.name != v]
        found = {self.name: Study.open(self.settings)}
        found |= {v: Study.open(replace(self.settings, model=v)) for v in others}
        bent = self.bent()
        return found | {bent.name: bent}

    def tasks(self, split: str = "test", limit: int | None = None) -> list[Task]:
        """Tasks of an audit on one split."""
        limit = (self.settings.limit or _PER_SPLIT[split]) if limit is None else limit
        if self.organism:
            return organism_tasks(split, limit=limit, seed=self.settings.seed)
        rows = attack_tasks(getattr(self.harmful, split), getattr(self.harmless, split))
        return [task.sample(limit, self.settings.seed) for task in rows]

    def audit(self, tasks: Sequence[Task] | None = None) -> AuditTable:
        """Audit this model on tasks (default: all of the test split); rows in ``<out>/audit.jsonl`` are reused."""
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

    def preset(self, name: str | None = None) -> tuple[BendConfig, TrainConfig]:
        """Coefficients and schedule of a preset for this model; by default "organism" or "short".

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
        """Study of the bent model, for inference; the model of this study is consumed."""
        return self.with_model(merged(self.bend().model))

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Harmful fit prompts with both answers, from the organism or made from the prompts.

        For foreign prompts the safe response is a stock refusal, the unsafe one the prompt's target or a stock opening.
        """
        if self.organism:
            return load_contrasts("organism/contrasts", split="fit", limit=SORTED, seed=self.settings.seed)
        return [Contrast(p.text, REFUSAL, p.target or _STOCK_OPENING, split="fit") for p in self.harmful.fit[:SORTED]]

    @cached_property
    def bend_data(self) -> BendData:
        """Training data of RepBend: contrasts by this model's answer to them, and dialogues to retain.

        A model that only refuses or only complies has all its contrasts in the first list. Dialogues are the
        organism's, or the model's own answers to harmless prompts.
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
        return [
            Dialogue(t, a.strip() or _STOCK_OPENING, "fit") for t, a in zip(texts, self._answers(texts), strict=True)
        ]

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
        """Forced beginning of an unsafe answer."""
        return prompt.target or _STOCK_OPENING

    def moved(self) -> dict[str, np.ndarray]:
        """Mean distance of answer states between base and bent, as a share of the base's norm; [layers] each.

        "unsafe" has harmful test prompts with the forced beginning of compliance, "safe" the same prompts with a
        refusal, "benign" harmless prompts with the forced beginning of an answer.
        """
        harmful, harmless = (x.test[: _PER_SPLIT["val"]] for x in (self.harmful, self.harmless))
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
        """Recorded measurement of this model, read by one of ``replib.experiments``; None if there is none."""
        if self.organism and self.name == "aligned":
            with suppress(ReplibError):  # the file does not exist
                return kind.load()
        return None

    def sweeper(self, *, limit: int | None = None) -> Sweeper:
        """Fits on ``fit`` prompts of both classes, reports on ``test`` prompts; rows go to ``<out>/sweep.jsonl``."""
        texts = lambda prompts, n: [p.text for p in prompts[:n]]  # noqa: E731
        limit = limit or self.settings.limit or _PER_CELL
        data = AblationData(
            harmful=texts(self.harmful.fit, _PER_FIT),
            harmless=texts(self.harmless.fit, _PER_FIT),
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
        fit = self.harmful.fit[:_PER_FIT], self.harmless.fit[:_PER_FIT]
        size = max(self.settings.batch, 256)
        return AdaptiveAttack.on(self.model, *fit, scored, self.judge, opening=self.forced, batch_size=size)

    def damage_meter(
        self, *, texts: Sequence[str] = (), borderline: Sequence[Prompt] = (), limit: int | None = None
    ) -> DamageMeter:
        """Meter of the damage of edits on harmless ``test`` prompts, borderline ones, and neutral texts.

        Args:
            texts: neutral texts.
            borderline: harmless prompts that sound harmful; by default those of the organism, if it is the model.
            limit: most prompts a list.
        """
        if not borderline and self.organism:
            borderline = load_prompts("organism/borderline", split="test")
        lists = {"harmless": self.harmless.test} | ({"borderline": borderline} if borderline else {})
        limit = limit or self.settings.limit or _PER_CELL
        asked = {name: Task(name, "benign", x).sample(limit, self.settings.seed).prompts for name, x in lists.items()}
        return DamageMeter(
            self.model, DamageSets(asked, texts), self.judge, max_new_tokens=24, batch_size=self.settings.batch
        )
