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
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replib.activations.reader import Reader, Request, State
from replib.activations.store import SHARD, Activations, Shards, texts_of
from replib.core.errors import ReplibError
from replib.core.progress import progress
from replib.core.storage import content_hash, versions
from replib.models.chat_model import ChatModel
from replib.models.tokens import SPANS, Position, Row


class How(NamedTuple):
    """Arguments of ``capture`` that leave the vectors of a prompt unchanged."""

    responses: Sequence[str] | None = None
    batch_size: int = 64
    labels: Sequence[str] = ()


@torch.no_grad()
def capture(  # noqa: PLR0913
    model: ChatModel,
    prompts: Sequence[str],
    *,
    responses: Sequence[str] | None = None,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    positions: Position | Sequence[Position] = "last_prompt",
    pool: str = "mean",
    max_new_tokens: int = 0,
    system: str | None = None,
    overflow: str = "refuse",
    short: str = "refuse",
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    labels: Sequence[str] = (),
) -> Activations:
    """Activations of prompts (with teacher-forced or generated responses) at one site of some blocks.

    Args:
        model: the model to read; wrap the call in ``model.adapter_off()`` to read its base.
        prompts: instructions, as text; the chat template is applied here.
        responses: one text per prompt, read after it.
        site: one of ``SITES`` in `replib.models.hooks`.
        layers: block indices, default all; negative ones count from the last.
        positions: ``last_prompt``; a span (``instruction``, ``post_instruction``, ``prompt``, ``response``, ``all``);
            an integer offset from the first response token (-1 is the last prompt token, 0 the first response
            token); or a sequence of these.
        pool: "mean" averages a span over its tokens in float32; "none" returns every token of one span.
        max_new_tokens: length of a greedy answer that the model writes first, used as the response: position k is
            the state at decode step k.
        system: a system prompt before each prompt.
        overflow: "refuse" or "truncate" a prompt longer than the context.
        short: "refuse" or "leave_out" a prompt that lacks a wanted token, for example because its answer ends early.
        batch_size: largest number of prompts in one forward pass; halved when memory runs out.
        dtype: type of the result; pooling is done in float32.
        labels: one per prompt, stored with the result.

    Returns:
        Vectors on the CPU, in the order of the prompts; ``prompt`` is the index of each vector's prompt if some are
        left out.

    Raises:
        ReplibError: layer, site or position unknown, no prompts, an empty span, an answer that ends before the wanted
            token (unless left out), non-finite activations, a single prompt that exceeds the memory.
    """
    what = {"pool": pool, "max_new_tokens": max_new_tokens, "system": system, "overflow": overflow, "dtype": dtype}
    what |= {"short": short}
    ask = Request.of(model, site=site, layers=layers, positions=positions, **what)
    return _captured(model, prompts, ask, How(responses, batch_size, labels))[0][site]


def capture_sites(
    model: ChatModel, prompts: Sequence[str], sites: Sequence[str], **options: Any
) -> dict[str, Activations]:
    """Activations at several sites from one pass; same options as ``capture``."""
    return _captured(model, prompts, *parted(model, options | {"site": sites}))[0]


def capture_pair(model: ChatModel, prompts: Sequence[str], **options: Any) -> tuple[Activations, Activations]:
    """Activations with the adapter on and off, (bent, base), from the same batches in the same order.

    Same options as ``capture``; with ``max_new_tokens`` both read the answers of the bent model.

    Raises:
        ReplibError: as ``capture``; the model carries no adapter, or one merged into its weights.
    """
    if not model.adapter:
        raise ReplibError(f"{model.name} carries no adapter, so there is no pair: load it with adapter=….")
    ask, how = parted(model, options)
    bent, base = _captured(model, prompts, ask, how, [nullcontext, model.adapter_off])
    return bent[ask.sites[0]], base[ask.sites[0]]


def stream(
    model: ChatModel, prompts: Iterable[str], *, window: int = SHARD, **options: Any
) -> Iterator[Float[Tensor, "layers vectors ... dim"]]:
    """Activations of any number of prompts, yielded ``window`` prompts at a time.

    Same options as ``capture``. Pass the pieces to `Moments` for means, covariances and PCA in memory that is
    constant in the number of prompts.
    """
    ask, how = parted(model, options)
    reader = Reader(model, ask, how.batch_size)
    texts, answers = iter(prompts), iter(how.responses or ())
    while part := list(islice(texts, window)):
        values, _ = reader.read(part, list(islice(answers, window)) if how.responses else None)[0]
        yield _shaped(values, ask)[0]


