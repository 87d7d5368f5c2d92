"""The seven places of a block that are read and edited, found by watching one short prompt pass through it.

For block i of a sequential decoder (``norm`` may stand before or after a sublayer, or both):

    resid_pre -- norm -> attn_in -- attention -- norm -> attn_out,   resid_mid  = resid_pre + attn_out
    resid_mid -- norm -> mlp_in  -- MLP       -- norm -> mlp_out,    resid_post = resid_mid + mlp_out

Names say little about where a norm stands (``post_attention_layernorm`` is the MLP's first norm in Llama and the
attention's last in Gemma-2), so the sites are found from what feeds what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from replib.core.errors import ReplibError
from replib.models.chat_model import ChatModel, evaluating

SITES = ("resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")  # in which they are passed
Hook = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class HookPoint:
    """Where a site is read: the output of a module, or its input."""

    module: nn.Module
    after: bool


LOOKING: list[dict[str, HookPoint]] = []  # stands for the sites of a model while they are looked for


@contextmanager
def hooked(model: ChatModel, hooks: Mapping[tuple[str, int], Hook]) -> Iterator[None]:
    """Call each hook with its site's tensor; what a hook returns replaces it. All hooks are gone afterwards.

    Compiled code does not see hooks that come later, so compiled models run eagerly inside.
    """
    with ExitStack() as stack:
        if _compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for (site, layer), hook in hooks.items():
            stack.callback(_register(hook_point(model, site, layer), _resting(model, hook)).remove)
        yield


def _resting(model: ChatModel, hook: Hook) -> Hook:
    """The hook, at rest while sites are looked for: that prompt is nobody's."""
    return lambda hidden: None if model.taps is LOOKING else hook(hidden)


def hook_point(model: ChatModel, site: str, layer: int) -> HookPoint:
    """Where a site of a block is.

    Raises ReplibError for an unknown site, or one that this architecture does not have.
    """
    check_site(site)
    block = model.blocks[layer]
    if site in ("resid_pre", "resid_post"):
        return HookPoint(block, site == "resid_post")
    if model.taps is None:
        model.taps = _looked_for(model)
    found = model.taps[layer].get(site)
    if found is None:
        have = ", ".join(s for s in SITES if s in model.taps[layer])
        raise ReplibError(f"{type(block).__name__} has no site {site!r}: {_REASONS[site]} It has {have}.")
    return found


def check_site(site: str) -> str:
    """The site, or an error that lists the known ones."""
    if site not in SITES:
        raise ReplibError(f"Unknown site {site!r}: use one of {', '.join(SITES)}.")
    return site


_APART = "its sublayers cannot be told apart, or do not add up to the stream."
_REASONS = {
    "resid_mid": "attention and MLP read the same stream side by side, so there is nothing between them.",
    **dict.fromkeys(("attn_in", "mlp_in", "attn_out", "mlp_out"), _APART),
}


def _compiled(model: ChatModel) -> bool:
    wrapped = hasattr(model.model, "_orig_mod")  # torch.compile(model)
    return wrapped or any(m._compiled_call_impl is not None for m in model.model.modules())  # model.compile()


def _register(at: HookPoint, hook: Hook) -> Any:
    if at.after:
        return at.module.register_forward_hook(_after(hook))
    return at.module.register_forward_pre_hook(_before(hook), with_kwargs=True)


def _before(hook: Hook) -> Callable:
    def run(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        new = hook(_stream(args, kwargs))
        if new is None:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {name: new if value is _stream(args, kwargs) else value for name, value in kwargs.items()}

    return run


def _stream(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states: the first of a module's arguments."""
    return args[0] if args else next(iter(kwargs.values()))


def _after(hook: Hook) -> Callable:
    def run(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        hidden, rest = (output, None) if isinstance(output, Tensor) else (output[0], output[1:])
        new = hook(hidden)
        return new if new is None or rest is None else (new, *rest)

    return run


@dataclass(frozen=True)
class _Call:
    """One call of a module: what went in and what came out, as it was at that moment."""

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


def _looked_for(model: ChatModel) -> list[dict[str, HookPoint]]:
    model.taps = LOOKING
    try:
        return find_hook_points(model)
    finally:
        model.taps = None


@torch.no_grad()
def find_hook_points(model: ChatModel) -> list[dict[str, HookPoint]]:
    """For each block its sites, from one pass of a short prompt. Works without weights (on the meta device) too."""
    calls: dict[nn.Module, list[_Call]] = {block: [] for block in model.blocks}
    with ExitStack() as stack, evaluating(model.model):
        if _compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for block, seen in calls.items():
            for module in [*block.children(), block]:
                stack.callback(module.register_forward_hook(_record(seen), with_kwargs=True).remove)
        nowhere = all(p.is_meta for p in model.model.parameters()) and not hasattr(model.causal_lm, "hf_device_map")
        where = torch.device("meta") if nowhere else model.device
        model.model(**model.encode(["a b"]).to(where).inputs(), use_cache=False)
    return [_sites(seen) for seen in calls.values()]


def _record(seen: list[_Call]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        taken, given = _stream(args, kwargs), output if isinstance(output, Tensor) else output[0]
        if isinstance(taken, Tensor) and isinstance(given, Tensor):
            seen.append(_Call(module, _copy(taken), _copy(given)))

    return hook


def _copy(x: Tensor) -> Tensor:
    return x if x.is_meta else x.clone()  # blocks may add in place afterwards; without values the tensor itself tells


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (not a.is_meta and a.shape == b.shape and torch.equal(a, b.to(a.device, a.dtype)))


def _sites(calls: list[_Call]) -> dict[str, HookPoint]:
    *parts, block = calls
    found = {"resid_pre": HookPoint(block.module, False), "resid_post": HookPoint(block.module, True)}
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
    """The norm that the output of a sublayer goes through before it is added, or the sublayer itself."""
    return next((c for c in small if _same(c.taken, call.given)), call)


def _adds_up(block: _Call, middle: Tensor, attn: Tensor, mlp: Tensor, *, side_by_side: bool) -> bool:
    if block.taken.is_meta:
        return True
    before = block.taken.to(attn.device)
    whole = _near(before + attn + mlp, block.given, attn + mlp)
    return whole and (side_by_side or _near(before + attn, middle, attn))


def _near(sum_: Tensor, stream: Tensor, added: Tensor) -> bool:
    """Whether a sum is the stream in every token, but for rounding: measured by what was added to it.

    The stream itself would be too long a measure: single coordinates of it can be a thousand times the others.
    """
    length = lambda x: x.float().norm(dim=-1)  # noqa: E731
    allowed = 0.02 * length(added) + 2 * torch.finfo(stream.dtype).eps * length(stream)
    return bool((length(sum_.float() - stream.float()) <= allowed).all())
