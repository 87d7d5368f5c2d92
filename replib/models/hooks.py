"""Hooks that read or replace hidden states at the seven hook points of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from replib.core.errors import ReplibError
from replib.models.chat_model import ChatModel
from replib.models.hook_points import HookPoint, first_argument, is_compiled

SITES = ("resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")  # in the order of a pass
Hook = Callable[[Tensor], Tensor | None]


@contextmanager
def hooked(model: ChatModel, hooks: Mapping[tuple[str, int], Hook]) -> Iterator[None]:
    """Call each hook with its site's tensor, replaced by the hook's result if any; hooks are removed on exit.

    Compiled code ignores hooks registered later, so compiled models run eagerly inside.
    """
    with ExitStack() as stack:
        if is_compiled(model.model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for (site, layer), hook in hooks.items():
            stack.callback(_register(hook_point(model, site, layer), hook).remove)
        yield


def hook_point(model: ChatModel, site: str, layer: int) -> HookPoint:
    """Hook point of a site of a block.

    Raises ReplibError for an unknown site, or one that this architecture lacks.
    """
    check_site(site)
    points = model.hook_points[layer]
    if site not in points:
        have = ", ".join(s for s in SITES if s in points)
        name = type(model.blocks[layer]).__name__
        raise ReplibError(f"{name} has no site {site!r}: {_REASONS[site]} It has {have}.")
    return points[site]


def check_site(site: str) -> str:
    """Site unchanged; raises ReplibError for an unknown one."""
    if site not in SITES:
        raise ReplibError(f"Unknown site {site!r}: use one of {', '.join(SITES)}.")
    return site


_APART = "its sublayers cannot be told apart, or do not add up to the stream."
_REASONS = {
    "resid_mid": "attention and MLP read the same stream side by side, so no stream lies between them.",
    **dict.fromkeys(("attn_in", "mlp_in", "attn_out", "mlp_out"), _APART),
}


def _register(at: HookPoint, hook: Hook) -> Any:
    if at.after:
        return at.module.register_forward_hook(_after(hook))
    return at.module.register_forward_pre_hook(_before(hook), with_kwargs=True)


def _before(hook: Hook) -> Callable:
    def run(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        new = hook(first_argument(args, kwargs))
        if new is None:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {name: new if value is first_argument(args, kwargs) else value for name, value in kwargs.items()}

    return run


def _after(hook: Hook) -> Callable:
    def run(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        hidden, rest = (output, None) if isinstance(output, Tensor) else (output[0], output[1:])
        new = hook(hidden)
        return new if new is None or rest is None else (new, *rest)

    return run
