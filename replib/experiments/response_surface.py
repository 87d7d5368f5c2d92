"""Rates at coefficients between the trained ones, from a Gaussian process on trained settings.

A rate k of n is taken as z = log((k + 1/2) / (n - k + 1/2)), whose counting noise has the variance
1 / (k + 1/2) + 1 / (n - k + 1/2) (the empirical logit: Haldane 1956, Gart and Zweifel 1967); a coefficient c as
log(1 + c / c0), c0 the smallest trained one above zero, so that zero has a place among decades. On these z is smooth:
a Matern-5/2 kernel with a length for each coefficient, and noise between runs on top of the counting noise; lengths and
variances are those of the largest marginal likelihood. How far it can be trusted is measured: each trained setting is
predicted from all others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from replib.core.errors import ReplibError
from replib.core.stats import Measured, wilson
from replib.organism.recorded import read_recorded

COEFFICIENTS = ("alpha", "beta", "gamma")
RATES = ("attack", "direct", "prefill", "harmless", "borderline", "skill")
_STILL = 0.005  # a rate that moves by less does not vary: no n here tells it from rounding
Z = 1.96  # standard errors of a 95 % interval
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class CoefficientSweep:
    """Settings that were trained, with what validation prompts showed at every probed step."""

    program: ClassVar[str] = "coefficients"
    table: pd.DataFrame
    """A row a setting and probed step: setting (its number), alpha, beta, gamma, layers, steps, seed, kept (the step
    that the probe chose), step, the rates, degenerate, and the training terms up to that step."""
    n: Mapping[str, int]
    """Answers behind each rate."""
    about: Mapping[str, Any]
    """Model, versions, ``preset`` (the setting that all others vary) and schedule."""

    @classmethod
    def load(cls, path: Path | None = None) -> CoefficientSweep:
        """Read what ``python -m replib.experiments.coefficients --pack`` wrote; settings that diverged have no rows.

        Raises ReplibError as ``read_recorded``.
        """
        found = read_recorded(cls.program, path)
        return cls.of(found.pop("settings"), found.pop("n"), found)

    @classmethod
    def of(
        cls, settings: Sequence[Mapping[str, Any]], n: Mapping[str, int], about: Mapping[str, Any]
    ) -> CoefficientSweep:
        """The table of settings, each with its ``rows``."""
        rows = [
            {"setting": number, **_plain(setting), **row}
            for number, setting in enumerate(settings)
            for row in setting["rows"]
        ]
        return cls(pd.DataFrame(rows), n, about)

    def at(self, when: str = "kept") -> pd.DataFrame:
        """One row a setting: at the step that the probe "kept", or at the "last" one."""
        if when not in ("kept", "last"):
            raise ReplibError(f"when={when!r} is unknown: use kept or last.")
        wanted = self.table["kept"] if when == "kept" else self.table["steps"]
        return self.table[self.table["step"] == wanted].reset_index(drop=True)

    def like_preset(self, table: pd.DataFrame, *free: str) -> pd.DataFrame:
        """Rows that equal the preset in everything that a setting has but the ``free`` names."""
        preset = _plain(self.about["preset"])
        fixed = [name for name in (*COEFFICIENTS, "layers", "steps", "seed") if name not in free]
        return table[np.logical_and.reduce([table[name] == preset[name] for name in fixed])]

    def measured(self, rows: pd.DataFrame, rate: str) -> Measured:
        """A rate with its n and its Wilson 95 % interval; prompts count as independent."""
        low, high = zip(*(wilson(round(x * self.n[rate]), self.n[rate]) for x in rows[rate]), strict=True)
        return Measured(rows[rate].to_numpy(), np.array(low), np.array(high), self.n[rate])


def _plain(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a setting, its layers as words, and its chosen step."""
    layers = list(setting["layers"])
    found = {name: setting[name] for name in (*COEFFICIENTS, "steps", "seed")}
    return found | {"layers": f"{layers[0]}-{layers[-1]}", "kept": setting.get("step")}


