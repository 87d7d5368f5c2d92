"""Activations of prompts at chosen sites, layers and positions, read with forward hooks.

``capture`` returns them in memory, ``capture_pair`` reads a bent model and its base, ``stream`` yields one window of
prompts at a time, ``capture_to`` writes shards to a folder and resumes an interrupted capture.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replib.activations.config import CaptureConfig
from replib.activations.reader import Reader, Request, State
from replib.activations.store import SHARD, Activations, Shards, texts_of
from replib.core.errors import ReplibError
from replib.core.progress import progress
from replib.core.storage import content_hash, versions
from replib.models.chat_model import ChatModel
from replib.models.tokens import SPANS, Row


@torch.no_grad()
def capture(
    model: ChatModel,
    prompts: Sequence[str],
    config: CaptureConfig | None = None,
    *,
    responses: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    **changes: Any,
) -> Activations:
    """Activations of prompts (with teacher-forced or generated responses) at one site of some blocks.

    Args:
        model: the model to read; inside ``model.adapter_off()`` its base is read.
        prompts: instructions, as text; the chat template is applied here.
        config: sites, blocks, tokens and batch size; default ``CaptureConfig()``.
        responses: one text per prompt, read after it.
        labels: one per prompt, stored with the result.
        changes: single fields of the configuration, for example ``layers=[5]``.

    Returns:
        Vectors on the CPU, in the order of the prompts; ``prompt`` indexes the prompt of each if some are left out.

    Raises:
        ReplibError: layer, site, position or option unknown, no prompts, an empty span, an answer that ends before the
            wanted token (unless left out), non-finite activations, a single prompt that exceeds the memory.
    """
    config = CaptureConfig.of(config, changes)
    return _captured(model, prompts, config, responses, labels)[0][config.sites[0]]


def capture_sites(
    model: ChatModel, prompts: Sequence[str], sites: Sequence[str], **options: Any
) -> dict[str, Activations]:
    """Activations at several sites from one pass; same options as ``capture``."""
    responses, labels = options.pop("responses", None), options.pop("labels", ())
    return _captured(model, prompts, CaptureConfig.of(None, options | {"site": sites}), responses, labels)[0]


def capture_pair(
    model: ChatModel,
    prompts: Sequence[str],
    config: CaptureConfig | None = None,
    *,
    responses: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    **changes: Any,
) -> tuple[Activations, Activations]:
    """Activations with the adapter on and off, (bent, base), from the same batches in the same order.

    Same arguments as ``capture``; with ``max_new_tokens`` both read the answers of the bent model.

    Raises:
        ReplibError: as ``capture``; the model carries no adapter, or one merged into its weights.
    """
    if not model.adapter:
        raise ReplibError(f"{model.name} carries no adapter, so there is no pair: load it with adapter=….")
    config = CaptureConfig.of(config, changes)
    bent, base = _captured(model, prompts, config, responses, labels, [nullcontext, model.adapter_off])
    return bent[config.sites[0]], base[config.sites[0]]


def stream(
    model: ChatModel,
    prompts: Iterable[str],
    config: CaptureConfig | None = None,
    *,
    window: int = SHARD,
    responses: Iterable[str] | None = None,
    **changes: Any,
) -> Iterator[Float[Tensor, "layers vectors ... dim"]]:
    """Activations of any number of prompts, yielded ``window`` prompts at a time.

    Same options as ``capture``. Pass the pieces to `Moments` for means, covariances and PCA in memory that is
    constant in the number of prompts.
    """
    config = CaptureConfig.of(config, changes)
    reader = Reader(model, ask := Request.of(model, config), config.batch_size)
    texts, answers = iter(prompts), iter(responses or ())
    while part := list(islice(texts, window)):
        values, _ = reader.read(part, list(islice(answers, window)) if responses else None)[0]
        yield _shaped(values, ask)[0]


def capture_to(
    model: ChatModel,
    prompts: Sequence[str],
    folder: Path | str,
    config: CaptureConfig | None = None,
    *,
    responses: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    shard: int = SHARD,
    part: tuple[int, int] = (0, 1),
    **changes: Any,
) -> Path:
    """Capture to a folder of shards; existing shards are reused, so an interrupted capture resumes.

    Interruptions do not change the bytes. A longer list of prompts extends an earlier capture.

    Args:
        model: as in ``capture``.
        prompts: as in ``capture``.
        folder: destination of the shards, for `Activations.load`.
        shard: number of prompts per file, and in memory at a time.
        part: (i, n): process i of n writes every n-th shard from the i-th on; `finish_capture` joins them.
        config, responses, labels, changes: as in ``capture``; ``site`` may be several.

    Raises:
        ReplibError: as ``capture``; the folder holds activations of another model, request or list of prompts.
    """
    config = CaptureConfig.of(config, changes)
    ask = Request.of(model, config)
    reader, shards = Reader(model, ask, config.batch_size), Shards(Path(folder), _recipe(model, ask, shard))
    there = _on_disk(shards, prompts, responses, shard)  # every shard, so no part extends another capture
    wanted = list(enumerate(_windows(prompts, responses, shard)))
    for number, (texts, answers) in progress(wanted[part[0] :: part[1]], "shards"):
        if not there[number]:
            values, owner = reader.read(texts, answers)[0]
            shards.write(number, _tensors(values, owner, ask), texts_of(_joined(texts, answers)))
    if part[1] > 1:
        return shards.folder
    return finish_capture(model, prompts, folder, config, responses=responses, labels=labels, shard=shard)


def finish_capture(
    model: ChatModel,
    prompts: Sequence[str],
    folder: Path | str,
    config: CaptureConfig | None = None,
    *,
    responses: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    shard: int = SHARD,
    **changes: Any,
) -> Path:
    """Join shards written by several processes with the same arguments; raises ReplibError if one is missing."""
    ask = Request.of(model, CaptureConfig.of(config, changes))
    shards = Shards(Path(folder), _recipe(model, ask, shard))
    there = _on_disk(shards, prompts, responses, shard)
    if not all(there):
        missing = shards.path(there.index(False))
        raise ReplibError(f"{missing} is missing: run the capture again to write the missing shards.")
    return shards.finish(ask.layers, ask.named_positions, ask.sites, provenance(model, ask, prompts, responses), labels)


def _on_disk(shards: Shards, prompts: Sequence[str], responses: Sequence[str] | None, shard: int) -> list[bool]:
    """Whether each shard of a capture is on disk.

    Raises ReplibError if the folder holds another model, request or list of prompts, or more prompts than given.
    """
    there = [shards.has(i, _joined(*window)) for i, window in enumerate(_windows(prompts, responses, shard))]
    if shards.path(len(there)).exists():
        raise ReplibError(
            f"{shards.folder} holds more prompts than these: choose another folder (--name), or delete that one."
        )
    return there


def _captured(
    model: ChatModel,
    prompts: Sequence[str],
    config: CaptureConfig,
    responses: Sequence[str] | None,
    labels: Sequence[str],
    states: Sequence[State] = (nullcontext,),
) -> list[dict[str, Activations]]:
    """Activations by site, for each state of the model."""
    ask = Request.of(model, config)
    read = Reader(model, ask, config.batch_size, states).read(prompts, responses)
    found = []
    for state, (values, owner) in zip(states, read, strict=True):
        with state():
            found.append(activations_of(values, owner, ask, labels, provenance(model, ask, prompts, responses)))
    return found


def activations_of(
    values: Tensor, owner: Tensor, ask: Request, labels: Sequence[str], about: dict[str, str]
) -> dict[str, Activations]:
    """Activations by site, made of the tensors of a reader."""
    if labels and len(labels) != int(about["n"]):
        raise ReplibError(f"{about['n']} prompts, but {len(labels)} labels: give one label per prompt.")
    rest = (about, tuple(labels), owner if ask.owned else None)
    by_site = zip(ask.sites, _shaped(values, ask), strict=True)
    return {site: Activations(v, ask.layers, ask.named_positions, site, *rest) for site, v in by_site}


def _shaped(values: Tensor, ask: Request) -> Float[Tensor, "sites layers vectors ... dim"]:
    values = values.unflatten(0, (len(ask.sites), len(ask.layers)))
    return values[:, :, :, 0] if ask.single else values


def _tensors(values: Tensor, owner: Tensor, ask: Request) -> dict[str, Tensor]:
    named = zip(ask.keys, values[:, :, 0] if ask.single else values, strict=True)
    return {f"{site}.{layer}": v for (site, layer), v in named} | ({"prompt": owner} if ask.owned else {})


def provenance(
    model: ChatModel, ask: Request, prompts: Sequence[str], responses: Sequence[str] | None
) -> dict[str, str]:
    """Provenance of a result: model, adapter, template, request, prompts, versions."""
    what = {name: str(value) for name, value in ask.recipe().items() if name not in ("layers", "single")}
    what["stored"] = what.pop("dtype")
    texts = {"prompts": content_hash(list(prompts)), "n": str(len(prompts))}
    answers = {"responses": content_hash(list(responses))} if responses else {}
    return model.provenance() | versions() | what | texts | answers


def _recipe(model: ChatModel, ask: Request, shard: int) -> dict[str, Any]:
    """Everything but the prompts that determines the bytes of a shard; names of folders are left out."""
    by_content = {k: v for k, v in model.provenance().items() if k not in ("model", "adapter", "dtype")}
    return by_content | versions() | ask.recipe() | {"shard": shard, "weights": str(model.dtype)}


def _windows(
    prompts: Sequence[str], responses: Sequence[str] | None, size: int
) -> Iterator[tuple[Sequence[str], Sequence[str] | None]]:
    """Consecutive slices of ``size`` prompts, with their responses."""
    for start in range(0, len(prompts), size) if prompts else [0]:
        rows = slice(start, start + size)
        yield prompts[rows], responses and responses[rows]


def _joined(prompts: Sequence[str], responses: Sequence[str] | None) -> list[str]:
    return list(prompts) if not responses else [f"{p}\0{r}" for p, r in zip(prompts, responses, strict=True)]


@dataclass(frozen=True)
class CaptureCost:
    """Size of a capture, and the part already on disk."""

    prompts: int
    tokens: int
    """Tokens of prompts and given responses."""
    written: int
    """Upper bound on the tokens that the model writes."""
    size: int
    """Bytes of all tensors; an upper bound if tokens of written answers are stored."""
    missing: int
    """Bytes not on disk yet."""
    shards: int
    there: int

    def __str__(self) -> str:
        written = f" + at most {self.written:,} written" if self.written else ""
        size = f"{'at most ' if self.written else ''}{self.size / 1e9:.3g} GB on disk"
        shards = f"{self.shards} shard{'' if self.shards == 1 else 's'}, {self.there} of them there already"
        return f"{self.prompts:,} prompts, {self.tokens:,} tokens{written}, {size} in {shards}"


def capture_cost(
    model: ChatModel,
    prompts: Sequence[str],
    folder: Path | str,
    config: CaptureConfig | None = None,
    *,
    responses: Sequence[str] | None = None,
    shard: int = SHARD,
    **changes: Any,
) -> CaptureCost:
    """Cost of ``capture_to`` with the same arguments; tokenises every prompt and runs none.

    Raises:
        ReplibError: as ``capture_to`` before its first pass; or the disk has too little room.
    """
    ask = Request.of(model, CaptureConfig.of(config, changes))
    there = _on_disk(Shards(Path(folder), _recipe(model, ask, shard)), prompts, responses, shard)
    tokens, sizes = 0, []
    for texts, answers in _windows(prompts, responses, shard):
        rows = model.tokenize(texts, answers, system=ask.system, overflow=ask.overflow)
        tokens += sum(map(len, rows))
        sizes.append(_bytes(rows, ask, model.d_model))
    missing = sum(size for size, done in zip(sizes, there, strict=True) if not done)
    _check_room(Path(folder), missing)
    written = ask.max_new_tokens * len(prompts)
    return CaptureCost(len(prompts), tokens, written, sum(sizes), missing, len(there), sum(there))


def _bytes(rows: Sequence[Row], ask: Request, width: int) -> int:
    """Bytes of the tensors of one shard; an upper bound if the model writes the answers."""
    vector = len(ask.keys) * width * ask.dtype.itemsize
    if ask.pool == "none":
        span = str(ask.positions[0])
        written = ask.max_new_tokens if span in ("response", "all") else 0
        return sum(len(SPANS[span].of_row(row)) + written for row in rows) * (vector + 8)  # plus int64 prompt index
    return len(rows) * len(ask.positions) * vector


def _check_room(folder: Path, missing: int) -> None:
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise ReplibError(
            f"{missing / 1e9:.3g} GB are still to be written, but {existing} has room for {free / 1e9:.3g} GB: "
            "capture fewer layers, positions or prompts, store bfloat16, or choose another disk with REPLIB_OUT."
        )
