"""Train RepBend: a ``transformers.Trainer`` with one loss, LoRA weights, and the base model as adapter-off reference.

Everything else (devices, precision, accumulation, logging, checkpoints) is the Trainer's own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from replib.activations import versions
from replib.bend import BendConfig, BendTerms, bend_loss, remembered
from replib.chat import ChatModel, evaluating
from replib.errors import ReplibError
from replib.keeper import Keeper, Probe, default_choice
from replib.lora import attached_lora, perturb
from replib.models import attached
from replib.processes import is_first
from replib.prompts import Contrast, Dialogue, content_hash
from replib.reading import Reading, bend_terms, collate, read
from replib.recipe import TrainConfig, announced, warn_of_the_start
from replib.sieve import Build

__all__ = ["BendData", "BendTrainer", "TrainConfig", "TrainResult", "attach", "default_choice", "train"]


@dataclass(frozen=True)
class BendData:
    """What RepBend trains on: harmful prompts with both answers, and dialogues to keep as they are."""

    contrasts: Sequence[Contrast]
    """P_us: read with the safe response."""
    retain: Sequence[Dialogue]
    """P_s: benign dialogues, in the KL and (unless the fidelity is "official") in the safe term."""
    complied: Sequence[Contrast] = ()
    """P_uu: read with either response. () takes the contrasts themselves, in pairs."""
    safe: Sequence[Dialogue] = ()
    """Unpaired safe answers, refusals (``label`` harmful) and others: in the safe term, in the KL as refusals are."""
    unsafe: Sequence[Dialogue] = ()
    """Unpaired unsafe answers."""
    builds: tuple[Build, ...] = ()
    """How the groups came about, where ``replib.mixtures`` made them."""

    def __post_init__(self) -> None:
        if not self.contrasts or not self.retain:
            raise ReplibError("RepBend needs contrasts and dialogues to retain: one of the two lists is empty.")
        if bad := [
            c for c in (*self.contrasts, *self.complied) if not c.safe_response.strip() or not c.unsafe_response.strip()
        ]:
            raise ReplibError(f"{len(bad)} contrasts lack a safe or an unsafe response, for example to "
                              f"{bad[0].prompt[:60]!r}: fill or drop them.")  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """What came out: the bent model, its log, and the step that validation chose."""

    model: ChatModel
    history: pd.DataFrame
    """One row a micro-batch: step, loss, safe, unsafe, cosine, kl, (pairing,) unsafe_norm, safe_norm."""
    probes: pd.DataFrame
    """One row a probe: step and whatever the probe measured on validation prompts."""
    step: int
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, model: ChatModel, folder: Path | str) -> TrainResult:
        """Put a saved adapter onto the model it was trained on."""
        folder = Path(folder)
        bent = attached(model, folder)
        config = json.loads((folder / "replib.json").read_text())
        history, probes = (pd.read_csv(folder / name) for name in ("history.csv", "probes.csv"))
        return cls(bent, history, probes, config.pop("step"), config)

    def save(self, folder: Path | str) -> Path:
        """An ordinary peft adapter folder, with replib.json and the two logs beside it."""
        folder = Path(folder)
        try:
            self.model.model.save_pretrained(folder)
            (folder / "replib.json").write_text(json.dumps(self.config | {"step": self.step}, indent=1))
            self.history.to_csv(folder / "history.csv", index=False)
            self.probes.to_csv(folder / "probes.csv", index=False)
            self.model.adapter = str(folder)
        except OSError as error:
            raise ReplibError(
                f"Cannot write the adapter to {folder}: {error.strerror}. Choose another folder."
            ) from error
        return folder


def train(
    model: ChatModel,
    data: BendData,
    *,
    bend: BendConfig | None = None,
    config: TrainConfig | None = None,
    probe: Probe | None = None,
    choose: Callable[[dict[str, float], dict[str, float]], float] | None = None,
    out: Path | str = "runs/bend",
    say: Callable[[str], object] = print,
) -> TrainResult:
    """Bend a model with RepBend. The adapter is put into the given model: no second copy of the weights is made.

    Use ``result.model`` afterwards; inside ``result.model.adapter_off()`` it is the model that was given.

    Args:
        model: an adapter-free model.
        data: fit prompts only.
        bend: coefficients and target layers.
        config: steps, rate, batch and LoRA shape.
        probe: measures the model on validation prompts every ``config.probe_every`` steps (and before step 1).
        choose: score of a probe given the probe before training; the step with the highest score is kept.
        out: scratch folder of the Trainer.
        say: told the target blocks and the safeguards in force before the first step.

    Raises:
        ReplibError: loss not finite, target layers out of range, a model that carries an adapter already.
    """
    bend, config = bend or BendConfig(), config or TrainConfig()
    layers = bend.layers(model.n_layers)
    if bend.eta and (data.safe or data.unsafe):
        raise ReplibError("The pairing term takes contrasts alone: leave out the unpaired answers, or set eta=0.")
    if is_first():
        say(announced(bend, config, model.n_layers))
    warn_of_the_start(bend, config)
    bent = attach(model, config, max(layers) + 2 if bend.scope.adapted == "target" else None)
    keeper = Keeper(bent, probe, choose or default_choice, config.probe_every, config.patience)
    trainer = BendTrainer(
        model=bent.model,
        args=_arguments(config, Path(out)),
        train_dataset=_Steps(data, config),
        data_collator=lambda rows: rows[0],
        callbacks=[keeper],
        chat=bent,
        bend=bend,
        layers=layers,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    step = keeper.restore_best()
    about = model.provenance() | versions() | {
        "method": "RepBend",
        "bend": asdict(bend) | {"target_layers": layers, "scope": asdict(bend.scope)},
        "train": asdict(config),
        "contrasts": content_hash([*data.contrasts, *data.complied]),
        "retain": content_hash(data.retain),
        "unpaired": content_hash([*data.safe, *data.unsafe]),
        "builds": [asdict(build) for build in data.builds],
    }  # fmt: skip
    bent.model.eval()
    return TrainResult(
        bent,
        pd.DataFrame(trainer.history),
        pd.DataFrame(keeper.rows, columns=None if keeper.rows else ["step"]),
        step,
        about,
    )


def attach(model: ChatModel, config: TrainConfig, blocks: int | None = None) -> ChatModel:
    """The model with the LoRA adapter of a configuration on its first ``blocks`` blocks (None: all).

    Raises:
        ReplibError: the model carries an adapter already.
    """
    set_seed(config.seed)
    bent = attached_lora(
        model,
        rank=config.rank,
        alpha=config.lora_alpha,
        dropout=config.dropout,
        blocks=None if blocks is None else range(min(blocks, model.n_layers)),
    )
    if config.perturbation:
        perturb(bent, config.perturbation, config.seed)
    return bent


# --------------------------------------------------------------------------------------------- batches
class _Steps(Dataset):
    """One item is one micro-batch of dialogues: a list each. Shuffled once from the seed, without replacement."""

    def __init__(self, data: BendData, config: TrainConfig):
        rng = random.Random(config.seed)
        lists = {name: (_endless(getattr(data, name), rng), n) for name, n in _sizes(config).items()}
        self.steps = [
            {name: list(islice(items, n)) for name, (items, n) in lists.items()}
            for _ in range(config.steps * config.accumulation)
        ]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> dict[str, list]:
        return self.steps[i]


def _sizes(config: TrainConfig) -> dict[str, int]:
    """How many of each list of the data a micro-batch takes, in the order in which they are drawn."""
    contrasts = config.contrasts
    pairs = {"contrasts": contrasts, "retain": config.retain, "complied": contrasts}
    return pairs | {"safe": contrasts, "unsafe": contrasts}


def _endless(items: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    while items:
        yield from rng.sample(items, len(items))


# --------------------------------------------------------------------------------------------- loss
class BendTrainer(Trainer):
    """The Trainer with RepBend's loss; ``history`` holds every term, distance and norm of every step."""

    def __init__(self, *, chat: ChatModel, bend: BendConfig, layers: Sequence[int], **kwargs: Any):
        super().__init__(**kwargs)
        self.chat, self.bend, self.layers = chat, bend, tuple(layers)
        self.history: list[dict[str, float]] = []
        self.queue: Tensor | None = None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Algorithm 1, line 13, on one batch."""
        del num_items_in_batch
        batch, groups = collate(self.chat, **inputs, ended=self.bend.scope.ended)
        peft_model = self.accelerator.unwrap_model(model)
        with torch.no_grad(), peft_model.disable_adapter(), evaluating(peft_model):
            base = read(self.chat, model, batch, groups, self.layers, self.bend)
        bent = read(self.chat, model, batch, groups, self.layers, self.bend)
        terms = bend_terms(bent, base, self.bend, self.queue)
        self.queue = remembered(self.queue, bent.last, self.bend.scope.queue)
        loss = bend_loss(terms, self.bend, self.state.global_step / max(1, self.state.max_steps))
        self._log_step(loss, terms, bent)
        return (loss, {}) if return_outputs else loss

    def _log_step(self, loss: Tensor, terms: BendTerms, bent: Reading) -> None:
        step = self.state.global_step + 1
        if not loss.isfinite():
            raise ReplibError(
                f"The loss is {loss.item()} at step {step} ({terms.values()}): lower alpha or the learning "
                "rate, or set max_distance. The best adapter so far is kept."
            )
        norms = {"unsafe_norm": bent.unsafe, "safe_norm": bent.safe}
        self.history.append(
            {"step": step, "loss": loss.item()}
            | terms.values()
            | {name: x.detach().float().norm(dim=-1).mean().item() for name, x in norms.items()}
        )

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs


def _arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        gradient_accumulation_steps=config.accumulation,
        per_device_train_batch_size=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
