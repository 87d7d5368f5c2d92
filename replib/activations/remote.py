"""Capture through nnsight: traced locally, or on NDIF for larger models.

No other module imports nnsight (0.8), whose interface changes with every minor version. NDIF runs the main revision
of a public model, in a dtype of its choice, without local adapters. NDIF_API_KEY holds its key.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from replib.activations.capture import activations_of, provenance
from replib.activations.config import CaptureConfig
from replib.activations.reader import Reader, Request
from replib.activations.store import Activations
from replib.core.errors import ReplibError
from replib.models.chat_model import ChatModel
from replib.models.hooks import SITES, hook_point
from replib.models.load import _config, _template, _tokenizer
from replib.models.prefix_cache import SharedPrefix
from replib.models.tokens import Batch, TokenSelection

_KEY = "NDIF_API_KEY"
Where = Literal["local"] | bool


def trace_capture(
    model: ChatModel,
    prompts: Sequence[str],
    config: CaptureConfig | None = None,
    *,
    responses: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    remote: Where = False,
    **changes: Any,
) -> Activations:
    """Activations of prompts through nnsight; arguments and result are those of ``capture``.

    Args:
        model: as for ``capture``; for NDIF an `outline` is enough.
        prompts: as for ``capture``.
        remote: False traces in this process; True runs on NDIF and returns the wanted positions alone; "local"
            packs the request as for NDIF and runs it here on freshly loaded weights, as a rehearsal.
        config, responses, labels, changes: as for ``capture``; the default batch is 16 prompts.

    Raises:
        ReplibError: as `capture`; nnsight or the key is absent; NDIF cannot load this model, or fails;
            ``max_new_tokens`` is given with ``remote``.
    """
    config = CaptureConfig.of(config or CaptureConfig(batch_size=16), changes)
    ask = Request.of(model, config)
    if remote and ask.max_new_tokens:
        raise ReplibError("Answers are not written remotely: write them first and pass them as responses=….")
    values, owner = TraceReader(model, ask, config.batch_size, remote).read(prompts, responses)[0]
    about = provenance(model, ask, prompts, responses) | _where(remote)
    return activations_of(values, owner, ask, labels, about)[ask.sites[0]]


class TraceReader(Reader):
    """Reader that traces through nnsight instead of hooks."""

    shares = False  # a trace reads whole prompts

    def __init__(self, model: ChatModel, ask: Request, batch_size: int, remote: Where):
        super().__init__(model, ask, batch_size)
        self.remote, self.tracer = remote, None
        self.order = sorted(set(ask.keys), key=lambda key: (key[1], SITES.index(key[0])))  # order of execution
        self.places = _places(model, self.order)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Context for reading batches: nnsight wraps the model."""
        with _traced(self.model, self.remote) as self.tracer:
            yield

    def values(
        self,
        batch: Batch,
        chosen: TokenSelection,
        beginning: SharedPrefix | None,  # noqa: ARG002
    ) -> Float[Tensor, "keys vectors positions dim"]:
        """Selected vectors of one batch, from one traced forward pass."""
        found = _read(self.tracer, self.places, _weights(batch, chosen), batch, remote=self.remote)
        return found[[self.order.index(key) for key in self.ask.keys]].to(self.ask.dtype)


class Outline(ChatModel):
    """Chat model without weights, for requests to NDIF: it formats prompts and names blocks."""

    @property
    def device(self) -> torch.device:
        """The CPU, for the batches; there are no weights."""
        return torch.device("cpu")

    def provenance(self) -> dict[str, str]:
        """Provenance known without the weights."""
        return {"model": self.name, "revision": self.revision or "", "adapter": "", "dtype": ""}


def outline(name: str) -> Outline:
    """Architecture, tokenizer and template of a Hugging Face id, for `trace_capture(..., remote=True)`."""
    from transformers import AutoModelForCausalLM

    config = _config(name, None)
    tokenizer = _tokenizer(name, None)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    return Outline(empty.eval(), tokenizer, name=name, template=_template(tokenizer, "auto", name))


