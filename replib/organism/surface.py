"""Train RepBend at a grid of coefficients: ``python -m replib.organism.surface`` (a minute a setting on two cores).

The table that it writes is what the coefficient scrubber moves through: really trained settings, one run and seed each,
each judged on validation prompts. Finished settings are kept when it is interrupted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from itertools import product

from replib.activations import versions
from replib.audit import audit
from replib.bend import BendConfig
from replib.chat import ChatModel
from replib.judges import ExactJudge
from replib.repbend import RepBend
from replib.settings import Settings, data_dir
from replib.store import key_of, write_text
from replib.study import Study
from replib.train import TrainConfig, TrainResult, train

ALPHAS, BETAS, GAMMAS = (0.08, 0.0), (30.0, 0.0), (100.0, 30.0)
KEPT = ("model", "attack", "kind", "n", "compliance", "low", "high", "degenerate")


def main() -> None:
    """Command line: train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=48, help="validation prompts a row")
    limit = parser.parse_args().limit
    path = data_dir() / "organism" / "surface.json"
    kept = json.loads(path.read_text())["settings"] if path.exists() else []
    base: list[dict] = []
    for alpha, beta, gamma in product(ALPHAS, BETAS, GAMMAS):
        study = Study.open(Settings())
        bend, config = study.preset()
        bend = replace(bend, alpha=alpha, beta=beta, gamma=gamma)
        key = key_of(asdict(bend), asdict(config), study.model.provenance(), limit)
        if key in {point["key"] for point in kept}:
            continue
        base = base or _rows(study.model, study, "base", limit)  # the same for every setting
        trained = _train(study, bend, config)
        rows = base + _rows(trained.model, study, "bent", limit)
        kept.append(_point(bend, config, trained.step) | {"rows": rows, "key": key})
        write_text(path, json.dumps({"versions": versions(), "settings": kept}, indent=1))
        print(f"alpha {alpha}, beta {beta}, gamma {gamma}: step {kept[-1]['step']}", flush=True)


def _train(study: Study, bend: BendConfig, config: TrainConfig) -> TrainResult:
    out = study.settings.out / "surface"
    return train(study.model, study.bend_data, RepBend(bend), config=config, probe=study.probe(), out=out)


def _point(bend: BendConfig, config: TrainConfig, step: int) -> dict:
    coefficients = {"alpha": bend.alpha, "beta": bend.beta, "gamma": bend.gamma}
    return coefficients | {"step": step, "steps": config.steps, "seed": config.seed}


def _rows(model: ChatModel, study: Study, name: str, limit: int) -> list[dict]:
    frame = audit(model, study.tasks("val", limit), ExactJudge(), name=name, max_new_tokens=32).frame
    return frame[list(KEPT)].to_dict("records")


if __name__ == "__main__":
    main()
