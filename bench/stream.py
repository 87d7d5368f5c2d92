"""Memory of streamed capture from a thousand prompts to a million: flat, where keeping the vectors grows.

    python bench/stream.py --n 1000 10000 100000 1000000

Each size runs in a process of its own, on a small Llama of random weights around the organism's tokenizer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from replib.activations.capture import capture, stream
from replib.data.prompts import load_prompts
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.transport.gaussians import Moments


def make_model() -> ChatModel:
    """Two blocks of width 64."""
    organism = load("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(organism.tokenizer), max_position_embeddings=256, **sizes)
    small = AutoModelForCausalLM.from_config(config)
    return ChatModel(small.eval(), organism.tokenizer, name="random small Llama")


def texts(n: int) -> Iterator[str]:
    """The organism's prompts, over and over."""
    return itertools.islice(itertools.cycle([p.text for p in load_prompts("organism/harmless")]), n)


def peak_mb() -> float:
    """Most resident memory of this process so far."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def one(n: int, *, keep: bool) -> dict[str, float]:
    """Peak memory and time of one size."""
    model = make_model()
    list(stream(model, texts(64)))  # what the libraries take for themselves
    before, start = peak_mb(), time.perf_counter()
    if keep:
        values = capture(model, list(texts(n)), batch_size=256).values
        mean = values.double().mean(dim=1)
    else:
        moments = Moments(rank=16)
        for piece in stream(model, texts(n), batch_size=256):
            moments.update(piece)
        mean = moments.mean
    return {"n": n, "above_mb": peak_mb() - before, "seconds": time.perf_counter() - start, "norm": mean.norm().item()}


def main() -> None:
    """Measure each size in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--most-kept", type=int, default=100_000, help="larger sizes are only streamed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.n[0], keep=args.one == "keep")))
        return
    print("| prompts | streamed: MB above the start | s | kept: MB above the start | s |\n|---|---|---|---|---|")
    for n in args.n:
        cells = []
        for way in ("stream", "keep"):
            if way == "keep" and n > args.most_kept:
                cells += ["", ""]
                continue
            command = [sys.executable, __file__, "--n", str(n), "--one", way]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells += [f"{found['above_mb']:.0f}", f"{found['seconds']:.0f}"]
        print(f"| {n:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
