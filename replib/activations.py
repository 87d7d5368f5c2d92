"""Capture activations with plain hooks: sliced in the hook, stopped after the last wanted block, kept in safetensors.

Sites of block i: ``resid_pre`` (its input), ``resid_post`` (its output, before the final norm), ``attn_out`` and
``mlp_out`` (what its two sublayers add to the stream).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from replib.chat import Batch, ChatModel, evaluating
from replib.errors import ReplibError
from replib.progress import progress
from replib.prompts import content_hash

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
SPANS = ("last_prompt", "post_instruction", "prompt", "response", "all")
Position = str | int
Hook = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Activations:
    """Vectors of prompts at layers, with everything needed to know where they came from."""

    values: Float[Tensor, "layers prompts ... dim"]
    """One vector a prompt; with several positions, ``[layers, prompts, positions, dim]``."""
    layers: tuple[int, ...]
    positions: Position | tuple[Position, ...]
    site: str
    provenance: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, layer: int) -> Float[Tensor, "prompts ... dim"]:
        """Vectors of one block, by its index (negative: from the end of the captured ones)."""
        if layer < 0:
            return self.values[layer]
        if layer not in self.layers:
            raise ReplibError(f"Layer {layer} was not captured; captured: {list(self.layers)}.")
        return self.values[self.layers.index(layer)]

    def __len__(self) -> int:
        return self.values.shape[1]

    def save(self, path: Path | str) -> Path:
        """One safetensors file with JSON metadata, written under another name and then renamed."""
        path = Path(path)
        about = {
            "layers": self.layers,
            "positions": self.positions,
            "site": self.site,
            "provenance": self.provenance,
        }
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"values": self.values.contiguous()}, partial, metadata={"replib": json.dumps(about)})
            os.replace(partial, path)
        except OSError as error:
            raise ReplibError(f"Cannot write {path}: {error.strerror}. Set REPLIB_OUT to a folder you own.") from error
        return path

    @classmethod
    def load(cls, path: Path | str) -> Activations:
        """Read back what ``save`` wrote."""
        if not Path(path).exists():
            raise ReplibError(f"There is no activation file {path}. Capture first, then save.")
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["replib"])
            positions = about["positions"]
            return cls(
                file.get_tensor("values"),
                tuple(about["layers"]),
                tuple(positions) if isinstance(positions, list) else positions,
                about["site"],
                about["provenance"],
            )


@torch.no_grad()
def capture(
    model: ChatModel,
    prompts: Sequence[str],
    *,
    responses: Sequence[str] | None = None,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    positions: Position | Sequence[Position] = "last_prompt",
    batch_size: int = 64,
) -> Activations:
    """Activations of prompts (with teacher-forced responses, if given) at one site of some blocks.

    Args:
        model: what to read; wrap the call in ``model.adapter_off()`` to read its base.
        prompts: instructions, as text; the chat template is applied here.
        responses: what follows each prompt.
        site: one of ``SITES``.
        layers: block indices, default all; negative ones count from the last.
        positions: ``last_prompt``, the mean over a span (``post_instruction``, ``prompt``, ``response``, ``all``),
            an integer counted from the end of the prompt (-1 is its last token), or a sequence of these.
        batch_size: prompts in one forward pass.

    Returns:
        float32 vectors on the CPU, in the order of the prompts.

    Raises:
        ReplibError: layer, site or position unknown, no prompts, an empty span, non-finite activations.
    """
    wanted = check_layers(model, range(model.n_layers) if layers is None else layers)
    single = isinstance(positions, str | int)
    picks = check_positions([positions] if isinstance(positions, str | int) else list(positions))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[Tensor] = []
    starts = range(0, len(order), batch_size) if prompts else [0]
    for start in progress(starts, "capture"):
        chunk = order[start : start + batch_size]
        batch = model.encode([prompts[i] for i in chunk], responses and [responses[i] for i in chunk])
        found.append(_read(model, batch, site, wanted, picks))
    values = torch.cat(found, dim=1)[:, torch.tensor(order).argsort()]
    _check_finite(values, wanted, model)
    about = model.provenance() | versions() | {"prompts": content_hash(list(prompts)), "n": str(len(prompts))}
    shape = picks[0] if single else tuple(picks)
    return Activations(values[:, :, 0] if single else values, tuple(wanted), shape, site, about)


def versions() -> dict[str, str]:
    """Library versions that a result carries."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def check_layers(model: ChatModel, layers: Sequence[int] | range) -> list[int]:
    """Layers as indices from 0, or an error that names the range."""
    bad = [i for i in layers if not -model.n_layers <= i < model.n_layers]
    if bad or not len(layers):
        raise ReplibError(
            f"Layer {bad[0] if bad else '(none)'} is not in {model.name}: it has {model.n_layers} blocks, "
            f"0 to {model.n_layers - 1} (or -1 to {-model.n_layers} from the end)."
        )
    return [i % model.n_layers for i in layers]


