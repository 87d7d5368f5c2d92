"""What the model was before training, read batch by batch, and kept on disk where the same batches come again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from replib.bend import BendConfig
from replib.core.storage import key_of, write_tensors
from replib.models.architecture import fingerprint
from replib.models.chat_model import ChatModel
from replib.reading import Plan, Reading, read
from replib.training.objective import reference


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
