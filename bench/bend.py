"""One training step of RepBend side by side with what the published code computes: same rows, same loss, in turn.

    python bench/bend.py --paired AdvBench.csv --unpaired wildjailbreak.jsonl --answers xstest.csv --tokenizer FOLDER

``official`` is the published step written anew from its description: requests padded to 512 tokens on their left and
answers to 512 on their right, retained dialogues to 1,024; six forwards, each with float32 logits and all hidden
states, which are stacked and multiplied by masks; both softmaxes over the whole vocabulary; three graphs alive until
one backward; gradient checkpointing. Left out in its favour: emptying the allocator nine times a step, and dropout,
so that terms can be compared. ``padded`` is the same, padded to the longest row of each group alone: what padding
costs by itself. ``_kept`` keeps the activations of blocks instead of computing them again (no checkpointing), and
``ours_checkpointed`` computes them again. ``ours_cached`` reads the base model's states from disk. ``bare`` is the
decoder alone over the same tokens in rows without padding.

A micro-batch is the published one: 4 contrasts, 4 unpaired safe and 4 unpaired unsafe answers, 4 retained dialogues.
Weights are random and the answers are not those to the prompts beside them: time and memory depend on lengths alone,
and those are real. Retained dialogues are several turns in one, as those of UltraChat are. Token ids are taken modulo
the vocabulary of the shape, which keeps the share of the unembedding what it is in a model of 8B.

"Tokens run" are those that enter the model, padding included, in both passes, for each that is read in both. No
step can do with less than a pass of the base model, a pass of the adapted one and the backward through it:
floor = 3 x seconds of ``bare``, and "of the floor" is floor / seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from capture import machine, peak_bytes
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from replib.data.prompts import Contrast, Dialogue, load_dialogues, load_prompts
from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import References, RepBend
from replib.models.chat_model import ChatModel, evaluating
from replib.models.tokens import Row
from replib.training.config import TrainConfig
from replib.training.train import attach

SHAPES = {  # hidden size, MLP, blocks, heads, key-value heads, vocabulary
    "tiny": (64, 176, 4, 4, 2, 512),
    "small": (384, 1056, 6, 6, 3, 3072),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
REQUEST, ANSWER, RETAINED = 512, 512, 1024  # most tokens, and what the published step pads to
MICRO = 4
CONFIG = BendConfig(fidelity="official")
TOLERANCE = {"cpu": 1e-3, "cuda": 3e-2}  # of each term; bfloat16 rounds positions, which count from the padding there
Items = dict[str, list]
Terms = dict[str, float]


# --------------------------------------------------------------------------------------------- model and data
def make_model(shape: str, tokenizer: Path, device: str) -> ChatModel:
    """A random Llama with LoRA away from its start, where all distances would be zero; counts the tokens it reads."""
    words = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = dict(zip((*names, "vocab_size"), SHAPES[shape], strict=True))
    config = AutoConfig.for_model("llama", max_position_embeddings=4096, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    chat = ChatModel(model.eval(), words, name=f"random {shape} Llama")
    chat = attach(chat, TrainConfig(dropout=0.0, perturbation=0.02), RepBend(CONFIG).lora(chat.n_layers))
    chat.model.train()
    return chat


class Embedded:
    """Brings token ids into the vocabulary before they are embedded, and counts them."""

    def __init__(self, chat: ChatModel):
        self.count = 0
        self.size = chat.causal_lm.config.vocab_size
        chat.causal_lm.get_input_embeddings().register_forward_pre_hook(self)

    def __call__(self, _module: object, args: tuple[Tensor]) -> tuple[Tensor]:
        """Hook before the embedding."""
        self.count += args[0].numel()
        return (args[0] % self.size,)


def cut(chat: ChatModel, text: str, tokens: int) -> str:
    """The beginning of a text, of so many tokens at most."""
    places = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(places) <= tokens else text[: places[tokens][0]]


class Source:
    """Micro-batches drawn from files of prompts and of answers."""

    def __init__(self, chat: ChatModel, paired: Path, unpaired: Path, answers: Path, turns: int):
        self.chat, self.turns, self.rng = chat, turns, random.Random(0)
        self.paired = self._fitting(load_prompts(paired))
        self.unpaired = self._fitting(load_prompts("wildjailbreak", unpaired))
        self.talks = load_dialogues(answers, columns={"response": "completion", "label": "final_label"})
        self.refusals = [d.response for d in self.talks if "full_refusal" in d.label]
        self.complied = [d.response for d in self.talks if "full_compliance" in d.label]

    def _fitting(self, prompts: Sequence) -> list[str]:
        texts = [p.text for p in prompts]
        return [t for t, row in zip(texts, self.chat.tokenize(texts), strict=True) if len(row) <= REQUEST]

    def draw(self) -> Items:
        """One micro-batch."""
        asked, alone, others = (self.rng.sample(x, MICRO) for x in (self.paired, self.unpaired, self.unpaired))
        safe, unsafe = (iter(self._answers(x)) for x in (self.refusals, self.complied))
        return {
            "contrasts": [Contrast(p, next(safe), next(unsafe)) for p in asked],
            "retain": [self._talk() for _ in range(MICRO)],
            "complied": [],
            "safe": [Dialogue(p, next(safe)) for p in alone],
            "unsafe": [Dialogue(p, next(unsafe)) for p in others],
        }

    def _answers(self, texts: list[str]) -> list[str]:
        return [cut(self.chat, text, ANSWER) for text in self.rng.sample(texts, 2 * MICRO)]

    def _talk(self) -> Dialogue:
        first, *rest = self.rng.sample(self.talks, self.turns)
        text = "\n\n".join([first.response, *(f"{d.prompt}\n\n{d.response}" for d in rest)])
        return Dialogue(first.prompt, cut(self.chat, text, RETAINED - len(self.chat.tokenize([first.prompt])[0])))


def in_groups(chat: ChatModel, items: Items) -> dict[str, list[Row]]:
    """The rows of the published step's three groups, without padding."""
    pairs = {
        "safe": [(c.prompt, c.safe_response) for c in items["contrasts"]],
        "unsafe": [(c.prompt, c.unsafe_response) for c in items["contrasts"]],
        "retain": [],
    }
    for name, rows in pairs.items():
        rows += [(d.prompt, d.response) for d in items[name]]
    return {name: chat.tokenize(*(list(x) for x in zip(*rows, strict=True))) for name, rows in pairs.items()}


