"""The same call as `activations.capture`, through nnsight: traced here, or on NDIF for larger models.

The only module that imports nnsight (0.8), whose interface changes with every minor version. NDIF runs the
main revision of a public model, in a dtype of its own, without our adapters. Its key stands in NDIF_API_KEY.
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

from replib.activations.capture import packed, parted, provenance
from replib.activations.reader import Reader, Request
from replib.activations.store import Activations
from replib.core.errors import ReplibError
from replib.models.chat_model import ChatModel
from replib.models.hooks import SITES, hook_point
from replib.models.load import _config, _template, _tokenizer
from replib.models.prefix_cache import SharedPrefix
from replib.models.tokens import Batch, TokenSelection

KEY = "NDIF_API_KEY"
Where = Literal["local"] | bool


def trace_capture(model: ChatModel, prompts: Sequence[str], *, remote: Where = False, **options: Any) -> Activations:
    """Activations of prompts; the options, the result and its meaning are those of `activations.capture`.

    Args:
        model: as for ``capture``; for NDIF an `outline` is enough.
        prompts: as for ``capture``.
        remote: False traces here; True runs on NDIF, and only the wanted positions travel back; "local" packs
            the request as for NDIF and runs it here on freshly loaded weights, to try it before sending it.
        options: as for ``capture``.

    Raises:
        ReplibError: as `capture`; nnsight or the key is absent; NDIF cannot have this model, or fails; NDIF is asked
            to write answers.
    """
    ask, how = parted(model, {"batch_size": 16} | options)
    if remote and ask.max_new_tokens:
        raise ReplibError("Answers are not written remotely: write them first and pass them as responses=….")
    values, owner = TraceReader(model, ask, how.batch_size, remote).read(prompts, how.responses)[0]
    about = provenance(model, ask, prompts, how.responses) | _where(remote)
    return packed(values, owner, ask, how, about)[ask.sites[0]]


class TraceReader(Reader):
    """Reads through nnsight instead of hooks; everything else is the same."""

    shares = False  # a trace takes whole prompts

    def __init__(self, model: ChatModel, ask: Request, batch_size: int, remote: Where):
        super().__init__(model, ask, batch_size)
        self.remote, self.tracer = remote, None
        self.order = sorted(set(ask.keys), key=lambda key: (key[1], SITES.index(key[0])))  # in which modules run
        self.places = _places(model, self.order)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Nnsight's view of the model while batches are read."""
        with _traced(self.model, self.remote) as self.tracer:
            yield

    def values(
        self,
        batch: Batch,
        chosen: TokenSelection,
        beginning: SharedPrefix | None,  # noqa: ARG002
    ) -> Float[Tensor, "keys vectors positions dim"]:
        """What is wanted of one batch, from one traced forward pass."""
        found = _read(self.tracer, self.places, _weights(batch, chosen), batch, remote=self.remote)
        return found[[self.order.index(key) for key in self.ask.keys]].to(self.ask.dtype)


class Outline(ChatModel):
    """A chat model without weights: enough to write prompts and name blocks for NDIF, not to run here."""

    @property
    def device(self) -> torch.device:
        """Where batches are made: the weights themselves are nowhere."""
        return torch.device("cpu")

    def provenance(self) -> dict[str, str]:
        """What can be said of weights that are elsewhere."""
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
    """One traced forward pass. Its body runs where the model is, so it uses torch and plain values only."""
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
        found = torch.stack(values).save()  # type: ignore[attr-defined] # put there by nnsight
        run.stop()
    return found


def _weights(batch: Batch, chosen: TokenSelection) -> Tensor:
    """How much each token counts for each position, [rows, positions, tokens]; or, token by token, a mask of them.

    What is chosen is linear in the hidden states, so it is asked about the identity.
    """
    rows, tokens = batch.input_ids.shape
    if chosen.mask is not None:
        return chosen.mask
    return chosen.take(torch.eye(tokens, device=batch.input_ids.device).expand(rows, tokens, tokens))


def _places(model: ChatModel, keys: Sequence[tuple[str, int]]) -> list[tuple[str, bool]]:
    """For each site of a block the dotted path of a module, and whether its output is meant or its input."""
    paths = {id(module): path for path, module in model.causal_lm.named_modules()}
    found = [hook_point(model, site, layer) for site, layer in keys]
    return [(paths[id(at.module)], at.after) for at in found]


@contextmanager
def _traced(model: ChatModel, remote: Where) -> Iterator[Any]:
    """Nnsight's view of the model. It puts a forward of its own on every module: that is taken off again."""
    make = _nnsight().TransformersModel
    # nnsight changes padding side and padding token of the tokenizer it is given: give it a copy.
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
    """Refuse what NDIF cannot answer before anything is sent; hand nnsight the key, in memory only."""
    if hasattr(model.model, "disable_adapter"):
        raise ReplibError(f"{model.name} carries an adapter, which NDIF does not have: trace it with remote=False.")
    if remote == "local":
        return
    if Path(model.name).exists():
        raise ReplibError(f"NDIF cannot read the folder '{model.name}': give a Hugging Face id that it serves.")
    if not os.environ.get(KEY):
        raise ReplibError(f"{KEY} is not set: get a key at https://login.ndif.us and export it, or trace here.")
    _nnsight().CONFIG.API.APIKEY = os.environ[KEY]


@contextmanager
def _failures() -> Iterator[None]:
    """Errors of the service as ours; errors of the model stay what they are."""
    from nnsight.intervention.backends.remote import RemoteError

    try:
        yield
    except (RemoteError, ConnectionError, TimeoutError) as error:
        raise ReplibError(
            f"NDIF did not run the request: {error}. print(nnsight.ndif.status()) lists what it serves."
        ) from error


def _where(remote: Where) -> dict[str, str]:
    """What to say in the provenance of a result that was traced."""
    theirs = {"revision": "main", "dtype": "", "fingerprint": ""} if remote is True else {}
    return theirs | {"nnsight": _nnsight().__version__, "ran": "NDIF" if remote is True else "here"}


def _nnsight() -> Any:
    try:
        import nnsight
    except ImportError as error:
        raise ReplibError("trace_capture needs nnsight: pip install 'nnsight>=0.8,<0.9'") from error
    return nnsight
