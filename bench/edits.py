"""What an edit of one block costs a model that generates: processor time with it, over without it.

    python bench/edits.py [model] [rounds]

Rounds alternate without, with, without, with, …; each is greedy generation of 48 tokens from 16 prompts, on one thread.
Given are medians over rounds of the ratio to the mean of the two neighbours without an edit.
"""

import statistics
import sys
import time

import torch

from replib.edits.apply import applied
from replib.models.load import load
from replib.transport.affine import AffineEdit

PROMPTS = [f"How is number {i} of the list made?" for i in range(16)]


def seconds(model, **edit) -> float:
    """Processor time of one generation, edited if told."""
    start = time.process_time()
    if edit:
        with applied(model, **edit):
            model.continued(model.encode(PROMPTS), 48)
    else:
        model.continued(model.encode(PROMPTS), 48)
    return time.process_time() - start


def overhead(model, rounds: int, **edit) -> float:
    """Median share of time that an edit adds."""
    times = [seconds(model, **(edit if i % 2 else {})) for i in range(2 * rounds + 1)]
    return statistics.median(times[i] / ((times[i - 1] + times[i + 1]) / 2) - 1 for i in range(1, 2 * rounds, 2))


name, rounds = (sys.argv[1:] + ["aligned", "9"][len(sys.argv) - 1 :])[:2]
torch.set_num_threads(1)
model = load(name)
model.model.generation_config.eos_token_id = None  # so that all rounds write the same number of tokens
layer, small = model.n_layers // 2, 1e-4 / model.d_model
edit = AffineEdit(*(small * torch.randn(model.d_model, 2) for _ in range(2)), small * torch.randn(model.d_model))
seconds(model)
print("| edit of one block, rank 2 | time added |\n|---|---|")
for positions in ("last_prompt", "decode", "all"):
    print(f"| {positions} | {overhead(model, int(rounds), edits={layer: edit}, positions=positions):+.1%} |")