# --------------------------------------------------------------------------------------------- the published step
class Padded(NamedTuple):
    """Requests filled up on their left, answers on their right."""

    ids: Tensor
    read: Tensor
    """1 on every token that is not padding."""
    answer: Tensor
    """1 on the tokens of answers."""
    border: int
    """Column at which answers begin."""


def laid_out(chat: ChatModel, rows: Sequence[Row], request: int, answer: int) -> Padded:
    """Rows in columns; a width of 0 is that of the longest."""
    request = request or max(row.prompt for row in rows)
    answer = answer or max(len(row) - row.prompt for row in rows)
    ids = torch.full((len(rows), request + answer), chat.pad_id)
    read = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(request - row.prompt, request - row.prompt + len(row))
        ids[i, columns], read[i, columns] = torch.tensor(row.ids), 1
    answers = read * (torch.arange(request + answer) >= request)
    return Padded(ids.to(chat.device), read.to(chat.device), answers.to(chat.device), request)


def published_rows(chat: ChatModel, items: Items, *, fixed: bool) -> dict[str, Padded]:
    """The three groups as the published step lays them out; retained dialogues are all request."""
    rows = in_groups(chat, items)
    whole = [replace(row, prompt=len(row)) for row in rows["retain"]]
    found = {name: laid_out(chat, rows[name], fixed * REQUEST, fixed * ANSWER) for name in ("safe", "unsafe")}
    return found | {"retain": laid_out(chat, whole, fixed * RETAINED, 0)}


