"""Capture side by side with what people use instead: the same prompts, the same model, in turn, medians.

    python bench/capture.py --prompts AdvBench.csv --prompts alpaca.json --tokenizer FOLDER

Weights are random: neither time nor memory depends on them. Every contender reads the last prompt token of every
block; all but the loop read the same batches, sorted by length, so that only the way of reading differs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from replib.activations.capture import capture
from replib.activations.reader import Reader
from replib.data.prompts import load_prompts
from replib.models.chat_model import ChatModel

SHAPES = {  # hidden size, MLP, blocks, heads, key-value heads
    "tiny": (128, 352, 6, 4, 2),
    "small": (512, 1408, 12, 8, 4),
    "0.5b": (896, 4864, 24, 14, 2),
    "8b": (4096, 14336, 32, 32, 8),
}


def make_model(shape: str, tokenizer: Path, device: str) -> ChatModel:
    """A Llama of random weights around a real tokenizer, in float32 on a CPU and bfloat16 elsewhere."""
    words = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = dict(zip(names, SHAPES[shape], strict=True))
    config = AutoConfig.for_model("llama", vocab_size=len(words), max_position_embeddings=4096, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    return ChatModel(model.eval(), words, name=f"random {shape} Llama")


class Contenders:
    """The ways to read the last prompt token of every block, as ``[layers, prompts, dim]``."""

    def __init__(self, model: ChatModel, prompts: list[str], batch_size: int, peer: Path | None = None):
        self.model, self.prompts, self.batch_size, self.peer = model, prompts, batch_size, peer
        rows = model.tokenize(prompts)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self.back = torch.tensor(order).argsort()
        self.batches = [model.pad([rows[i] for i in chunk]).inputs() for chunk in chunks]
        self.tokens = sum(map(len, rows))
        self._traced = None
        self._worker: subprocess.Popen | None = None
        self._folder = tempfile.TemporaryDirectory()

    def ours(self) -> torch.Tensor:
        """replib: from text to vectors, tokenisation included."""
        return capture(self.model, self.prompts, batch_size=self.batch_size).values

    def ours_unshared(self) -> torch.Tensor:
        """replib, with the beginning that all prompts share read in every row, as the others read it."""
        Reader.shares = False
        try:
            return self.ours()
        finally:
            Reader.shares = True

    def bare(self) -> None:
        """The decoder alone, without unembedding, keeping nothing."""
        for inputs in self.batches:
            self.model.causal_lm.base_model(**inputs, use_cache=False)
        self._wait()

    def hidden_states(self) -> torch.Tensor:
        """output_hidden_states=True, the last token of each."""
        found = []
        for inputs in self.batches:
            states = self.model.causal_lm(**inputs, use_cache=False, output_hidden_states=True).hidden_states[1:]
            found.append(torch.stack([h[:, -1].float().cpu() for h in states]))
        return torch.cat(found, dim=1)[:, self.back]

    def states_without_logits(self) -> torch.Tensor:
        """The same of the decoder alone, which spares the logits: the best that can be made of it."""
        found = []
        for inputs in self.batches:
            states = self.model.causal_lm.base_model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
            found.append(torch.stack([h[:, -1].float().cpu() for h in states[1:]]))
        return torch.cat(found, dim=1)[:, self.back]

    def nnsight(self) -> torch.Tensor:
        """A trace of nnsight that saves the last token of each block."""
        import nnsight

        if self._traced is None:
            self._traced = nnsight.TransformersModel(
                self.model.causal_lm, tokenizer=self.model.tokenizer, task="text-generation", device=self.model.device
            )
        found = []
        for inputs in self.batches:
            with self._traced.trace(inputs | {"use_cache": False}):
                saved = [block.output[:, -1].float().cpu() for block in self._traced.model.layers]
                kept = nnsight.save(saved)
            found.append(torch.stack(kept))
        return torch.cat(found, dim=1)[:, self.back]

    def one_at_a_time(self) -> torch.Tensor:
        """Prompt by prompt, output_hidden_states=True, as in much published code."""
        found = []
        for prompt in self.prompts:
            text = self.model.render(prompt)
            ids = self.model.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(self.model.device)
            states = self.model.causal_lm(**ids, output_hidden_states=True).hidden_states[1:]
            found.append(torch.stack([h[0, -1].float().cpu() for h in states]))
        return torch.stack(found, dim=1)

    def transformer_lens(self) -> torch.Tensor:
        """The bridge of TransformerLens, in a process of its own, since it needs an environment of its own."""
        if self._worker is None:
            self._worker = self._started()
        self._worker.stdin.write("go\n")
        self._worker.stdin.flush()
        while (line := self._worker.stdout.readline()) != "done\n":  # the library prints of its own accord
            if not line:
                raise SystemExit("The worker of TransformerLens died; its own message stands above.")
        return load_file(Path(self._folder.name) / "found.safetensors")["values"][:, self.back]

    def _started(self) -> subprocess.Popen:
        self.model.causal_lm.save_pretrained(self._folder.name)
        self.model.tokenizer.save_pretrained(self._folder.name)
        named = {f"ids.{i}": b["input_ids"] for i, b in enumerate(self.batches)}
        named |= {f"mask.{i}": b["attention_mask"] for i, b in enumerate(self.batches)}
        save_file(named, Path(self._folder.name) / "batches.safetensors")
        worker = Path(__file__).with_name("transformer_lens_worker.py")
        command = [str(self.peer), str(worker), self._folder.name]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory in use while it runs, above what was in use before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # gives freed pages back, so that using them again counts
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory (Linux)
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    return f"{where}; torch {torch.__version__}, transformers {transformers.__version__}"


@torch.no_grad()
def measure(contenders: Contenders, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each over rounds in which they take turns, and peak memory."""
    ways = {name: getattr(contenders, name) for name in names}
    expected = contenders.ours()
    table = {}
    for name, way in ways.items():  # warm up, and see that all read the same (the last block is before the final norm)
        if name not in ("ours", "bare"):
            error = (way()[:-1] - expected[:-1]).norm() / expected[:-1].norm()
            table[name] = {"error": error.item()}
        if name != "transformer_lens":
            memory = sorted(peak_bytes(way, contenders.model.device) for _ in range(3))[1]
            table[name] = table.get(name, {}) | {"peak_mb": memory / 2**20}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: table[name] | {"seconds": statistics.median(seconds[name])} for name in names}


