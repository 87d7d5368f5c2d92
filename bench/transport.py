"""Gaussian transport side by side with POT: the same samples, in turn, medians; how it grows; how exact it is.

    python bench/transport.py                        # growth curves and accuracy: minutes
    python bench/transport.py --d 4096 --rounds 2    # POT's dense map takes minutes a round there

Covariances of fewer samples than dimensions are singular, so both get the same ridge. POT is timed from its covariances
on, ours from the samples. Seconds are those of one thread's work, so that what else the machine does counts for little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import mpmath
import numpy as np
import ot
import torch

from replib.transport.gaussian_map import GaussianMap, monge_scale

RIDGE = 1.0
"""A share of the mean variance: what so few samples need in the whole space."""
CONDITIONS = (1e4, 1e6, 1e8, 1e10, 1e12)
Pair = tuple[torch.Tensor, torch.Tensor]


def clouds(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes whose variances fall like 1 / i, with a gap."""
    g = torch.Generator().manual_seed(seed)
    deviations = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    harmful, harmless = (torch.randn(n, d, generator=g, dtype=torch.float64) * deviations for _ in range(2))
    harmful[:, :8] += 1
    return harmful, harmless


def ours(pair: Pair, k: int | None) -> GaussianMap:
    """The map, of K axes or of the whole space."""
    return GaussianMap(k, ridge=RIDGE if k is None else 1e-6).fit(*pair)


def prepared(pair: Pair) -> list[np.ndarray]:
    """Means and ridged covariances, which POT wants ready: making them is not timed."""
    source, target = (x.numpy() for x in pair)
    covariances = [np.cov(x, rowvar=False) for x in (source, target)]
    floor = RIDGE * sum(c.trace() for c in covariances) / (2 * source.shape[1])
    return [source.mean(0), target.mean(0), *(c + floor * np.eye(len(c)) for c in covariances)]


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of work of each over rounds in which they take turns, and what each gave last."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            results[name] = way()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}, results


def side_by_side(d: int, n: int, rounds: int) -> dict[str, float]:
    """Full-space map and K = 2 map of ours against POT's map between d x d covariances."""
    pair = clouds(n, d)
    ready = prepared(pair)
    ways = {
        "ours, all axes": lambda: ours(pair, None),
        "POT": lambda: ot.gaussian.bures_wasserstein_mapping(*ready),
        "ours, K = 2": lambda: ours(pair, 2),
    }
    ways["ours, all axes"]()  # warm up
    seconds, results = in_turn(ways, rounds)
    times = {f"POT / {name}": seconds["POT"] / taken for name, taken in seconds.items() if name != "POT"}
    a, b = map(torch.from_numpy, results["POT"])
    expected = pair[0] @ a + b
    difference = (results["ours, all axes"].transform(pair[0]) - expected).norm() / expected.norm()
    return {"d": d, "n": n} | seconds | times | {"difference": float(difference)}


def growth(rounds: int) -> list[dict[str, float]]:
    """Seconds of ours over d, over n and over K, one at a time."""
    sizes = [(d, 128, 2) for d in (512, 1024, 2048, 4096, 8192)]
    sizes += [(4096, n, 2) for n in (32, 64, 256, 512)] + [(4096, 128, k) for k in (1, 8, 32, 100)]
    rows = []
    for d, n, k in sizes:
        pair = clouds(n, d)
        ways = {"K axes": lambda pair=pair, k=k: ours(pair, k), "all axes": lambda pair=pair: ours(pair, None)}
        rows.append({"d": d, "n": n, "K": k} | in_turn(ways, rounds)[0])
    return rows


def conditioned(k: int, condition: float, seed: int) -> torch.Tensor:
    """A factor ``[3k, k]`` of a covariance of given condition number, with random axes."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0] for m in (3 * k, k))
    return left * torch.logspace(0, -np.log10(condition) / 2, k, dtype=torch.float64) @ right


def truth(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The scale to sixty digits, by the textbook formula."""
    k = source.shape[1]
    with mpmath.workdps(60):
        s, t = (mpmath.matrix(f.tolist()).T * mpmath.matrix(f.tolist()) for f in (source, target))
        root = symmetric_root(s)
        inverse = root**-1
        a = inverse * symmetric_root(root * t * root) * inverse
        return torch.tensor([[float(a[i, j]) for j in range(k)] for i in range(k)], dtype=torch.float64)


def symmetric_root(matrix: mpmath.matrix) -> mpmath.matrix:
    """Square root of a symmetric positive matrix."""
    values, vectors = mpmath.eigsy((matrix + matrix.T) / 2)
    return vectors * mpmath.diag([mpmath.sqrt(v) for v in values]) * vectors.T


def accuracy(k: int, seeds: int) -> list[dict[str, float]]:
    """Worst relative error of the scale against sixty digits, and in how many cases POT gave no number."""
    rows = []
    for condition in CONDITIONS:
        errors: list[float] = []
        theirs: list[float] = []
        for seed in range(seeds):
            pair = conditioned(k, condition, seed), conditioned(k, condition, seed + 100)
            exact, zero = truth(*pair), np.zeros(k)
            found, _ = ot.gaussian.bures_wasserstein_mapping(zero, zero, *((f.mT @ f).numpy() for f in pair))
            errors.append(float((monge_scale(*pair) - exact).norm() / exact.norm()))
            theirs.append(float((torch.from_numpy(found) - exact).norm() / exact.norm()))
        failed = int(np.isnan(theirs).sum())
        worst = float(np.nanmax(theirs)) if failed < seeds else float("nan")
        rows.append({"condition": condition, "ours": max(errors), "POT": worst, "POT not a number": failed})
    return rows


def machine() -> str:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return f"{cpu}, {torch.get_num_threads()} threads, {load}; torch {torch.__version__}, POT {ot.__version__}"


def printed(title: str, rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows of equal keys, printed as a table for people."""
    print(f"\n{title}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{x:.3g}" for x in row.values()) + " |", flush=True)
    return rows


def main() -> None:
    """Parse arguments, measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, nargs="+", default=[256, 512, 1024], help="widths at which POT is measured")
    parser.add_argument("--n", type=int, default=128, help="samples a class")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--k", type=int, default=24, help="axes of the covariances whose scale is checked")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of covariances a condition number")
    parser.add_argument("--only", nargs="+", choices=("speed", "growth", "accuracy"), help="leave out the others")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # POT warns of every root that it cannot take
    torch.set_num_threads(1)
    parts = {
        "speed": lambda: [side_by_side(d, args.n, args.rounds) for d in args.d],
        "growth": lambda: growth(args.rounds),
        "accuracy": lambda: accuracy(args.k, args.seeds),
    }
    about = f"{machine()}; medians of {args.rounds} rounds in turn, in seconds; relative errors, worst of {args.seeds}"
    print(about, flush=True)
    found = {name: printed(name, part()) for name, part in parts.items() if name in (args.only or parts)}
    if args.json:
        args.json.write_text(json.dumps({"about": about} | found, indent=1))


if __name__ == "__main__":
    main()