def states(chat: ChatModel, rows: Padded, layers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of one forward: masked hidden states of the answers, those of the last request token, masked logits."""
    out = chat.model(input_ids=rows.ids, attention_mask=rows.read, use_cache=False, output_hidden_states=True)
    logits = out.logits.float()  # of every token, whether they are read or not
    if not layers:
        return logits, logits, logits * rows.read[..., None]
    stacked = torch.stack([out.hidden_states[i] for i in layers])
    last = torch.stack([out.hidden_states[i][:, rows.border - 1] for i in layers])
    return stacked.mul_(rows.answer[..., None]), last, logits[:0]


def published_passes(chat: ChatModel, rows: dict[str, Padded], target: Sequence[int]) -> dict[str, tuple]:
    """Three forwards; what is kept of each is alive together."""
    layers = {"safe": range(chat.n_layers + 1), "unsafe": target, "retain": ()}
    return {name: states(chat, rows[name], layers[name]) for name in rows}


def mean_norm(bent: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Sum of norms over layers and tokens of answers, divided by their number."""
    return (bent - base).norm(dim=-1, dtype=torch.float).sum() / (len(bent) * mask.sum())


def mean_similarity(last: Tensor) -> Tensor:
    """Of all pairs of different rows, from the whole table."""
    units = torch.nn.functional.normalize(last.float(), dim=-1)
    different = ~torch.eye(units.shape[1], dtype=torch.bool, device=units.device)
    return (units @ units.mT)[:, different].mean()


def divergence(bent: Tensor, base: Tensor, temperature: float) -> Tensor:
    """KL of whole tables of logits, summed over tokens, divided by rows."""
    log_q, p = (bent / temperature).log_softmax(-1), (base / temperature).softmax(-1)
    return temperature**2 * torch.nn.functional.kl_div(log_q, p, reduction="batchmean")


def published_step(chat: ChatModel, config: BendConfig, items: Items, *, fixed: bool) -> Terms:
    """Gradient and terms of a micro-batch as the published code computes them."""
    rows = published_rows(chat, items, fixed=fixed)
    target = [i + 1 for i in config.layers(chat.n_layers)]  # hidden state 0 is the embedding
    with torch.no_grad(), chat.adapter_off(), evaluating(chat.model):
        base = published_passes(chat, rows, target)
    bent = published_passes(chat, rows, target)
    safe, unsafe = (mean_norm(bent[g][0], base[g][0], rows[g].answer) for g in ("safe", "unsafe"))
    kl = divergence(bent["retain"][2], base["retain"][2], config.temperature)
    cosine = mean_similarity(bent["unsafe"][1])
    loss = 0.5 * safe - config.alpha * unsafe - config.beta * cosine + config.gamma * kl
    loss.backward()
    return {"safe": safe.item(), "unsafe": unsafe.item(), "cosine": cosine.item(), "kl": kl.item()}


# --------------------------------------------------------------------------------------------- our step
def ours_step(chat: ChatModel, config: BendConfig, items: Items, folder: Path | None = None) -> Terms:
    """Gradient and terms of a micro-batch as replib computes them; ``folder``: where the base's states are kept."""
    terms = dict.fromkeys(("safe", "unsafe", "cosine", "kl"), 0.0)
    for part in RepBend(config, References(folder)).parts(chat, items, 0.0):
        part.loss.backward()
        for name in terms.keys() & part.terms:
            terms[name] += part.terms[name].item()
    return terms


# --------------------------------------------------------------------------------------------- side by side
@contextmanager
def checkpointed(chat: ChatModel) -> Iterator[None]:
    """Activations inside of blocks are computed again for the gradient."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing_")  # renamed in later versions
    chat.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        chat.causal_lm.gradient_checkpointing_disable()


class Contenders:
    """The ways to take a step's gradient; each returns the terms."""

    def __init__(self, args: argparse.Namespace):
        self.chat = make_model(args.shape, args.tokenizer, args.device)
        self.embedded = Embedded(self.chat)
        self._folder = tempfile.TemporaryDirectory()
        source = Source(self.chat, args.paired, args.unpaired, args.answers, args.turns)
        self.batches = [source.draw() for _ in range(args.rounds)]

    def ours(self, items: Items) -> Terms:
        """replib, from text to gradient."""
        return ours_step(self.chat, CONFIG, items)

    def ours_checkpointed(self, items: Items) -> Terms:
        """The same with gradient checkpointing."""
        with checkpointed(self.chat):
            return self.ours(items)

    def ours_cached(self, items: Items) -> Terms:
        """The same with the base model's states read from disk, where an earlier call has put them."""
        return ours_step(self.chat, CONFIG, items, Path(self._folder.name))

    def official(self, items: Items) -> Terms:
        """The published step."""
        with checkpointed(self.chat):
            return self.official_kept(items)

    def official_kept(self, items: Items) -> Terms:
        """The published step without gradient checkpointing."""
        return published_step(self.chat, CONFIG, items, fixed=True)

    def padded(self, items: Items) -> Terms:
        """The published step, padded to the longest row of each group."""
        with checkpointed(self.chat):
            return self.padded_kept(items)

    def padded_kept(self, items: Items) -> Terms:
        """That without gradient checkpointing."""
        return published_step(self.chat, CONFIG, items, fixed=False)

    @torch.no_grad()
    def bare(self, items: Items) -> None:
        """The decoder alone over the same tokens, in as many rows of one length."""
        rows = [row.ids for group in in_groups(self.chat, items).values() for row in group]
        ids = torch.tensor(sum(rows, []), device=self.chat.device)
        ids = ids[: len(ids) // len(rows) * len(rows)].view(len(rows), -1)
        with self.chat.adapter_off():
            self.chat.causal_lm.base_model(input_ids=ids, use_cache=False)

    def tokens(self, items: Items) -> int:
        """Tokens that are read: all but padding."""
        return sum(len(row) for group in in_groups(self.chat, items).values() for row in group)

    def gradient(self) -> Tensor:
        """What the last step left, taken away."""
        weights = [p for p in self.chat.model.parameters() if p.requires_grad]
        found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights])
        self.chat.model.zero_grad()
        return found

    def wait(self) -> None:
        """For the device to end what it was given."""
        if self.chat.device.type == "cuda":
            torch.cuda.synchronize()


