"""Resumable multi-objective search for RepBend's alpha, beta and gamma, with its Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from replib.core.errors import Diverged, ReplibError
from replib.core.progress import progress
from replib.defences.repbend.config import BendConfig

if TYPE_CHECKING:
    import optuna


MINIMISE = ("attack_success", "kl")
"""Minimised objectives: share of attacks complied with, and KL(base ‖ bent) on harmless text in nats."""
MAXIMISE = ("harmless_compliance",)
"""Maximised objective: share of harmless requests answered."""
RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"alpha": (0.05, 1.0), "beta": (0.01, 1.0), "gamma": (0.1, 100.0)}
)
"""Searched range of each coefficient, uniform in its logarithm; coefficients are those of the paper."""
_TuningObjective = Callable[..., Mapping[str, float]]
"""Train and measure once: called with `alpha=, beta=, gamma=`, it returns a finite number for every name in
`MINIMISE` and `MAXIMISE`; further numbers are stored too."""


@dataclass(frozen=True)
class Tuning:
    """Finished trials, one a row, and their Pareto front."""

    table: pd.DataFrame
    front: pd.DataFrame
    pruned: int
    """Number of diverged trials, which have no row."""
    study: optuna.Study = field(repr=False, compare=False)


def tune(
    objective: _TuningObjective,
    *,
    trials: int,
    storage: str | Path,
    seed: int = 0,
    ranges: Mapping[str, tuple[float, float]] = RANGES,
) -> Tuning:
    """Run trials until `storage`, an Optuna journal file, holds `trials` finished ones; then return them all.

    A training that diverges (`Diverged`) is recorded as pruned and counts as finished; the search goes on.

    Each trial is on disk before the next begins, and trial n depends on `seed + n` and the finished trials
    alone: a search that was stopped (Ctrl-C, an error in the objective) and run again equals an unbroken one.

    Raises:
        ReplibError: optuna is absent, `storage` cannot be written or holds another search, a range is not positive
            and finite, or the objective omits a number or returns one that is not finite.
    """
    study = _open_study(Path(storage), seed, ranges)
    finished = len(_finished(study))
    for number in progress(range(finished, trials), "tuning"):
        _run_trial(study, objective, seed=seed + number, ranges=ranges)
    table, state = _table(study), _need_optuna().trial.TrialState
    pruned = len(study.get_trials(deepcopy=False, states=[state.PRUNED]))
    return Tuning(table, pareto(table, minimise=MINIMISE, maximise=MAXIMISE), pruned, study)


def pareto(table: pd.DataFrame, *, minimise: Collection[str] = (), maximise: Collection[str] = ()) -> pd.DataFrame:
    """Rows that no other row dominates (nowhere worse, somewhere better) in these columns; ties stay."""
    absent = [name for name in (*minimise, *maximise) if name not in table.columns]
    if absent or not (minimise or maximise):
        raise ReplibError(f"no Pareto front over {absent or 'no columns'}; the table has {list(table.columns)}.")
    costs = table[[*minimise, *maximise]].to_numpy(dtype=float) * ([1.0] * len(minimise) + [-1.0] * len(maximise))
    if np.isnan(costs).any():
        raise ReplibError(f"columns {[*minimise, *maximise]} hold NaN, which has no order; drop those rows first.")
    no_worse = (costs[:, None] <= costs[None]).all(axis=-1)
    better = (costs[:, None] < costs[None]).any(axis=-1)
    return table[~(no_worse & better).any(axis=0)]


def _open_study(path: Path, seed: int, ranges: Mapping[str, tuple[float, float]]) -> optuna.Study:
    optuna = _need_optuna()
    _check_ranges(ranges)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="replib",
            directions=["minimize"] * len(MINIMISE) + ["maximize"] * len(MAXIMISE),
            load_if_exists=True,
        )
    except OSError as error:
        raise ReplibError(f"cannot keep the search in '{path}': {error.strerror}; name a writable file.") from error
    _remember(study, {"seed": seed, "ranges": {name: list(ranges[name]) for name in RANGES}}, path)
    return study


def _remember(study: optuna.Study, settings: Mapping[str, object], path: Path) -> None:
    """Write the settings of a new study; refuse to mix two searches in one file."""
    for key, value in settings.items():
        if study.user_attrs.get(key, value) != value:
            raise ReplibError(
                f"'{path}' holds a search with {key} {study.user_attrs[key]}, not {value}; "
                "give the same settings to continue it, or another file."
            )
        if key not in study.user_attrs:
            study.set_user_attr(key, value)


def _run_trial(
    study: optuna.Study, objective: _TuningObjective, *, seed: int, ranges: Mapping[str, tuple[float, float]]
) -> None:
    """Ask for a trial, run it and tell its result; a failed trial is closed and its error raised."""
    optuna = _need_optuna()
    study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=False)
    trial = study.ask()
    try:
        measured = objective(**{name: trial.suggest_float(name, *ranges[name], log=True) for name in RANGES})
        values = _values(measured)
    except Diverged as error:
        trial.set_user_attr("diverged", str(error))
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return
    except BaseException:  # KeyboardInterrupt too, else the journal keeps a running trial
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        raise
    for name in measured.keys() - {*MINIMISE, *MAXIMISE}:
        trial.set_user_attr(name, float(measured[name]))
    study.tell(trial, values)


def _values(measured: Mapping[str, float]) -> list[float]:
    absent = [name for name in (*MINIMISE, *MAXIMISE) if name not in measured]
    if absent:
        raise ReplibError(f"the objective returned {sorted(measured)} without {absent}; return all of them.")
    values = [float(measured[name]) for name in (*MINIMISE, *MAXIMISE)]
    if not all(map(math.isfinite, values)):
        raise ReplibError(
            f"the objective returned {dict(measured)}; raise replib.core.errors.Diverged for a diverged run, "
            "which is then recorded as pruned."
        )
    return values


def _check_ranges(ranges: Mapping[str, tuple[float, float]]) -> None:
    if ranges.keys() != RANGES.keys() or not all(0 < low <= high < math.inf for low, high in ranges.values()):
        raise ReplibError(f"ranges {dict(ranges)} must give 0 < low <= high for each of {list(RANGES)}.")


def _finished(study: optuna.Study) -> Sequence[optuna.trial.FrozenTrial]:
    """Complete and pruned trials, in order."""
    state = _need_optuna().trial.TrialState
    return study.get_trials(deepcopy=False, states=[state.COMPLETE, state.PRUNED])


def _table(study: optuna.Study) -> pd.DataFrame:
    """Table of complete trials, one a row: coefficients, objectives, further numbers."""
    names = (*MINIMISE, *MAXIMISE)
    rows = [
        {"trial": number, **trial.params, **dict(zip(names, trial.values, strict=True)), **trial.user_attrs}
        for number, trial in enumerate(_finished(study))
        if trial.values is not None
    ]
    return pd.DataFrame(rows, columns=None if rows else ["trial", *RANGES, *names])


def _need_optuna() -> Any:
    """Import optuna; ReplibError if it is absent."""
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise ReplibError("the coefficient search needs optuna; install it with: pip install 'replib[tune]'") from error
    return optuna


def ranges_around(bend: BendConfig, factor: float = 10.0) -> dict[str, tuple[float, float]]:
    """Ranges from a configuration divided by ``factor`` to multiplied by it; the default range for a zero."""
    values = {name: getattr(bend, name) for name in RANGES}
    return {name: (x / factor, x * factor) if x else RANGES[name] for name, x in values.items()}


def importances(tuning: Tuning, seed: int = 0) -> pd.DataFrame:
    """Share of each objective's variance that each coefficient explains, by fANOVA (Hutter et al. 2014).

    Returns:
        A row a coefficient, a column an objective; each column sums to 1, or is 0 where the trials do not differ.
    """
    importance, shares = _need_optuna().importance, {}
    for i, name in enumerate((*MINIMISE, *MAXIMISE)):
        if tuning.table[name].nunique() > 1:
            shares[name] = importance.get_param_importances(
                tuning.study,
                evaluator=importance.FanovaImportanceEvaluator(seed=seed),
                target=lambda trial, i=i: trial.values[i],
            )
    return pd.DataFrame(shares, index=list(RANGES), columns=[*MINIMISE, *MAXIMISE]).fillna(0.0)
