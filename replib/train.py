"""Train RepBend: a ``transformers.Trainer`` with one loss, LoRA weights, and the base model as adapter-off reference.

Everything else (devices, precision, accumulation, logging, checkpoints) is the Trainer's own.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from replib.activations import versions
from replib.bend import BendConfig, BendTerms, bend_loss
from replib.chat import ChatModel, evaluating
from replib.errors import ReplibError
from replib.models import attached
from replib.prompts import Contrast, Dialogue, content_hash
from replib.reading import Reading, bend_terms, collate, read
from replib.sieve import Build

Probe = Callable[[ChatModel], dict[str, float]]


@dataclass(frozen=True)
class BendData:
    """What RepBend trains on: harmful prompts with both answers, and dialogues to keep as they are."""

    contrasts: Sequence[Contrast]
    """P_us: read with the safe response."""
    retain: Sequence[Dialogue]
    """P_s: benign dialogues, in the safe term and in the KL."""
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
class TrainConfig:
    """How long and how fast. The defaults suit a small model; the papers' 7B runs used rate 1e-5 and 450 steps."""

    steps: int = 120
    learning_rate: float = 2e-4
    contrasts: int = 16
    """Contrasts a step: as many safe and as many unsafe sequences; where there are unpaired answers, as many again."""
    retain: int = 24
    """Retained dialogues a step."""
    rank: int = 16
    lora_alpha: int = 16
    dropout: float = 0.05
    max_grad_norm: float = 1.0
    schedule: str = "constant"
    """Learning-rate schedule, by its name in transformers."""
    probe_every: int = 10
    """Steps between validation probes; the last step is always probed."""
    seed: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What came out: the bent model, its log, and the step that validation chose."""

    model: ChatModel
    history: pd.DataFrame
    """One row a step: step, loss, safe, unsafe, cosine, kl, safe_norm, unsafe_norm, gradient norm."""
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

    Raises:
        ReplibError: loss not finite, target layers out of range, a model that carries an adapter already.
    """
    bend, config = bend or BendConfig(), config or TrainConfig()
    bent = attach(model, config)
    layers = bend.layers(model.n_layers)
    keeper = _Keeper(bent, probe, choose or default_choice, config.probe_every)
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
        "bend": asdict(bend) | {"target_layers": layers},
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


def attach(model: ChatModel, config: TrainConfig) -> ChatModel:
    """The model with a fresh LoRA adapter on every linear layer of every block."""
    if model.adapter or hasattr(model.model, "disable_adapter"):
        raise ReplibError(f"{model.name} carries an adapter already: load it without one, or merge it first.")
    set_seed(config.seed)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=sorted(
            {
                name.rpartition(".")[2]
                for block in model.blocks
                for name, module in block.named_modules()
                if isinstance(module, nn.Linear)
            }
        ),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings are not adapted: peft's advice on merging does not apply
        peft_model = get_peft_model(model.causal_lm, lora)
    return ChatModel(
        peft_model,
        model.tokenizer,
        name=model.name,
        revision=model.revision,
        adapter="repbend",
        template=model.template,
        anatomy=model.anatomy,
    )


# --------------------------------------------------------------------------------------------- batches
class _Steps(Dataset):
    """One item is one step's worth of dialogues: a list a group. Shuffled once from the seed, without replacement."""

    def __init__(self, data: BendData, config: TrainConfig):
        rng = random.Random(config.seed)
        groups = (data.contrasts, data.retain, data.complied, data.safe, data.unsafe)
        counts = (config.contrasts, config.retain, *3 * (config.contrasts,))
        streams = [_endless(group, rng) for group in groups]
        self.steps = [
            tuple(list(islice(x, n)) for x, n in zip(streams, counts, strict=True)) for _ in range(config.steps)
        ]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> tuple[list[Any], ...]:
        return self.steps[i]


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

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Algorithm 1, line 13, on one batch."""
        del num_items_in_batch
        batch, groups = collate(self.chat, *inputs)
        peft_model = self.accelerator.unwrap_model(model)
        with torch.no_grad(), peft_model.disable_adapter(), evaluating(peft_model):
            base = read(self.chat, model, batch, groups, self.layers, self.bend)
        bent = read(self.chat, model, batch, groups, self.layers, self.bend)
        terms = bend_terms(bent, base, self.bend)
        loss = bend_loss(terms, self.bend)
        self._log_step(loss, terms, bent)
        return (loss, {}) if return_outputs else loss

    def _log_step(self, loss: Tensor, terms: BendTerms, bent: Reading) -> None:
        if not loss.isfinite():
            raise ReplibError(
                f"The loss is {loss.item()} at step {len(self.history) + 1} ({terms}): lower alpha or the learning "
                "rate, or set max_distance. The best adapter so far is kept."
            )
        norms = {"unsafe_norm": bent.unsafe, "safe_norm": bent.safe}
        self.history.append(
            {"step": len(self.history) + 1, "loss": loss.item()}
            | {name: value.item() for name, value in terms._asdict().items()}
            | {name: x.detach().float().norm(dim=-1).mean().item() for name, x in norms.items()}
        )

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs


def _arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
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


# --------------------------------------------------------------------------------------------- choosing a step
def default_choice(now: dict[str, float], before: dict[str, float]) -> float:
    """What validation found: the less attack success, degenerate answers and lost benign behaviour, the higher.

    A benign rate may fall by two points; what it loses beyond them counts tenfold.
    """
    lost = [max(0.0, before[k] - now[k]) for k in ("harmless", "borderline", "skill") if k in before]
    beyond = sum(max(0.0, x - 0.02) for x in lost)
    return -now.get("attack", 0.0) - now.get("degenerate", 0.0) - sum(lost) - 10 * beyond


class _Keeper(TrainerCallback):
    """Runs the validation probe and keeps the adapter of the best step."""

    def __init__(self, chat: ChatModel, probe: Probe | None, choose: Callable[..., float], every: int):
        self.chat, self.probe, self.choose, self.every = chat, probe, choose, every
        self.rows: list[dict[str, float]] = []
        self.before: dict[str, float] = {}
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.steps = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.probe:
            self.before = self.probe(self.chat)
            self.rows.append({"step": 0} | self.before)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.steps = state.global_step
        if not self.probe or (self.steps % self.every and self.steps < state.max_steps):
            return
        found = self.probe(self.chat)
        self.rows.append({"step": self.steps} | found)
        score = self.choose(found, self.before)
        if self.best is None or score > self.best[0]:
            weights = {k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(self.chat.model).items()}
            self.best = (score, self.steps, weights)

    def restore_best(self) -> int:
        """Put the chosen adapter back; returns its step."""
        if self.best is None:
            return self.steps
        set_peft_model_state_dict(self.chat.model, self.best[2])
        return self.best[1]