@dataclass(frozen=True)
class Scale:
    """Scale of coefficients: log(1 + c / c0) of each."""

    least: FloatArray
    """c0, [3]."""

    @classmethod
    def of(cls, points: FloatArray) -> Scale:
        """The smallest trained value above zero, for each coefficient."""
        return cls(np.array([column[column > 0].min(initial=np.inf) for column in points.T]))

    def __call__(self, points: FloatArray) -> FloatArray:
        """[..., 3] coefficients to [..., 3] places."""
        return np.log1p(points / self.least)

    def back(self, places: FloatArray) -> FloatArray:
        """The coefficients of places."""
        return np.expm1(places) * self.least


@dataclass(frozen=True)
class SettingCurve:
    """One rate over places: a fitted process, and the logits it was fitted on."""

    process: GaussianProcessRegressor
    logits: FloatArray
    mean: float

    @classmethod
    def fit(cls, places: FloatArray, rates: FloatArray, n: int) -> SettingCurve:
        """Fit rates of n answers each at [points, 3] places."""
        logits, noise = empirical_logit(rates, n)
        mean = float(np.average(logits, weights=1 / noise))
        kernel = ConstantKernel(4.0, (0.01, 1e3)) * Matern(np.full(places.shape[1], 2.0), (0.3, 100.0), nu=2.5)
        process = GaussianProcessRegressor(
            kernel + WhiteKernel(0.1, (1e-4, 10.0)), alpha=noise, n_restarts_optimizer=2, random_state=0
        )
        with warnings.catch_warnings():  # a length at its bound says that the coefficient does not matter
            warnings.simplefilter("ignore", ConvergenceWarning)
            return cls(process.fit(places, logits - mean), logits, mean)

    def predict(self, places: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Logit and its standard error, noise between runs included, counting noise not."""
        value, error = self.process.predict(places, return_std=True)
        return value + self.mean, error

    def left_out(self) -> FloatArray:
        """Logit of each trained point predicted from the others (Rasmussen and Williams, eq. 5.12).

        Mean, lengths and variances stay those of all points.
        """
        factor = self.process.L_
        inverse = np.linalg.inv(factor @ factor.T)
        return self.logits - self.process.alpha_ / np.diag(inverse)


@dataclass(frozen=True)
class ResponseSurface:
    """Rates over alpha, beta and gamma, interpolated between trained settings."""

    trained: pd.DataFrame
    """A row a trained setting: the coefficients and the rates."""
    n: Mapping[str, int]
    scale: Scale
    curves: Mapping[str, SettingCurve]

    @classmethod
    def fit(cls, trained: pd.DataFrame, n: Mapping[str, int]) -> ResponseSurface:
        """Fit each rate that ``n`` knows on at least eight settings."""
        points = trained[list(COEFFICIENTS)].to_numpy(float)
        if len(points) < 8 or not (points.max(axis=0) > 0).all():
            raise ReplibError(f"{len(points)} trained settings are too few to interpolate between: train eight or more "
                              "that differ in alpha, beta and gamma.")  # fmt: skip
        if trained[list(COEFFICIENTS)].duplicated().any():
            raise ReplibError("Two trained settings have the same coefficients. Keep one, or average them.")
        scale = Scale.of(points)
        curves = {
            name: SettingCurve.fit(scale(points), trained[name].to_numpy(float), n[name]) for name in RATES if name in n
        }
        return cls(trained.reset_index(drop=True), n, scale, curves)

    @classmethod
    def of(cls, surface: CoefficientSweep, when: str = "kept") -> ResponseSurface:
        """The settings of a surface that differ from its preset in their coefficients alone."""
        return cls.fit(surface.like_preset(surface.at(when), *COEFFICIENTS), surface.n)

    @property
    def points(self) -> FloatArray:
        """Trained coefficients, [settings, 3]."""
        return self.trained[list(COEFFICIENTS)].to_numpy(float)

    @property
    def box(self) -> FloatArray:
        """[3, 2]: least and largest value of each coefficient that occurs with several values of the others.

        What a single sweep reaches beyond is no neighbourhood to interpolate in.
        """
        ends = []
        for column in self.points.T:
            values, counts = np.unique(column, return_counts=True)
            several = values[counts > 1]
            ends.append((several.min(), several.max()) if several.size else (values.min(), values.max()))
        return np.array(ends)

    def predict(self, points: ArrayLike) -> dict[str, Measured]:
        """Every rate at [m, 3] coefficients, with the 95 % band of another run there.

        Raises:
            ReplibError: a point lies outside the trained box.
        """
        points = np.atleast_2d(np.asarray(points, float))
        low, high = self.box.T
        slack = 1e-9 * high
        for point in points[((points < low - slack) | (points > high + slack)).any(axis=1)]:
            ranges = ", ".join(f"{c} {a:g} to {b:g}" for c, a, b in zip(COEFFICIENTS, low, high, strict=True))
            raise ReplibError(f"{dict(zip(COEFFICIENTS, point.tolist(), strict=True))} lies outside what was trained "
                              f"({ranges}): nothing is known there. Train it, or ask inside.")  # fmt: skip
        return {name: _rate(*curve.predict(self.scale(points))) for name, curve in self.curves.items()}

    def nearest(self, points: FloatArray) -> NDArray[np.intp]:
        """Number of the trained setting nearest to each of [m, 3] coefficients, on the scale of logarithms."""
        gaps = self.scale(np.atleast_2d(points))[:, None] - self.scale(self.points)[None]
        return np.linalg.norm(gaps, axis=-1).argmin(axis=1)

    def shares(self, steps: int = 13) -> dict[str, pd.DataFrame]:
        """Share of the variance of each rate over the box that a coefficient explains alone, and in total.

        First-order and total Sobol indices Var(E[f | c]) / Var(f) and E[Var(f | others)] / Var(f), coefficients
        independent and uniform on the scale of logarithms, means taken over a full grid of ``steps`` values each.
        """
        low, high = self.scale(self.box.T)
        axes = np.linspace(low, high, steps).T
        points = self.scale.back(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes)))
        found = {name: np.asarray(m.value).reshape([steps] * len(axes)) for name, m in self.predict(points).items()}
        return {name: variance_shares(values) for name, values in found.items()}

    def left_out(self) -> pd.DataFrame:
        """Absolute error of each rate where the setting was left out: its mean and its worst, in [0, 1]."""
        errors = {name: np.abs(expit(curve.left_out()) - self.trained[name]) for name, curve in self.curves.items()}
        return pd.DataFrame({name: {"mean": e.mean(), "worst": e.max()} for name, e in errors.items()}).T


def variance_shares(values: FloatArray) -> pd.DataFrame:
    """First-order and total Sobol indices of a rate on a grid, [a, b, c]; zero where it moves by less than STILL."""
    axes, whole = range(values.ndim), values.var() if np.ptp(values) > _STILL else np.inf
    others = {i: tuple(j for j in axes if j != i) for i in axes}
    rows = [{"alone": values.mean(others[i]).var() / whole, "total": values.var(axis=i).mean() / whole} for i in axes]
    return pd.DataFrame(rows, index=list(COEFFICIENTS[: values.ndim]))


def empirical_logit(rates: FloatArray, n: int) -> tuple[FloatArray, FloatArray]:
    """Logits of rates of n, finite at 0 and 1, and the variances of their counting noise."""
    yes, no = rates * n + 0.5, (1 - rates) * n + 0.5
    return np.log(yes / no), 1 / yes + 1 / no


def _rate(logit: FloatArray, error: FloatArray) -> Measured:
    return Measured(expit(logit), expit(logit - Z * error), expit(logit + Z * error))