def capture_to(
    model: ChatModel,
    prompts: Sequence[str],
    folder: Path | str,
    *,
    shard: int = SHARD,
    part: tuple[int, int] = (0, 1),
    **options: Any,
) -> Path:
    """Capture to a folder of shards; existing shards are reused, so an interrupted capture resumes.

    Interruptions do not change the bytes. A longer list of prompts extends an earlier capture.

    Args:
        model: as in ``capture``.
        prompts: as in ``capture``.
        folder: destination of the shards, for `Activations.load`.
        shard: number of prompts per file, and in memory at a time.
        part: (i, n): process i of n writes every n-th shard from the i-th on; `finish_capture` joins them.
        options: as in ``capture``; ``site`` may be a sequence.

    Raises:
        ReplibError: as ``capture``; the folder holds activations of another model, request or list of prompts.
    """
    ask, how = parted(model, options)
    reader, shards = Reader(model, ask, how.batch_size), Shards(Path(folder), _recipe(model, ask, shard))
    there = kept(model, prompts, folder, shard=shard, **options)  # every shard, so no part extends another capture
    wanted = list(enumerate(windows(prompts, how.responses, shard)))
    for number, (texts, answers) in progress(wanted[part[0] :: part[1]], "shards"):
        if not there[number]:
            values, owner = reader.read(texts, answers)[0]
            shards.write(number, _tensors(values, owner, ask), texts_of(_joined(texts, answers)))
    return shards.folder if part[1] > 1 else finish_capture(model, prompts, folder, shard=shard, **options)


def finish_capture(
    model: ChatModel, prompts: Sequence[str], folder: Path | str, *, shard: int = SHARD, **options: Any
) -> Path:
    """Join shards written by several processes with the same arguments; raises ReplibError if one is missing."""
    ask, how = parted(model, options)
    shards = Shards(Path(folder), _recipe(model, ask, shard))
    there = kept(model, prompts, folder, shard=shard, **options)
    if not all(there):
        missing = shards.path(there.index(False))
        raise ReplibError(f"{missing} is missing: run the capture again to write the missing shards.")
    about = provenance(model, ask, prompts, how.responses)
    return shards.finish(ask.layers, ask.named_positions, ask.sites, about, how.labels)


def kept(
    model: ChatModel, prompts: Sequence[str], folder: Path | str, *, shard: int = SHARD, **options: Any
) -> list[bool]:
    """Flags of a capture's shards: True if the shard is on disk.

    Raises ReplibError if the folder holds another model, request or list of prompts, or more prompts than given.
    """
    ask, how = parted(model, options)
    shards = Shards(Path(folder), _recipe(model, ask, shard))
    found = [shards.has(i, _joined(*window)) for i, window in enumerate(windows(prompts, how.responses, shard))]
    if shards.path(len(found)).exists():
        raise ReplibError(
            f"{folder} holds more prompts than these: choose another folder (--name), or delete that one."
        )
    return found


def parted(model: ChatModel, options: dict[str, Any]) -> tuple[Request, How]:
    """Options of ``capture``, split into the request and how to run it."""
    what = {name: value for name, value in options.items() if name not in How._fields}
    return Request.of(model, **what), How(**{name: options[name] for name in options.keys() - what.keys()})


def _captured(
    model: ChatModel, prompts: Sequence[str], ask: Request, how: How, states: Sequence[State] = (nullcontext,)
) -> list[dict[str, Activations]]:
    """Activations by site, for each state of the model."""
    read = Reader(model, ask, how.batch_size, states).read(prompts, how.responses)
    found = []
    for state, (values, owner) in zip(states, read, strict=True):
        with state():
            found.append(packed(values, owner, ask, how, provenance(model, ask, prompts, how.responses)))
    return found


def packed(values: Tensor, owner: Tensor, ask: Request, how: How, about: dict[str, str]) -> dict[str, Activations]:
    """Activations by site, from the tensors of a reader."""
    if how.labels and len(how.labels) != int(about["n"]):
        raise ReplibError(f"{about['n']} prompts, but {len(how.labels)} labels: give one label a prompt.")
    rest = (about, tuple(how.labels), owner if ask.owned else None)
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


def windows(
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
    model: ChatModel, prompts: Sequence[str], folder: Path | str, *, shard: int = SHARD, **options: Any
) -> CaptureCost:
    """Cost of ``capture_to`` with the same arguments; tokenises every prompt and runs none.

    Raises:
        ReplibError: as ``capture_to`` before its first pass; or the disk has too little room.
    """
    ask, how = parted(model, options)
    there = kept(model, prompts, folder, shard=shard, **options)
    tokens, sizes = 0, []
    for texts, answers in windows(prompts, how.responses, shard):
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