def compare(contenders: Contenders, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """One step of each: its tokens, and how far its terms and gradient are from the published ones."""
    items, table = contenders.batches[0], {}
    contenders.ours_cached(items)
    contenders.gradient()
    terms, gradient = contenders.official(items), contenders.gradient()
    for name in names:
        before = contenders.embedded.count
        found = getattr(contenders, name)(items)
        passes = 1 if name == "bare" else 2
        run = (contenders.embedded.count - before) / (passes * contenders.tokens(items))
        table[name] = {"run": run}
        if found is not None:
            apart = (contenders.gradient() - gradient).norm() / gradient.norm()
            error = max(abs(found[term] - x) / abs(x) for term, x in terms.items())
            table[name] |= {"terms": error, "gradient": apart.item()}
            if not error < TOLERANCE[contenders.chat.device.type]:
                raise SystemExit(f"{name} has the terms {found}, the published step {terms}: not the same step.")
    return table


def clock(contenders: Contenders, names: Sequence[str]) -> dict[str, float]:
    """Median seconds of each; they take turns, each round on a micro-batch of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for items in contenders.batches:
        contenders.ours_cached(items)
        for name in names:
            contenders.chat.model.zero_grad()
            contenders.wait()
            start = time.perf_counter()
            getattr(contenders, name)(items)
            contenders.wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(x) for name, x in seconds.items()}


def peak(contenders: Contenders, name: str) -> float:
    """Most megabytes above the model during one step, after one of ours has loaded what all need."""
    way: Callable = getattr(contenders, name)
    contenders.ours_cached(contenders.batches[0])
    contenders.chat.model.zero_grad()
    return peak_bytes(lambda: way(contenders.batches[0]), contenders.chat.device) / 2**20


def peak_alone(args: argparse.Namespace, name: str) -> float:
    """The same in a process of its own."""
    return peak(Contenders(args), name)


def peaks(args: argparse.Namespace, contenders: Contenders, names: Sequence[str]) -> dict[str, float]:
    """Peak of each; resident memory is that of a whole process, so on a CPU each has a fresh one."""
    if args.device != "cpu":
        return {name: peak(contenders, name) for name in names}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return {name: pool.apply(peak_alone, (args, name)) for name in names}


def report(table: dict[str, dict[str, float]]) -> str:
    """A table for people."""
    ours, floor = table["ours"], 3 * table["bare"]["seconds"]
    lines = ["| | s | speed of ours over it | peak MB above the model | peak of ours over it | tokens run for one read "
             "| of the floor | worst term differs by | gradient by |", "|---" * 9 + "|"]  # fmt: skip
    for name, row in table.items():
        times = f"{row['seconds']:.2f} | {row['seconds'] / ours['seconds']:.2f}"
        memory = f"{row['peak_mb']:.0f} | {ours['peak_mb'] / row['peak_mb']:.2f} | {row['run']:.2f}"
        same = (
            f"{floor / row['seconds']:.0%} | {row['terms']:.0e} | {row['gradient']:.0e}" if "terms" in row else " | | "
        )
        lines.append(f"| {name} | {times} | {memory} | {same} |")
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paired", type=Path, required=True, help="file of prompts that have both answers")
    parser.add_argument(
        "--unpaired", type=Path, required=True, help="file of WildJailbreak: prompts that have one answer"
    )
    parser.add_argument("--answers", type=Path, required=True, help="completions of XSTest with their labels")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--turns", type=int, default=5, help="of a retained dialogue, before it is cut to 1,024 tokens")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without", action="append", default=[], help="contender to leave out")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    contenders = Contenders(args)
    names = ["official", "official_kept", "padded", "padded_kept", "ours", "ours_checkpointed", "ours_cached", "bare"]
    names = [name for name in names if name not in args.without]
    table = compare(contenders, names)
    seconds, memory = clock(contenders, names), peaks(args, contenders, names)
    table = {name: row | {"seconds": seconds[name], "peak_mb": memory[name]} for name, row in table.items()}
    tokens = statistics.mean(map(contenders.tokens, contenders.batches))
    about = f"{contenders.chat.name}, {5 * MICRO} rows of {tokens:.0f} tokens together"
    print(f"{about}; medians of {args.rounds} rounds in turn.\n{machine(contenders.chat.device)}\n\n{report(table)}")
    if args.json:
        args.json.write_text(json.dumps({"about": about, "machine": machine(contenders.chat.device), "table": table}))


if __name__ == "__main__":
    main()
