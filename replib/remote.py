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

from replib import activations, models
from replib.activations import Activations, Position, check_layers, check_positions, pick, versions
from replib.chat import Batch, ChatModel
from replib.errors import ReplibError
from replib.progress import progress
from replib.prompts import content_hash

KEY = "NDIF_API_KEY"
Where = Literal["local"] | bool


def trace_capture(
    model: ChatModel,
    prompts: Sequence[str],
    *,
    responses: Sequence[str] | None = None,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    positions: Position | Sequence[Position] = "last_prompt",
    batch_size: int = 16,
    remote: Where = False,
) -> Activations:
    """Activations of prompts; every other argument, the result and its meaning as in `activations.capture`.

    Args:
        remote: False traces here; True runs on NDIF, and only the wanted positions travel back; "local" packs
            the request as for NDIF and runs it here on freshly loaded weights, to try it before sending it.

    Raises:
        ReplibError: as `capture`; nnsight or the key is absent; NDIF cannot have this model, or fails.
    """
    wanted = check_layers(model, range(model.n_layers) if layers is None else layers)
    single = isinstance(positions, str | int)
    picks = check_positions([positions] if single else list(positions))  # type: ignore[arg-type, list-item]
    order = sorted(set(wanted))  # a trace reads modules in the order in which they run
    found = []
    with _traced(model, remote) as tracer:
        for start in progress(range(0, len(prompts), batch_size) if prompts else [0], "trace"):
            rows = slice(start, start + batch_size)
            batch = model.encode(prompts[rows], responses and responses[rows])
            found.append(_read(tracer, _places(model, site, order), _weights(batch, picks), batch, remote=remote))
    values = torch.cat(found, dim=1)[[order.index(layer) for layer in wanted]]
    activations._check_finite(values, wanted, model)
    about = _provenance(model, remote) | {"prompts": content_hash(list(prompts)), "n": str(len(prompts))}
    shape = picks[0] if single else tuple(picks)
    return Activations(values[:, :, 0] if single else values, tuple(wanted), shape, site, about)


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

    config = models._config(name, None)
    tokenizer = models._tokenizer(name, None)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    return Outline(empty.eval(), tokenizer, name=name, template=models._template(tokenizer, "auto", name))


def _read(
    tracer: Any,
    places: Sequence[tuple[str, bool]],
    weights: Float[Tensor, "rows positions tokens"],
    batch: Batch,
    *,
    remote: Where,
) -> Float[Tensor, "layers rows positions dim"]:
    """One traced forward pass. Its body runs where the model is, so it uses torch and plain values only."""
    modules = [(tracer.get(path), before) for path, before in places]
    inputs = batch.inputs()
    with torch.no_grad(), _failures(), tracer.trace(inputs, remote=remote) as run:
        values = []
        for module, before in modules:
            seen = module.input if before else module.output
            hidden = seen[0] if isinstance(seen, tuple) else seen
            values.append(torch.einsum("rpt,rtd->rpd", weights.to(hidden.device), hidden.float()).cpu())
        found = torch.stack(values).save()  # type: ignore[attr-defined] # put there by nnsight
        run.stop()
    return found


def _weights(batch: Batch, picks: Sequence[Position]) -> Float[Tensor, "rows positions tokens"]:
    """How much each token counts for each position: `pick` is linear, so it is asked about the identity."""
    rows, tokens = batch.input_ids.shape
    identity = torch.eye(tokens, device=batch.input_ids.device).expand(rows, tokens, tokens)
    return torch.stack([pick(identity, batch, position) for position in picks], dim=1)


def _places(model: ChatModel, site: str, layers: Sequence[int]) -> list[tuple[str, bool]]:
    """For each layer the dotted path of the module to read, and whether its input is meant."""
    before = site == "resid_pre"
    blocks = (model.blocks[i] for i in layers)
    read = [block if before else activations._module(block, site) for block in blocks]
    paths = {id(module): path for path, module in model.causal_lm.named_modules()}
    return [(paths[id(module)], before) for module in read]


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


def _provenance(model: ChatModel, remote: Where) -> dict[str, str]:
    where = "NDIF" if remote is True else "here"
    theirs = {"revision": "main", "dtype": "", "fingerprint": ""} if remote is True else {}
    return model.provenance() | theirs | versions() | {"nnsight": _nnsight().__version__, "ran": where}


def _nnsight() -> Any:
    try:
        import nnsight
    except ImportError as error:
        raise ReplibError("trace_capture needs nnsight: pip install 'nnsight>=0.8,<0.9'") from error
    return nnsight
