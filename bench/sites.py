"""Worst difference of captured activations from an independent read-out, for each architecture and site.

    python bench/sites.py

The read-out is that of tests/models/test_hooks.py: one unpadded prompt at a time, modules named by hand from each
source, their forward methods wrapped, no hook. Differences are relative to the largest value of the site.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import tiny
from models import test_hooks  # noqa: E402
from replib.activations.capture import capture_sites
from replib.models.hooks import SITES
from replib.models.load import load


def differences(kind: str) -> dict[str, float]:
    """Of every site of the middle block of a random three-block model."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(tiny.save_model(Path(folder), kind))
    expected = test_hooks.read_by_hand(model, kind, layer=1)
    found = capture_sites(model, test_hooks.PROMPTS, tuple(expected), layers=[1])
    return {s: ((found[s][1] - x).abs().max() / x.abs().max()).item() for s, x in expected.items()}


logging.disable_progress_bar()
torch.set_num_threads(1)
print("| |", " | ".join(SITES), "|")
print("|---" * (len(SITES) + 1) + "|")
for kind in tiny.SIZES:
    found = differences(kind)
    print(f"| {kind} |", " | ".join(f"{found[s]:.0e}" if s in found else "none" for s in SITES), "|")
