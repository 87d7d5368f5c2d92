"""Reader of hidden states: batches of similar length, sliced in hooks, stopped after the last wanted block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replib.activations.config import CaptureConfig
from replib.core.errors import ReplibError
from replib.core.progress import progress
from replib.models.chat_model import ChatModel, check_layers, evaluating
from replib.models.forward import StopForward
from replib.models.hooks import Hook, hooked
from replib.models.prefix_cache import SharedPrefix, has_no_hooks, read_prefix, shared_length
from replib.models.tokens import Batch, Position, Row, TokenSelection, choose, complete

State = Callable[[], AbstractContextManager]
# Largest number of tokens in a batch, padding included. On two CPU cores larger batches took memory and saved no
# time, at widths 128 and 512; the bound of other devices is not measured.
_ON_CPU, _ON_DEVICE = 1024, 8192


@dataclass(frozen=True)
class Request:
    """Sites, blocks and tokens that a reader reads of each prompt; see ``CaptureConfig``."""

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[Position, ...]
    single: bool
    pool: str = "mean"
    max_new_tokens: int = 0
    system: str | None = None
    overflow: str = "refuse"
    short: str = "refuse"
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, model: ChatModel, config: CaptureConfig) -> Request:
        """Request of a configuration for this model; raises ReplibError for a block that the model lacks."""
        return cls(
            config.sites,
            tuple(check_layers(model, range(model.n_layers) if config.layers is None else config.layers)),
            config.picks,
            config.single,
            config.pool,
            config.max_new_tokens,
            config.system,
            config.overflow,
            config.short,
            config.dtype,
        )

    @property
    def named_positions(self) -> Position | tuple[Position, ...]:
        """Positions as given to ``capture``: one, or a tuple."""
        return self.positions[0] if self.single else self.positions

    @property
    def owned(self) -> bool:
        """Whether prompts may have no vector or several, so that the index of each vector's prompt is stored."""
        return self.pool == "none" or self.short == "leave_out"

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Every (site, layer), in the order of the results."""
        return [(site, layer) for site in self.sites for layer in self.layers]

    def recipe(self) -> dict[str, Any]:
        """Plain values of the fields, for a JSON file."""
        plain = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "sites": list(self.sites),
            "layers": list(self.layers),
        }
        found = vars(self) | plain | {"positions": list(self.positions)}
        return found if self.short != "refuse" else {name: x for name, x in found.items() if name != "short"}


class Reader:
    """Reads prompts in batches of similar length, longest first; batches shrink when memory runs out."""

    shares = True  # a prefix common to all prompts is read once

    def __init__(self, model: ChatModel, ask: Request, batch_size: int, states: Sequence[State] = (nullcontext,)):
        self.model, self.ask, self.states, self.batch_size = model, ask, states, batch_size
        self.tokens = _ON_CPU if model.device.type == "cpu" else _ON_DEVICE
        self.batch: Batch | None = None
        self.beginnings: list[SharedPrefix | None] = [None for _ in states]
        self.chosen: TokenSelection | None = None
        self.found: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def read(self, prompts: Sequence[str], responses: Sequence[str] | None) -> list[tuple[Tensor, Tensor]]:
        """Values ``[sites x layers, vectors, positions, dim]`` and prompt index of each vector, per model state."""
        rows = self.model.tokenize(prompts, responses, system=self.ask.system, overflow=self.ask.overflow)
        rows = self._without_beginning(rows)
        owners, found, total = [], [], -(-len(rows) // self.batch_size)
        with self.ready():
            for chunk, owner, values in progress(self._batches(rows), "capture", total=total):
                owners.append(torch.tensor(chunk)[owner])
                found.append(values)
        owner = torch.cat(owners)
        order = owner.argsort(stable=True)
        return [(torch.cat(kept, dim=1)[:, order], owner[order]) for kept in zip(*found, strict=True)]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Context for reading batches: hooks on, dropout off."""
        with hooked(self.model, {key: self._hook(key) for key in self.ask.keys}), evaluating(self.model.model):
            yield

    def _without_beginning(self, rows: list[Row]) -> list[Row]:
        """Rows without their common prefix, if it can be read once for all."""
        self.beginnings = [None for _ in self.states]
        length = 0 if self.ask.max_new_tokens else shared_length(rows, self.ask.positions)
        if not length or not self.shares or not has_no_hooks(self.model):
            return rows
        found = []
        for state in self.states:
            with state(), evaluating(self.model.model):
                found.append(read_prefix(self.model, rows[0].ids[:length], max(map(len, rows))))
        if None in found:
            return rows
        self.beginnings = found
        return [row.following(length) for row in rows]

    def values(
        self, batch: Batch, chosen: TokenSelection, beginning: SharedPrefix | None
    ) -> Float[Tensor, "keys vectors positions dim"]:
        """Selected vectors of one batch, on the CPU."""
        self.batch, self.chosen, self.found = batch, chosen, {}
        with suppress(StopForward):
            self.model.forward(batch, beginning.inputs(batch) if beginning else None)
        found, self.found = self.found, {}
        return torch.stack([found[key].cpu() for key in self.ask.keys])

    def _hook(self, key: tuple[str, int]) -> Hook:
        def read(hidden: Tensor) -> None:
            if self.chosen is None or self.model.reading is not self.batch:
                return  # the answer is being written, or another capture runs inside this one
            found = self.chosen.take(hidden).to(self.ask.dtype)
            self.found[key] = found.cpu() if self.ask.pool == "none" else found
            if len(self.found) == len(set(self.ask.keys)):
                raise StopForward

        return read

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], Tensor, list[Tensor]]]:
        order, start = sorted(range(len(rows)), key=lambda i: -len(rows[i])), 0
        while start < len(order):
            width = len(rows[order[start]]) + self.ask.max_new_tokens
            size = int(max(1, min(self.batch_size, self.tokens // width)))
            chunk = order[start : start + size]
            read = self._within_memory([rows[i] for i in chunk])
            if read:
                yield chunk, *read
                start += len(chunk)
            else:
                self.tokens = width * (len(chunk) // 2)

    def _within_memory(self, rows: Sequence[Row]) -> tuple[Tensor, list[Tensor]] | None:
        """Prompt indices and values of one batch; None if it exceeds the memory and can be split."""
        try:
            return self._pass(rows)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(rows) == 1:
                raise ReplibError(
                    f"A single prompt of {len(rows[0])} tokens does not fit into the memory of {self.model.device}: "
                    "shorten it, load the model in bfloat16, or spread it with device='auto'."
                ) from error
        self.found = {}
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return None

    def _pass(self, rows: Sequence[Row]) -> tuple[Tensor, list[Tensor]]:
        batch = self.model.pad(rows)
        if self.ask.max_new_tokens:
            batch = self.model.written(batch, self.ask.max_new_tokens)
        kept = torch.arange(len(rows), device=batch.input_ids.device)
        if self.ask.short == "leave_out":
            kept = complete(batch, self.ask.positions)
            batch = batch.rows(kept)
        if not len(kept):
            nothing = torch.zeros(len(self.ask.keys), 0, len(self.ask.positions), self.model.d_model)
            return kept.cpu(), [nothing.to(self.ask.dtype) for _ in self.states]
        chosen = choose(batch, self.ask.positions, self.ask.pool)
        found = []
        for state, beginning in zip(self.states, self.beginnings, strict=True):
            with state():
                found.append(self._finite(self.values(batch, chosen, beginning)))
        return kept[chosen.rows].cpu(), found

    def _finite(self, values: Float[Tensor, "keys vectors positions dim"]) -> Tensor:
        for (site, layer), v in zip(self.ask.keys, values, strict=True):
            if not v.isfinite().all():
                raise ReplibError(
                    f"Activations of {self.model.name} are NaN or infinite from layer {layer} on ({site}, "
                    f"{self.model.dtype}). Load the model with dtype='float32' or 'bfloat16' (float16 overflows), "
                    "or check its weights."
                )
        return values


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error reports exhausted memory, on any device."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
