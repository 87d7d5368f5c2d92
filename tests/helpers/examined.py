"""A made-up audit of defended models, in the shape of the packed file: letters drawn by lot, with known rates."""

import numpy as np

from replib.ablation.localisation import Features
from replib.experiments.transport_results import TransportAudit

PROMPTS, LAYERS = 24, 6
STRENGTHS, SIZES = [0.0, 0.5, 1.0, 2.0], [8, 32, 128]
RATES = {"aligned": 0.9, "planted": 0.8, "strong": 0.1}
SEEDS = {"aligned": 1, "planted": 1, "strong": 3}


def letters(rng, rate, n=PROMPTS):
    return "".join(rng.choice(list("crd"), n, p=[rate, (1 - rate) * 0.8, (1 - rate) * 0.2]))


def gaps(height):
    rise = np.linspace(0, height, LAYERS)
    part = {"value": [*rise], "low": [-0.1] * LAYERS, "high": [0.1] * LAYERS, "p": [0.01] * LAYERS}
    return {"mean": part, "covariance": part, "auroc": [*np.linspace(0.5, 1, LAYERS)]}


def subject(rng, name, seed):
    rate = RATES[name]
    by_block = [letters(rng, rate * i / (LAYERS - 1)) for i in range(LAYERS)]
    kinds = ("prompt", "prompt, on the answer", "token 1", "prompt + token 1")
    kinds = {k: {"val": [0, 1, i], "block": 3, "test": letters(rng, rate * i / 3)} for i, k in enumerate(kinds)}
    return {
        "name": name, "title": name.title(), "seed": seed,
        "gaps": {"prompt": gaps(rate), "answer": gaps(2 * rate)},
        "blocks": {
            "k": 2, "block": 4, "val": {"2": [0] * LAYERS}, "plain": letters(rng, 0), "refitted": by_block,
            "transferred": [letters(rng, 0) for _ in by_block],
            "features": {f: [*(rng.random(LAYERS) * 3)] for f in Features._fields},
        },
        "strengths": {"least": [None if x == "r" else float(rng.choice(STRENGTHS)) for x in letters(rng, rate)]},
        "samples": {str(n): [letters(rng, rate * n / 128) for _ in range(2)] for n in SIZES},
        "shares": {"full": [letters(rng, rate)], "mean_only": [letters(rng, rate)],
                   "random_labels": [letters(rng, 0) for _ in range(3)]},
        "tokens": {"blocks": [1, 3, 5], "kinds": kinds},
    }  # fmt: skip


def examined():
    """Three models, one of them planted, one of three seeds; and the untuned one, of which only the gaps are known."""
    rng = np.random.default_rng(0)
    found = [subject(rng, name, seed) for name, seeds in SEEDS.items() for seed in range(seeds)]
    found[1] |= {"planted": [2, 3], "places": {"rfa": found[1]["blocks"]["refitted"],
                 "actadd": [letters(rng, 0)] * LAYERS, "lens": [0, 0, 0.2, 0.9, 1, 1]}}  # fmt: skip
    untuned = {"name": "base", "title": "base", "seed": 0, "gaps": {"prompt": gaps(0.1), "answer": gaps(0.1)}}
    design = {"strengths": STRENGTHS, "sizes": SIZES, "val": 16, "profiled": 40}
    return TransportAudit([untuned, *found], {"design": design})
