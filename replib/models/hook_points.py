"""Seven hook points of a decoder block, detected from one short forward pass.

For block i of a sequential decoder (``norm`` may stand before or after a sublayer, or both):

    resid_pre -- norm -> attn_in -- attention -- norm -> attn_out,   resid_mid  = resid_pre + attn_out
    resid_mid -- norm -> mlp_in  -- MLP       -- norm -> mlp_out,    resid_post = resid_mid + mlp_out

Names do not determine the place of a norm (``post_attention_layernorm`` is the MLP's first norm in Llama and the
attention's last in Gemma-2), so detection compares the output of each module with the input of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HookPoint:
    """Module of a site; ``after`` is True for its output, False for its input."""

    module: nn.Module
    after: bool


def first_argument(args: tuple, kwargs: dict) -> Tensor:
    """Hidden states passed to a module, positionally or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


@dataclass(frozen=True)
class _Call:
    """One call of a module, with copies of its input and output."""

    module: nn.Module
    taken: Tensor
    given: Tensor

    @property
    def is_matrix(self) -> bool:
        """Attention or MLP, rather than a norm or dropout."""
        return any(p.ndim > 1 for p in self.module.parameters())

    @property
    def is_attention(self) -> bool:
        return self.is_matrix and "attention" in type(self.module).__name__.lower()


@torch.no_grad()
def find_hook_points(
    model: nn.Module, blocks: Sequence[nn.Module], inputs: Mapping[str, Tensor]
) -> list[dict[str, HookPoint]]:
    """Hook points of each block by site, from one forward pass of ``inputs``.

    If the pass fails on the meta device, for example because experts are routed by value, each block has its input
    and output alone.
    """
    calls: dict[nn.Module, list[_Call]] = {block: [] for block in blocks}
    with ExitStack() as stack:
        if is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for block, seen in calls.items():
            for module in [*block.children(), block]:
                stack.callback(module.register_forward_hook(_record(seen), with_kwargs=True).remove)
        try:
            model(**inputs, use_cache=False)
        except (NotImplementedError, RuntimeError):
            if not all(x.is_meta for x in inputs.values()):
                raise
            return [_stream_points(block) for block in blocks]
    return [_sites(seen) for seen in calls.values()]


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile(model)`` or ``model.compile()`` was called on a model or on a part of it."""
    return hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())


def _stream_points(block: nn.Module) -> dict[str, HookPoint]:
    return {"resid_pre": HookPoint(block, False), "resid_post": HookPoint(block, True)}


def _record(seen: list[_Call]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        taken, given = first_argument(args, kwargs), output if isinstance(output, Tensor) else output[0]
        if isinstance(taken, Tensor) and isinstance(given, Tensor):
            seen.append(_Call(module, _copy(taken), _copy(given)))

    return hook


def _copy(x: Tensor) -> Tensor:
    return x if x.is_meta else x.clone()  # blocks may later add in place; meta tensors are compared by identity


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (not a.is_meta and a.shape == b.shape and torch.equal(a, b.to(a.device, a.dtype)))


def _sites(calls: list[_Call]) -> dict[str, HookPoint]:
    *parts, block = calls
    found = _stream_points(block.module)
    attention = [c for c in parts if c.is_attention]
    mlp = [c for c in parts if c.is_matrix and not c.is_attention]
    small = [c for c in parts if not c.is_matrix]
    if not attention or not mlp:
        return found
    found |= {"attn_in": HookPoint(attention[0].module, False), "mlp_in": HookPoint(mlp[0].module, False)}
    stream = next((c for c in small if _same(c.given, mlp[0].taken)), mlp[0])  # the MLP's first norm, or none
    attn_out, mlp_out = _last(attention[-1], small), _last(mlp[-1], small)
    side_by_side = any(_same(stream.taken, x) for x in (block.taken, attention[0].taken))
    middle = block.taken if side_by_side else stream.taken
    if not side_by_side:
        found["resid_mid"] = HookPoint(stream.module, False)
    if _adds_up(block, middle, attn_out.given, mlp_out.given, side_by_side=side_by_side):
        found |= {"attn_out": HookPoint(attn_out.module, True), "mlp_out": HookPoint(mlp_out.module, True)}
    return found


def _last(call: _Call, small: list[_Call]) -> _Call:
    """Norm between a sublayer's output and the addition, or the sublayer itself."""
    return next((c for c in small if _same(c.taken, call.given)), call)


def _adds_up(block: _Call, middle: Tensor, attn: Tensor, mlp: Tensor, *, side_by_side: bool) -> bool:
    if block.taken.is_meta:
        return True
    before = block.taken.to(attn.device)
    whole = _near(before + attn + mlp, block.given, attn + mlp)
    return whole and (side_by_side or _near(before + attn, middle, attn))


def _near(sum_: Tensor, stream: Tensor, added: Tensor) -> bool:
    """Whether a sum equals the stream at every token up to rounding, relative to the norm of the added part.

    The norm of the stream is too large a scale: single coordinates can be a thousand times the others.
    """
    length = lambda x: x.float().norm(dim=-1)  # noqa: E731
    allowed = 0.02 * length(added) + 2 * torch.finfo(stream.dtype).eps * length(stream)
    return bool((length(sum_.float() - stream.float()) <= allowed).all())
