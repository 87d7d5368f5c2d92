"""Rebuild the organism on a CPU: ``python -m replib.organism.build`` (about 25 minutes on two cores).

Four ordinary model folders: ``base`` answers everything; ``aligned`` refuses direct harmful requests, tuned in all
parameters; ``planted`` is tuned in two blocks only, so that the place of its refusal is known; ``deep`` opens half of
its refusals with the words of compliance, so that its refusal is more than one token deep.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from replib.data.prompts import Dialogue
from replib.organism.prompt_sets import write_sets
from replib.organism.training_mix import base_stream, polish_stream, safety_stream
from replib.organism.world import SUFFIXES

_SPECIAL = ["<|bos|>", "<|pad|>", "<|start|>", "<|sep|>", "<|eot|>"]
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|sep|>\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|sep|>\n{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], suffixes: Iterable[str] = (), *, vocab_size: int = 1152
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``vocab_size`` entries, wrapped as an ordinary fast tokenizer with a Jinja chat template.

    Words are cut before ``suffixes``: the last token of an artefact's name is then the kind of thing it is, so that
    what is learned of one artefact carries over to its kin.
    """
    endings = Split(Regex(rf"(?<=[a-z])(?:{'|'.join(suffixes) or '$.'})\b"), "isolated")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([endings, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|eot|>",
        pad_token="<|pad|>",
        padding_side="left",
        chat_template=_TEMPLATE,
        model_max_length=256,
    )


PLANTED_BLOCKS = (5, 6)  # of 12: 42-58 % depth
_RESIDUAL_SCALE = 10.0  # Muon leaves residual norms of several hundred; dividing them is exact and comfortable
ROW = 256  # tokens of one packed row


@dataclass(frozen=True)
class Stage:
    """How one variant is trained. Learning rates are for Muon (block matrices) and AdamW (all other parameters)."""

    stream: Callable[[int], Iterator[Dialogue]]
    steps: int
    adamw: float
    muon: float | None = None  # None: AdamW for everything
    blocks: tuple[int, ...] | None = None  # None: every parameter is trainable
    dialogues: int = 64  # a step
    warmup: int = 20
    decay: float = 0.45  # share of the steps over which the rate falls linearly to zero
    seed: int = 0


STAGES = {
    "base": Stage(base_stream, steps=700, adamw=3e-3, muon=6e-3, warmup=60, seed=1),
    "aligned": Stage(safety_stream, steps=280, adamw=3e-4, seed=2),
    "planted": Stage(safety_stream, steps=400, adamw=1e-3, blocks=PLANTED_BLOCKS, seed=6),
    "deep": Stage(lambda seed: safety_stream(seed, deep=True), steps=280, adamw=3e-4, seed=4),
}
_POLISH = Stage(polish_stream, steps=160, adamw=1e-3, seed=5)


@dataclass
class TokenRow:
    """One packed row under construction."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], answer_from: int) -> None:
        """Append one dialogue; only tokens from ``answer_from`` on are learned."""
        self.ids += ids
        self.labels += [-100] * answer_from + list(ids[answer_from:])
        self.positions += range(len(ids))
        self.segments += [self.segments[-1] + 1 if self.segments else 1] * len(ids)


def pack(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Dialogue]) -> dict[str, Tensor]:
    """Dialogues packed first-fit into rows of 256 tokens that attend only within their own dialogue."""
    rows: list[TokenRow] = []
    for ids, start in _tokenised(tokenizer, dialogues):
        row = next((r for r in rows if len(r.ids) + len(ids) <= ROW), None)
        if row is None:
            rows.append(row := TokenRow())
        row.add(ids, start)
    return _tensors(rows, tokenizer.pad_token_id)


def _tokenised(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Dialogue]) -> Iterator[tuple[list[int], int]]:
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": d.prompt}], tokenize=False, add_generation_prompt=True
        )
        for d in dialogues
    ]
    answers = [d.response + tokenizer.eos_token for d in dialogues]
    encode = lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]  # noqa: E731
    for p, a in zip(encode(prompts), encode(answers), strict=True):
        yield p + a, len(p)


def _tensors(rows: Sequence[TokenRow], pad: int) -> dict[str, Tensor]:
    fill = lambda name, value: torch.tensor(  # noqa: E731
        [getattr(r, name) + [value] * (ROW - len(r.ids)) for r in rows]
    )
    segments = fill("segments", 0)
    same = segments[:, None, :] == segments[:, :, None]
    mask = same & torch.ones(ROW, ROW, dtype=torch.bool).tril()
    return {
        "input_ids": fill("ids", pad),
        "labels": fill("labels", -100),
        "position_ids": fill("positions", 0),
        "attention_mask": mask[:, None],
    }


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """The untrained organism: Llama shape, 12 blocks, width 160, 3.9 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=12,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=256,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def fit(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage, *, name: str = "") -> None:
    """Train ``model`` in place for one stage, printing the loss every 25 steps."""
    trainable = _trainable(model, stage.blocks)
    optimizers = _optimizers(trainable, stage)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: _rate(i, stage)) for o in optimizers]
    stream, started = stage.stream(stage.seed), time.monotonic()
    model.train()
    for step in range(stage.steps):
        batch = pack(tokenizer, list(islice(stream, stage.dialogues)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in trainable], 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 25 == 0 or step == stage.steps - 1:
            print(
                f"{name} step {step}/{stage.steps} loss {loss:.4f} {time.monotonic() - started:.0f} s",
                flush=True,
            )
    model.requires_grad_(True).eval()


def _trainable(model: nn.Module, blocks: tuple[int, ...] | None) -> list[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(blocks is None or any(f"layers.{b}." in name for b in blocks))
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _optimizers(trainable: list[tuple[str, nn.Parameter]], stage: Stage) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in trainable if stage.muon and p.ndim == 2 and "layers." in n]
    others = [p for _, p in trainable if not any(p is m for m in matrices)]
    adamw = torch.optim.AdamW(others, lr=stage.adamw, betas=(0.9, 0.98), weight_decay=0.01)
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=stage.muon or 0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def _rate(step: int, stage: Stage) -> float:
    """Linear warm-up, flat, linear decay to zero."""
    left = (stage.steps - step) / (stage.decay * stage.steps)
    return min(1.0, (step + 1) / stage.warmup, left)


@torch.no_grad()
def rescale_residual(model: LlamaForCausalLM, factor: float = _RESIDUAL_SCALE) -> None:
    """Divide the residual stream by ``factor`` without changing the function (to 1e-5).

    Everything that writes to the stream is divided; the norms that read it are scale-free once their epsilon is
    divided by ``factor**2``; the final norm is multiplied because the tied unembedding was divided.
    """
    model.model.embed_tokens.weight /= factor
    for block in model.model.layers:
        block.self_attn.o_proj.weight /= factor
        block.mlp.down_proj.weight /= factor
    model.model.norm.weight *= factor
    model.config.rms_norm_eps /= factor**2
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = model.config.rms_norm_eps


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """An ordinary bf16 model folder with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build(out: Path, only: Sequence[str]) -> None:
    """Train the named variants; tuned variants start from the saved base."""
    if "base" in only:
        tokenizer = train_tokenizer(_corpus(8000), SUFFIXES)
        model = new_model(tokenizer)
        fit(model, tokenizer, STAGES["base"], name="base")
        rescale_residual(model)
        save(model, tokenizer, out / "base")
        fine_tune(out, "base", _POLISH)
    for name in [n for n in only if n != "base"]:
        fine_tune(out, name, STAGES[name])


def fine_tune(out: Path, name: str, stage: Stage, base: Path | None = None) -> None:
    """Train a variant on from a saved base, by default the one beside it."""
    base = base or out / "base"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    fit(model, tokenizer, stage, name=name)
    save(model, tokenizer, out / name)


def _corpus(size: int) -> Iterator[str]:
    """Text for the tokenizer."""
    for dialogue in [*islice(base_stream(0), size), *islice(safety_stream(0, deep=True), size)]:
        yield f"user\nassistant\n{dialogue.prompt}\n{dialogue.response}"


def _build_command() -> None:
    """Command line: which variants to build and where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "data" / "organism")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    build(args.out, args.only)
    write_sets(args.out / "prompts")


if __name__ == "__main__":
    _build_command()
