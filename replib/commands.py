"""The verbs of the command line: each opens a study, runs one analysis and says where its result lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from replib.settings import Settings
from replib.store import write_text
from replib.study import BASELINES, Study


def run_audit(settings: Settings) -> Path:
    """``replib audit``: one table, as CSV."""
    study = Study.open(settings)
    return study.audit().save(settings.out / f"audit-{Path(settings.model).name}.csv")


def run_bend(
    settings: Settings,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    steps: int | None = None,
) -> Path:
    """``replib bend``: train an adapter, with single coefficients changed."""
    study = Study.open(settings)
    bend, config = study.preset()
    named = {"alpha": alpha, "beta": beta, "gamma": gamma}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    result = study.bend(replace(bend, **given), replace(config, steps=steps) if steps else config)
    return Path(str(result.model.adapter))


def run_sweep(settings: Settings) -> Path:
    """``replib sweep``: every method at every block, at the last prompt token and at all positions, as CSV."""
    study = Study.open(settings)
    sweeper = study.sweeper()
    pca_ot = [("pca_ot", "last_prompt"), ("pca_ot", "all")]
    tables = [sweeper.layers(method, positions=positions) for method, positions in (*pca_ot, *BASELINES)]
    name = f"sweep-{Path(settings.model).name}.csv"
    return write_text(settings.out / name, pd.concat(tables).to_csv(index=False))