def _read(
    tracer: Any, places: Sequence[tuple[str, bool]], wanted: Tensor, batch: Batch, *, remote: Where
) -> Float[Tensor, "keys vectors positions dim"]:
    """One traced forward pass. The body runs on the host of the model, so it uses torch and plain values only."""
    modules = [(tracer.get(path), after) for path, after in places]
    inputs = batch.inputs() | {"use_cache": False}
    with torch.no_grad(), _failures(), tracer.trace(inputs, remote=remote) as run:
        values = []
        for module, after in modules:
            seen = module.output if after else module.input
            hidden = seen[0] if isinstance(seen, tuple) else seen
            there = wanted.to(hidden.device)
            if there.dtype == torch.bool:
                values.append(hidden[there].float()[:, None].cpu())
            else:
                values.append(torch.einsum("rpt,rtd->rpd", there, hidden.float()).cpu())
        found = torch.stack(values).save()  # type: ignore[attr-defined] # added by nnsight
        run.stop()
    return found


def _weights(batch: Batch, chosen: TokenSelection) -> Tensor:
    """Weight of each token at each position, [rows, positions, tokens]; a boolean [rows, tokens] mask without pooling.

    The selection is linear in the hidden states, so its values on the identity are the weights.
    """
    rows, tokens = batch.input_ids.shape
    if chosen.mask is not None:
        return chosen.mask
    return chosen.take(torch.eye(tokens, device=batch.input_ids.device).expand(rows, tokens, tokens))


def _places(model: ChatModel, keys: Sequence[tuple[str, int]]) -> list[tuple[str, bool]]:
    """Dotted module path of each (site, block), and whether its output (True) or its input is read."""
    paths = {id(module): path for path, module in model.causal_lm.named_modules()}
    found = [hook_point(model, site, layer) for site, layer in keys]
    return [(paths[id(at.module)], at.after) for at in found]


@contextmanager
def _traced(model: ChatModel, remote: Where) -> Iterator[Any]:
    """Model wrapped by nnsight, which replaces the forward of every module; restored on exit."""
    make = _nnsight().TransformersModel
    # nnsight changes the padding side and padding token of its tokenizer, so it receives a copy.
    tokenizer = copy.deepcopy(model.tokenizer)
    if remote:
        _check_remote(model, remote)
        yield make(model.name, tokenizer=tokenizer, task="text-generation")
        return
    before = {module: set(vars(module)) for module in model.causal_lm.modules()}
    training = model.model.training
    try:
        yield make(model.causal_lm, tokenizer=tokenizer, task="text-generation", device=model.device)
    finally:
        for module, names in before.items():
            for name in vars(module).keys() - names:
                delattr(module, name)
        model.model.train(training)


def _check_remote(model: ChatModel, remote: Where) -> None:
    """Raise ReplibError for requests that NDIF cannot run; give nnsight the key, in memory only."""
    if hasattr(model.model, "disable_adapter"):
        raise ReplibError(f"{model.name} carries an adapter, which NDIF does not have: trace it with remote=False.")
    if remote == "local":
        return
    if Path(model.name).exists():
        raise ReplibError(f"NDIF cannot read the folder '{model.name}': give a Hugging Face id that it serves.")
    if not os.environ.get(_KEY):
        raise ReplibError(f"{_KEY} is not set: get a key at https://login.ndif.us and export it, or trace here.")
    _nnsight().CONFIG.API.APIKEY = os.environ[_KEY]


@contextmanager
def _failures() -> Iterator[None]:
    """Translate errors of the service to ReplibError; errors of the model pass unchanged."""
    from nnsight.intervention.backends.remote import RemoteError

    try:
        yield
    except (RemoteError, ConnectionError, TimeoutError) as error:
        raise ReplibError(
            f"NDIF did not run the request: {error}. print(nnsight.ndif.status()) lists what it serves."
        ) from error


def _where(remote: Where) -> dict[str, str]:
    """Provenance entries of a traced result."""
    theirs = {"revision": "main", "dtype": "", "fingerprint": ""} if remote is True else {}
    return theirs | {"nnsight": _nnsight().__version__, "ran": "NDIF" if remote is True else "here"}


def _nnsight() -> Any:
    try:
        import nnsight
    except ImportError as error:
        raise ReplibError("trace_capture needs nnsight: pip install 'nnsight>=0.8,<0.9'") from error
    return nnsight