def check_positions(positions: Sequence[Position]) -> list[Position]:
    """Positions as they are, or an error that lists the known ones."""
    for p in positions:
        if (isinstance(p, str) and p not in SPANS) or (isinstance(p, int) and p >= 0):
            raise ReplibError(f"Unknown position {p!r}: use {', '.join(SPANS)}, or a negative integer.")
    return list(positions)


class _Enough(Exception):
    """The last wanted activation has been read; the rest of the forward pass is not needed."""


def _read(model: ChatModel, batch: Batch, site: str, layers: list[int], picks: Sequence[Position]) -> Tensor:
    found: dict[int, Tensor] = {}

    def reader(layer: int) -> Hook:
        def read(hidden: Tensor) -> None:
            found[layer] = torch.stack([pick(hidden, batch, p) for p in picks], dim=1).float().cpu()
            if len(found) == len(set(layers)):
                raise _Enough

        return read

    with hooked(model, {(site, i): reader(i) for i in set(layers)}), evaluating(model.model), suppress(_Enough):
        model.forward(batch)
    return torch.stack([found[i] for i in layers])


def pick(hidden: Float[Tensor, "rows tokens dim"], batch: Batch, position: Position) -> Float[Tensor, "rows dim"]:
    """One vector a row: the token at an integer position, or the float32 mean over a span."""
    if position == "last_prompt":
        position = -1
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    if isinstance(position, int):
        column = batch.last_prompt + position + 1
        if (column < 0).any() or not batch.attention_mask[rows, column].all():
            raise ReplibError(f"Position {position} lies before the start of a prompt: prompts are shorter than that.")
        return hidden[rows, column]
    mask = span(batch, position).to(hidden.device)
    if not mask.any(dim=1).all():
        raise ReplibError(f"The span {position!r} of a row is empty: give responses, or read another position.")
    return (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def span(batch: Batch, name: str) -> Tensor:
    """The token mask of a named span."""
    return {
        "post_instruction": batch.post_mask,
        "prompt": batch.prompt_mask,
        "response": batch.response_mask,
        "all": batch.attention_mask.bool(),
    }[name]


def _check_finite(values: Tensor, layers: Sequence[int], model: ChatModel) -> None:
    broken = [layer for layer, v in zip(layers, values, strict=True) if not v.isfinite().all()]
    if broken:
        raise ReplibError(
            f"Activations of {model.name} are NaN or infinite from layer {broken[0]} on ({model.dtype}). "
            "Load the model with dtype='float32' or 'bfloat16' (float16 overflows), or check its weights."
        )


# --------------------------------------------------------------------------------------------- hooks
@contextmanager
def hooked(model: ChatModel, hooks: dict[tuple[str, int], Hook]) -> Iterator[None]:
    """Call each hook with its site's tensor; what a hook returns replaces it. All hooks are gone afterwards."""
    with ExitStack() as stack:
        for (site, layer), hook in hooks.items():
            stack.callback(_register(model, site, layer, hook).remove)
        yield


def _register(model: ChatModel, site: str, layer: int, hook: Hook) -> Any:
    block = model.blocks[layer]
    if site == "resid_pre":
        return block.register_forward_pre_hook(_before(hook), with_kwargs=True)
    return _module(block, site).register_forward_hook(_after(hook))


def _module(block: nn.Module, site: str) -> nn.Module:
    """The block itself, or its attention or feed-forward child, found by name."""
    if site == "resid_post":
        return block
    names = {"attn_out": ("attn", "attention"), "mlp_out": ("mlp", "feed_forward", "moe", "ffn")}.get(site)
    if names is None:
        raise ReplibError(f"Unknown site {site!r}: use one of {', '.join(SITES)}.")
    found = [
        child
        for name, child in block.named_children()
        if any(k in name.lower() for k in names)
        and any(p.ndim > 1 for p in child.parameters())  # not a norm, not dropout
    ]
    if len(found) != 1:
        raise ReplibError(f"{type(block).__name__} has {len(found)} children named like {names[0]!r}, not one.")
    return found[0]


def _before(hook: Hook) -> Callable:
    def run(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        by_name = not args
        new = hook(kwargs["hidden_states"] if by_name else args[0])
        if new is None:
            return None
        return (args, kwargs | {"hidden_states": new}) if by_name else ((new, *args[1:]), kwargs)

    return run


def _after(hook: Hook) -> Callable:
    def run(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        hidden, rest = (output, None) if isinstance(output, Tensor) else (output[0], output[1:])
        new = hook(hidden)
        return new if new is None or rest is None else (new, *rest)

    return run
