"""Reader of the recorded transport audit: rates with n and intervals over seeds and prompts.

Rates are means of a matrix, seeds by prompts; intervals are those of ``core.stats.two_way_interval``. K, block and
token were chosen on other prompts than the counted ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from replib.ablation.localisation import (
    Features,
    leave_one_out,
    localisation_error_table,
    onset,
    scores,
    steepest,
    within_models,
)
from replib.ablation.robustness import PROMPT, holding
from replib.core.errors import ReplibError
from replib.core.stats import Measured, interval_text, outcome_matrix, two_way_interval, two_way_rate_interval
from replib.edits.controls import attributed
from replib.organism.recorded import read_recorded

_UNDEFENDED, _UNTUNED = "aligned", "base"
_BLOCKS = {"target": "success", "model": "title"}
_BlockMatrix = np.ndarray  # [seeds, prompts], rates


@dataclass(frozen=True)
class TransportAudit:
    """Answers of all subjects."""

    program: ClassVar[str] = "transport_audit"
    subjects: Sequence[Mapping[str, Any]]
    """One a model: name, title, seed, and an answer for every question it was asked."""
    about: Mapping[str, Any]
    """Model, versions, the design, and which training of each defence was audited."""

    @classmethod
    def load(cls, path: Path | None = None) -> TransportAudit:
        """Read the recorded audit, or the file at ``path``; raises ReplibError as ``read_recorded``."""
        found = read_recorded(cls.program, path)
        return cls(found.pop("subjects"), found)

    def names(self, question: str) -> list[str]:
        """Who was asked it, in the order of tables."""
        return list(dict.fromkeys(s["name"] for s in self.subjects if question in s))

    @cached_property
    def titles(self) -> dict[str, str]:
        """Titles in tables and figures by name."""
        return {s["name"]: s["title"] for s in self.subjects}

    def answers(self, name: str, question: str) -> list[Any]:
        """One a training seed.

        Raises ReplibError where the subject was not asked.
        """
        found = [s[question] for s in self.subjects if s["name"] == name and question in s]
        if not found:
            raise ReplibError(
                f"{name!r} was not asked about {question}: choose from {', '.join(self.names(question))}."
            )
        return found

    # ------------------------------------------------------------------------------------- curves
    def gap(self, name: str, where: str, part: str = "mean") -> Measured:
        """Relative transport gap by block at the ``prompt``'s end or over an ``answer``; low, high: of its null."""
        found = [answer[where][part] for answer in self.answers(name, "gaps")]
        value, low, high = (np.mean([f[end] for f in found], axis=0) for end in ("value", "low", "high"))
        return Measured(value, low, high, self.about["design"]["profiled"])

    def by_block(self, name: str, edit: str = "refitted") -> Measured:
        """Success by block of the edit ``refitted`` on the model, or ``transferred`` from the undefended one."""
        found = np.array([outcome_matrix(answer[edit]) for answer in self.answers(name, "blocks")], float)
        return _measured([found[:, block] for block in range(found.shape[1])])

    def holding(self, name: str) -> Measured:
        """Share of prompts that no strength up to each flips."""
        strengths = self.about["design"]["strengths"]
        table = holding(self.least(name), strengths)
        return Measured(table.value, table.low, table.high, table.n, at=strengths)

    def least(self, name: str) -> _BlockMatrix:
        """The least strength that flips each prompt, by seed; inf where none does."""
        found = [answer["least"] for answer in self.answers(name, "strengths")]
        return np.array([[np.inf if s is None else s for s in row] for row in found])

    def samples(self, name: str) -> Measured:
        """Success by number of fit prompts a class, mean over draws."""
        sizes, found = self.about["design"]["sizes"], self.answers(name, "samples")
        rates = [np.array([outcome_matrix(answer[str(n)]).mean(0) for answer in found]) for n in sizes]
        measured = _measured(rates)
        return Measured(measured.value, measured.low, measured.high, measured.n, at=sizes)

    # ------------------------------------------------------------------------------------- tables
    def shares(self, name: str) -> pd.DataFrame:
        """Success of the full edit and of its nulls, draws averaged prompt by prompt: ``attribution.attributed``."""
        found = self.answers(name, "shares")
        return attributed(
            {part: np.array([outcome_matrix(answer[part]).mean(0) for answer in found]) for part in found[0]}
        )

    def tokens(self, name: str) -> pd.DataFrame:
        """Success by where the edit is fitted, and how much more it is than the prompt's end alone gives.

        Columns: kind, ``chosen`` (share of the prompts that choose), value, low, high, n, more, more_low, more_high.
        """
        found = [answer["kinds"] for answer in self.answers(name, "tokens")]
        rows, once = [], _tested(found, PROMPT)
        for kind in found[0]:
            value = _tested(found, kind)
            chosen = np.mean([max(answer[kind]["val"]) for answer in found]) / self.about["design"]["val"]
            more = value - once
            rows.append(
                (
                    kind,
                    chosen,
                    value.mean(),
                    *two_way_rate_interval(value),
                    value.size,
                    more.mean(),
                    *two_way_interval(more),
                )
            )
        return pd.DataFrame(
            rows, columns=["kind", "chosen", "value", "low", "high", "n", "more", "more_low", "more_high"]
        )

    def blocks(self) -> pd.DataFrame:
        """Every block of every model: title, seed, block, label-free features, and success of the re-fitted edit."""
        parts = [
            pd.DataFrame(s["blocks"]["features"]).assign(
                title=s["title"], seed=s["seed"], block=range(len(s["blocks"]["refitted"])),
                success=outcome_matrix(s["blocks"]["refitted"]).mean(1),
            )
            for s in self.subjects
            if "blocks" in s
        ]  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    def predicted(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Blocks with the success that the other models foretell, and how good that is, a row a model."""
        table = leave_one_out(self.blocks(), Features._fields, depth="block", **_BLOCKS)
        return table, scores(table, **_BLOCKS)

    def ranked(self) -> pd.DataFrame:
        """Spearman of each feature with success over the blocks of each model."""
        return within_models(self.blocks(), Features._fields, **_BLOCKS)

    def places(self) -> pd.DataFrame:
        """Blocks that each method names, beside the planted ones; see ``localisation_error_table``."""
        planted = {s["name"]: s["planted"] for s in self.subjects if "planted" in s and "places" in s}
        return localisation_error_table({name: self._places(name) for name in planted}, planted)

    def _places(self, name: str) -> dict[str, int | None]:
        (gaps,), (places,) = self.answers(name, "gaps"), self.answers(name, "places")
        gap, auroc = np.array(gaps["prompt"]["mean"]["value"]), np.array(gaps["prompt"]["auroc"])
        curves = {"PCA-OT": self.by_block(name).value, "RFA": outcome_matrix(places["rfa"]).mean(1)}
        curves |= {
            "ActAdd": outcome_matrix(places["actadd"]).mean(1),
            "logit lens": places["lens"] or np.zeros_like(gap),
        }
        untuned = np.array(self.gap(_UNTUNED, "prompt").value)
        return {method: onset(np.array(curve), least=0.5) for method, curve in curves.items()} | {
            "gap, half": onset(gap),
            "gap, steepest": steepest(gap),
            "gap, largest": int(gap.argmax()),
            "gap beyond base, half": onset(gap - untuned),
            "probe": onset(auroc - 0.5, share=0.9),
        }

    # ------------------------------------------------------------------------------------- in short
    def summary(self) -> pd.DataFrame:
        """A row a model, rates in per cent as ``value [low, high]``.

        Columns: seeds; block(s) chosen; success without an edit, of the undefended model's map there, of the re-fitted
        one, and of the best of all token depths; median of the least strength; share of prompts that none flips.
        """
        rows = {self.titles[name]: self._told(name) for name in self.names("strengths")}
        return pd.DataFrame(rows.values(), index=pd.Index(rows, name="model"))

    def _told(self, name: str) -> dict[str, Any]:
        found, least = self.answers(name, "blocks"), self.least(name)
        at_block = {
            edit: outcome_matrix([answer[edit][answer["block"]] for answer in found])
            for edit in ("transferred", "refitted")
        }
        row = {"seeds": len(found), "block": ", ".join(str(b) for b in sorted({a["block"] for a in found}))}
        row |= {"no edit": _cell(outcome_matrix([answer["plain"] for answer in found]))}
        row |= {edit: _cell(values) for edit, values in at_block.items()}
        if name in self.names("tokens"):
            table = self.tokens(name)
            best = table.loc[table.chosen.idxmax()]
            row |= {"deeper": _percent(best.value, best.low, best.high), "at": best.kind}
        return row | {"median strength": float(np.median(least)), "never": _cell(np.isinf(least))}


def _tested(found: Sequence[Mapping[str, Any]], kind: str) -> _BlockMatrix:
    return outcome_matrix([answer[kind]["test"] for answer in found]).astype(float)


def _measured(matrices: Sequence[_BlockMatrix]) -> Measured:
    """A rate a matrix, with its interval."""
    low, high = zip(*map(two_way_rate_interval, matrices), strict=True)
    return Measured([m.mean() for m in matrices], low=low, high=high, n=[m.size for m in matrices])


def _cell(values: _BlockMatrix) -> str:
    return _percent(values.mean(), *two_way_rate_interval(values.astype(float)))


def _percent(value: float, low: float, high: float) -> str:
    return interval_text(100 * value, 100 * low, 100 * high)