def report(table: dict[str, dict[str, float]]) -> str:
    """A table for people."""
    ours = table["ours"]
    lines = ["| | s | speed of ours over it | peak MB above the model | peak of ours over it | difference |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, row in table.items():
        peak, error = row.get("peak_mb"), f"{row['error']:.1e}" if "error" in row else ""
        memory = f"{peak:.0f} | {ours['peak_mb'] / peak:.3f}" if peak else " | "
        lines.append(f"| {name} | {row['seconds']:.2f} | {row['seconds'] / ours['seconds']:.2f} | {memory} | {error} |")
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", action="append", required=True, help="file of prompts; several are mixed equally")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without", action="append", default=[], help="contender to leave out")
    parser.add_argument("--transformer-lens", type=Path, help="Python of an environment that has TransformerLens")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    each = args.n // len(args.prompts)
    prompts = [p.text for source in args.prompts for p in load_prompts(source)[:each]]
    model = make_model(args.shape, args.tokenizer, args.device)
    contenders = Contenders(model, prompts, args.batch_size, args.transformer_lens)
    names = ["ours", "ours_unshared", "bare", "hidden_states", "states_without_logits", "nnsight", "one_at_a_time"]
    names += ["transformer_lens"] if args.transformer_lens else []
    table = measure(contenders, [n for n in names if n not in args.without], args.rounds)
    about = f"{model.name}, {len(prompts)} prompts, {contenders.tokens} tokens, batches of {args.batch_size}"
    print(f"{about}; medians of {args.rounds} rounds in turn.\n{machine(model.device)}\n\n{report(table)}")
    if args.json:
        args.json.write_text(json.dumps({"about": about, "machine": machine(model.device), "table": table}, indent=1))


if __name__ == "__main__":
    main()
