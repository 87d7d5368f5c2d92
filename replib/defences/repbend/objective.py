"""RepBend as the trainer sees it: a micro-batch in parts, each read with and without the adapter.

Distances and the KL are means over tokens, so each part adds its share of them. Only the cosine and the pairing term
compare rows with each other; their rows form the first part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from replib.core.errors import ReplibError
from replib.core.storage import key_of, write_tensors
from replib.defences.losses import distance, summed_kl
from replib.defences.repbend.batch import Plan, Reading, read
from replib.defences.repbend.config import BendConfig, announced, warn_of_the_start
from replib.defences.repbend.loss import BendTerms, anchored_cosine, bend_loss, mean_cosine, remembered
from replib.models.architecture import fingerprint
from replib.models.chat_model import ChatModel
from replib.models.forward import cache_frozen_blocks
from replib.training.config import TrainConfig
from replib.training.objective import Lora, Objective, Part, reference


@dataclass(frozen=True)
class References:
    """Readings of the model that training started from."""

    folder: Path | None = None
    """Where they are kept; None computes each one when it is needed.

    A reading takes layers x tokens x dim numbers: worth its room where several runs see the same micro-batches, as in
    a search over coefficients with one seed."""

    def read(self, chat: ChatModel, plan: Plan, layers: Sequence[int], config: BendConfig) -> Reading:
        """The reading of a part: the kept one, or a new one that is kept at once."""
        if self.folder is None:
            return _read(chat, plan, layers, config)
        file = self.folder / f"{_key(chat, plan, layers, config)}.safetensors"
        if not file.exists():
            found = {name: x for name, x in vars(_read(chat, plan, layers, config)).items() if x is not None}
            write_tensors(file, found)
        return Reading(**load_file(file, device=str(chat.device)))


def _read(chat: ChatModel, plan: Plan, layers: Sequence[int], config: BendConfig) -> Reading:
    with reference(chat) as base:
        return read(base, plan, layers, config)


def _key(chat: ChatModel, plan: Plan, layers: Sequence[int], config: BendConfig) -> str:
    """What a reading depends on: the base model, the tokens, which of them are read, and on which layers."""
    batch = plan.batch
    tensors = [batch.input_ids, batch.attention_mask, *plan.masks.values()]
    hashes = [hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest() for x in tensors]
    base = [fingerprint((chat.frozen or chat).causal_lm), str(chat.dtype)]
    where = [config.site, config.alpha_mode, config.scope.hidden_states]
    return key_of(base, list(batch.input_ids.shape), list(plan.masks), hashes, list(layers), where)


@dataclass
class RepBend(Objective):
    """The loss of arXiv 2504.01550, Algorithm 1, with its queue."""

    config: BendConfig = field(default_factory=BendConfig)
    references: References = field(default_factory=References)
    """Where the base model's states are kept, if they are."""
    tokens: int | None = None
    """Tokens of a part at most, padding included; None: 1024 on the CPU, 2048 elsewhere."""
    queue: Tensor | None = field(default=None, repr=False)
    name: ClassVar[str] = "RepBend"

    def check(self, chat: ChatModel, data: Any) -> None:
        """Raise ReplibError for layers outside the model, and for unpaired answers where pairs are compared."""
        self.config.layers(chat.n_layers)
        if self.config.eta and (data.safe or data.unsafe):
            raise ReplibError("The pairing term takes contrasts alone: leave out the unpaired answers, or set eta=0.")

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Contrasts, dialogues, contrasts that the model complies with, and unpaired answers."""
        n = config.contrasts
        return {"contrasts": n, "retain": config.retain, "complied": n, "safe": n, "unsafe": n}

    def lora(self, depth: int) -> Lora:
        """Every block, or those up to the one after the last target block."""
        if self.config.scope.adapted == "all":
            return Lora()
        return Lora(tuple(range(min(depth, max(self.config.layers(depth)) + 2))))

    def lowest(self, depth: int) -> int:
        """The first target block."""
        return min(self.config.layers(depth))

    def announced(self, config: TrainConfig, depth: int) -> str:
        """Target blocks and safeguards; warns where LoRA's start has no gradient."""
        warn_of_the_start(self.config, config)
        return announced(self.config, config, depth)

    def about(self, depth: int) -> dict[str, Any]:
        """The configuration with its scope and target layers."""
        layers = self.config.layers(depth)
        own = {"target_layers": layers, "scope": asdict(self.config.scope), "tokens": self.tokens}
        return asdict(self.config) | own

    def state(self) -> dict[str, Tensor]:
        """The queue of A_u."""
        return {} if self.queue is None else {"queue": self.queue}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the queue back."""
        self.queue = state.get("queue")

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Algorithm 1, line 13, on one micro-batch."""
        plan, layers = Plan.of(chat, items, self.config), self.config.layers(chat.n_layers)
        for part in plan.parts(self.tokens or (1024 if chat.device.type == "cpu" else 2048)):
            with cache_frozen_blocks(chat):
                base = self.references.read(chat, part, layers, self.config)
                bent = read(chat, part, layers, self.config)
            terms = self._terms(chat, bent, base, plan)
            gauges = terms.taken() | _norms({"safe": bent.safe, "unsafe": bent.unsafe}, plan)
            yield Part(bend_loss(terms, self.config, progress), gauges)
            if bent.last is not None:
                self.queue = remembered(self.queue, bent.last, self.config.scope.queue)
            del base, bent, terms, gauges  # before the next part takes its room

    def _terms(self, chat: ChatModel, bent: Reading, base: Reading, plan: Plan) -> BendTerms:
        """What a part adds to each term of the micro-batch."""
        c = self.config
        hinge: dict[str, Any] = {"max_distance": c.max_distance, "directional": c.directional}
        found: dict[str, Tensor] = {}
        if bent.safe is not None and base.safe is not None:
            share = bent.safe.shape[1] / plan.count("safe") * _counted(c, len(bent.safe))
            found["safe"] = distance(bent.safe, base.safe, relative=c.relative) * share
        if bent.unsafe is not None and base.unsafe is not None:
            found["unsafe"] = distance(bent.unsafe, base.unsafe, relative=c.relative, **hinge)
        if bent.last is not None:
            found["cosine"] = self._cosine(bent, base)
        if bent.paired_unsafe is not None and base.paired_safe is not None:
            found["pairing"] = distance(bent.paired_unsafe, base.paired_safe, relative=c.relative)
        if bent.final is not None and base.final is not None:
            sequences = int(plan.masks["final"].any(dim=1).sum())
            over = sequences if c.scope.kl_reduction == "sequence" else plan.count("final")
            found["kl"] = summed_kl(chat, base.final, bent.final, c.temperature) / over
        return BendTerms(**found)

    def _cosine(self, bent: Reading, base: Reading) -> Tensor:
        assert bent.last is not None
        last = bent.last if self.queue is None else torch.cat([self.queue, bent.last], dim=1)
        if not self.config.anchored:
            return mean_cosine(last)
        if base.last is None or base.refused is None:
            raise ReplibError("anchored gathers unsafe prompts on refused ones: this micro-batch has none of them.")
        centre = torch.cat([base.last, base.refused], dim=1).mean(dim=1, keepdim=True)
        return anchored_cosine(last, base.refused, centre)


def _norms(states: Mapping[str, Tensor | None], plan: Plan) -> dict[str, Tensor]:
    """A part's share of the mean norm of states, as a gauge of growth."""
    return {
        f"{name}_norm": x.detach().float().norm(dim=-1).mean() * (x.shape[1] / plan.count(name))
        for name, x in states.items()
        if x is not None
    }


def _counted(config: BendConfig, depth: int) -> float:
    """Layers that move among those in the mean of the safe term: hidden states count the embeddings."""
    counted = config.scope.hidden_states and config.site == "resid_post" and config.alpha_mode == "all"
    return depth / (depth + 1) if counted else 1.0
