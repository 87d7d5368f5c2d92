"""RepBend as a training objective: a micro-batch in parts, each read with and without the adapter.

Distances and the KL are means over tokens, so each part adds its share. Only the cosine and the pairing term compare
rows; their rows form the first part.
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
    """Readings of the base model of the training."""

    folder: Path | None = None
    """Folder that stores readings; None computes each one anew.

    A reading has layers x tokens x dim numbers. Storage pays if several runs have the same micro-batches, as in a
    search over coefficients with one seed."""

    def read(self, chat: ChatModel, plan: Plan, layers: Sequence[int], config: BendConfig) -> Reading:
        """Reading of a part, from the folder if it is there; a new one is stored."""
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
    """Hash of the base model, the tokens, their masks and the layers."""
    batch = plan.batch
    tensors = [batch.input_ids, batch.attention_mask, *plan.masks.values()]
    hashes = [hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest() for x in tensors]
    base = [fingerprint((chat.frozen or chat).causal_lm), str(chat.dtype)]
    where = [config.site, config.alpha_mode, config.scope.hidden_states]
    return key_of(base, list(batch.input_ids.shape), list(plan.masks), hashes, list(layers), where)


@dataclass
class RepBend(Objective):
    """Loss of RepBend (arXiv 2504.01550, Algorithm 1), with its queue."""

    config: BendConfig = field(default_factory=BendConfig)
    references: References = field(default_factory=References)
    """Stored readings of the base model."""
    tokens: int | None = None
    """Most tokens of a part, padding included; None is 1024 on the CPU, 2048 elsewhere."""
    queue: Tensor | None = field(default=None, repr=False)
    name: ClassVar[str] = "RepBend"

    def check(self, chat: ChatModel, data: Any) -> None:
        """Raise ReplibError for layers outside the model, and for unpaired answers with the pairing term."""
        self.config.layers(chat.n_layers)
        if self.config.eta and (data.safe or data.unsafe):
            raise ReplibError("The pairing term takes contrasts only; leave out the unpaired answers, or set eta=0.")

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Contrasts, dialogues, contrasts that the model complies with, and unpaired answers."""
        n = config.contrasts
        return {"contrasts": n, "retain": config.retain, "complied": n, "safe": n, "unsafe": n}

    def lora(self, depth: int) -> Lora:
        """Adapters in every block, or up to the block after the last target block."""
        if self.config.scope.adapted == "all":
            return Lora()
        return Lora(tuple(range(min(depth, max(self.config.layers(depth)) + 2))))

    def lowest(self, depth: int) -> int:
        """First target block."""
        return min(self.config.layers(depth))

    def announced(self, config: TrainConfig, depth: int) -> str:
        """Summary of target blocks and safeguards; warns if LoRA's start has no gradient."""
        warn_of_the_start(self.config, config)
        return announced(self.config, config, depth)

    def about(self, depth: int) -> dict[str, Any]:
        """Configuration with its scope and target layers."""
        layers = self.config.layers(depth)
        own = {"target_layers": layers, "scope": asdict(self.config.scope), "tokens": self.tokens}
        return asdict(self.config) | own

    def state(self) -> dict[str, Tensor]:
        """Queue of A_u."""
        return {} if self.queue is None else {"queue": self.queue}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the queue."""
        self.queue = state.get("queue")

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Loss of Algorithm 1, line 13, on one micro-batch."""
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
            del base, bent, terms, gauges  # frees their memory before the next part

    def _terms(self, chat: ChatModel, bent: Reading, base: Reading, plan: Plan) -> BendTerms:
        """Share of a part in each term of the micro-batch."""
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
            raise ReplibError("anchored gathers unsafe prompts on refused ones: this micro-batch has none, add some.")
        centre = torch.cat([base.last, base.refused], dim=1).mean(dim=1, keepdim=True)
        return anchored_cosine(last, base.refused, centre)


def _norms(states: Mapping[str, Tensor | None], plan: Plan) -> dict[str, Tensor]:
    """Share of a part in the mean norm of states, logged to detect growth."""
    return {
        f"{name}_norm": x.detach().float().norm(dim=-1).mean() * (x.shape[1] / plan.count(name))
        for name, x in states.items()
        if x is not None
    }


def _counted(config: BendConfig, depth: int) -> float:
    """Factor of the safe term for the embeddings, which hidden states count as one more layer."""
    counted = config.scope.hidden_states and config.site == "resid_post" and config.alpha_mode == "all"
    return depth / (depth + 1) if counted else 1.0
