"""Train RepBend at a grid of coefficients: ``python -m replib.organism.surface`` (a minute a setting on two cores).

The table that it writes is what the coefficient scrubber moves through: really trained settings, one run and seed each,
each judged on validation prompts. Finished settings are kept when it is interrupted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import product

from replib.activations import versions
from replib.audit import audit
from replib.judges import ExactJudge
from replib.models import load
from replib.settings import Settings, data_dir
from replib.store import key_of, write_text
from replib.study import Study
from replib.train import train

ALPHAS, BETAS, GAMMAS = (0.0, 0.1, 0.2, 0.4), (0.0, 0.1), (3.0, 30.0)
KEPT = ("attack", "kind", "n", "compliance", "low", "high", "degenerate")


def main() -> None:
    """Command line: train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=48, help="validation prompts a row")
    limit = parser.parse_args().limit
    path = data_dir() / "organism" / "surface.json"
    kept = json.loads(path.read_text())["settings"] if path.exists() else []
    for alpha, beta, gamma in product(ALPHAS, BETAS, GAMMAS):
        study = Study.open(Settings())
        facts = {
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "base": study.model.provenance(),
            "limit": limit,
        }
        if key_of(facts) in {point["key"] for point in kept}:
            continue
        kept.append(_train(study, alpha, beta, gamma, limit) | {"key": key_of(facts)})
        write_text(path, json.dumps({"versions": versions(), "settings": kept}, indent=1))
        print(f"alpha {alpha}, beta {beta}, gamma {gamma}: step {kept[-1]['step']}", flush=True)


def _train(study: Study, alpha: float, beta: float, gamma: float, limit: int) -> dict:
    bend, config = study.preset()
    bend = replace(bend, alpha=alpha, beta=beta, gamma=gamma)
    out = study.settings.out / "surface"
    result = train(study.model, study.bend_data, bend=bend, config=config, probe=study.probe(), out=out)
    tasks = study.tasks("val", limit)
    base, bent = load(study.settings.model), result.model
    tables = [audit(m, tasks, ExactJudge(), name=name).frame for name, m in (("base", base), ("bent", bent))]
    rows = [row for frame in tables for row in frame[["model", *KEPT]].to_dict("records")]
    return {"alpha": alpha, "beta": beta, "gamma": gamma, "step": result.step, "steps": config.steps,
            "seed": config.seed, "rows": rows}  # fmt: skip


if __name__ == "__main__":
    main()
