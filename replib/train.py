"""Train a defence: a ``transformers.Trainer`` with LoRA weights, and the base model as adapter-off reference.

Everything else (devices, precision, accumulation, logging, checkpoints) is the Trainer's own.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from replib.anatomy import adapter_hash
from replib.chat import ChatModel
from replib.checkpoints import Checkpoints, check_free, claimed, released
from replib.errors import Diverged, ReplibError
from replib.keeper import Keeper, Probe, default_choice
from replib.lora import attached_lora, detached, perturb
from replib.models import attached
from replib.objective import Lora, Objective, Part
from replib.parallel import average_gradients, gathered, shared, splits, wait, whole
from replib.processes import is_first
from replib.prompts import Contrast, Dialogue, content_hash
from replib.recipe import TrainConfig
from replib.repbend import RepBend
from replib.sieve import Build

__all__ = ["BendData", "DefenceTrainer", "TrainConfig", "TrainResult", "attach", "default_choice", "train"]


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
        """An ordinary peft adapter folder, with replib.json and the two logs beside it; never half written.

        Raises:
            ReplibError: the folder cannot be written, or holds another run or other files.
        """
        folder, about = Path(folder), json.loads(json.dumps(self.config | {"step": self.step}, default=str))
        weights = {n: whole(p.detach()) for n, p in self.model.model.named_parameters() if "lora_" in n}
        if is_first():
            self._write(folder, about, weights)
        wait()
        self.model.adapter = str(folder)
        return folder

    def _write(self, folder: Path, about: dict[str, Any], weights: dict[str, Tensor]) -> None:
        partial = folder.absolute().with_name(folder.absolute().name + ".partial")
        try:
            check_free(folder, "replib.json", about)
            for old in (partial, folder):  # half written, or this very run
                shutil.rmtree(old, ignore_errors=True)
            self.model.model.save_pretrained(partial, state_dict=weights)
            self.history.to_csv(partial / "history.csv", index=False)
            self.probes.to_csv(partial / "probes.csv", index=False)
            (partial / "replib.json").write_text(json.dumps(about, indent=1))
            partial.rename(folder)
        except OSError as error:
            raise ReplibError(
                f"Cannot write the adapter to {folder}: {error.strerror}. Choose another folder."
            ) from error


def train(
    model: ChatModel,
    data: Any,
    objective: Objective | None = None,
    *,
    config: TrainConfig | None = None,
    probe: Probe | None = None,
    choose: Callable[[dict[str, float], dict[str, float]], float] | None = None,
    out: Path | str = "runs/bend",
    say: Callable[[str], object] = print,
) -> TrainResult:
    """Train a defence. The adapter is put into the given model: no second copy of the weights is made.

    Use ``result.model`` afterwards; inside ``result.model.adapter_off()`` it is the model that was given.

    Args:
        model: an adapter-free model.
        data: fit prompts only: ``BendData`` for RepBend, ``DefenceData`` for the others.
        objective: the defence with its hyper-parameters; None is RepBend with its defaults.
        config: steps, rate, batch and LoRA shape.
        probe: measures the model on validation prompts every ``config.probe_every`` steps (and before step 1).
        choose: score of a probe given the probe before training; the step with the highest score is kept.
        out: scratch folder. A run longer than ``config.save_every`` steps keeps checkpoints there; the same call goes
            on from the newest complete one, bit for bit on the CPU, if ``probe`` and ``choose`` are the same too.
            They are removed when training is over.
        say: told what is in force before the first step.

    Raises:
        Diverged: the loss is no number, or states grow without bound. The best adapter so far is on disk.
        ReplibError: target layers out of range, a model that carries an adapter already, an ``out`` that holds another
            run or other files. The model is then as it was given.
    """
    objective, config = objective or RepBend(), config or TrainConfig()
    objective.check(model, data)
    objective.restore({})  # nothing of an earlier run
    announced = objective.announced(config, model.n_layers)
    if is_first():
        say(announced)
    args = _arguments(config, Path(out), cpu=model.device.type == "cpu" and not splits())
    facts = model.provenance() | versions() | _recipe(objective, config, data, model.n_layers)
    scratch = Path(out) if 0 < config.save_every < config.steps else None
    start = scratch and claimed(scratch, _identity(facts, args.world_size, probe is not None))
    tuned = attach(model, config, objective.lora(model.n_layers))
    keeper = Keeper(tuned, probe, choose or default_choice, config.probe_every, config.patience)
    trainer = DefenceTrainer(
        model=tuned.model,
        args=args,
        train_dataset=shared(_Steps(data, objective.draws(config), config, args.world_size)),
        data_collator=lambda rows: rows[0],
        callbacks=[keeper],
        chat=tuned,
        objective=objective,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        if scratch:
            trainer.add_callback(Checkpoints(scratch, config.save_every, trainer, keeper).restored(start))
        trainer.train(resume_from_checkpoint=start and str(start))
    except BaseException:  # an interrupt too: the same call may come again
        detached(tuned)
        raise
    if scratch:
        released(scratch)
    step = keeper.restore_best()
    tuned.model.eval()
    return TrainResult(
        tuned,
        pd.DataFrame(trainer.history),
        pd.DataFrame(keeper.rows, columns=None if keeper.rows else ["step"]),
        step,
        facts | {"adapter_hash": adapter_hash(tuned.model)},
    )


def _identity(facts: dict[str, Any], processes: int, probed: bool) -> dict[str, Any]:
    """What a run is; how often it is kept may change on the way."""
    train = {name: x for name, x in facts["train"].items() if name != "save_every"}
    return facts | {"train": train, "processes": processes, "probed": probed}


def _recipe(objective: Objective, config: TrainConfig, data: Any, depth: int) -> dict[str, Any]:
    """What was trained how on what, as plain values."""
    lists = {name: getattr(data, name) for name in objective.draws(config)}
    return {
        "method": objective.name,
        "objective": objective.about(depth),
        "train": asdict(config),
        "data": {name: content_hash(rows) for name, rows in lists.items() if rows},
        "builds": [asdict(build) for build in data.builds],
    }


def attach(model: ChatModel, config: TrainConfig, lora: Lora | None = None) -> ChatModel:
    """The model with the LoRA adapter of a configuration, on every linear layer of its blocks if not said otherwise.

    Raises:
        ReplibError: the model carries an adapter already.
    """
    set_seed(config.seed)
    where = asdict(lora or Lora())
    tuned = attached_lora(model, rank=config.rank, alpha=config.lora_alpha, dropout=config.dropout, **where)
    if config.perturbation:
        perturb(tuned, config.perturbation, config.seed)
    return tuned


# --------------------------------------------------------------------------------------------- batches
class _Steps(Dataset):
    """One item is one micro-batch of dialogues: a list each. Shuffled once from the seed, without replacement."""

    def __init__(self, data: Any, draws: Mapping[str, int], config: TrainConfig, processes: int = 1):
        rng = random.Random(config.seed)
        lists = {name: (_endless(getattr(data, name), rng), n) for name, n in draws.items()}
        self.steps = [
            {name: list(islice(items, n)) for name, (items, n) in lists.items()}
            for _ in range(config.steps * config.accumulation * processes)
        ]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> dict[str, list]:
        return self.steps[i]


def _endless(items: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    while items:
        yield from rng.sample(items, len(items))


# --------------------------------------------------------------------------------------------- loss
class DefenceTrainer(Trainer):
    """The Trainer with the loss of an objective; ``history`` holds every term of every micro-batch."""

    def __init__(self, *, chat: ChatModel, objective: Objective, **kwargs: Any):
        super().__init__(**kwargs)
        self.chat, self.objective = chat, objective
        self.history: list[dict[str, float]] = []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The gradient of one micro-batch, taken part by part."""
        if self.is_deepspeed_enabled:  # it averages by itself, and expects one backward pass
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        found: dict[str, Tensor] = {}
        for part in self._parts(inputs):
            self.accelerator.backward(part.loss / self.current_gradient_accumulation_steps)
            _add(found, part)
        if self.accelerator.sync_gradients:
            average_gradients(self.chat.model)
        self._log_steps(found)
        return found["loss"] / self.current_gradient_accumulation_steps

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """The loss of one micro-batch as a whole, where its gradient must be taken at once."""
        del model
        parts = list(self._parts(inputs))
        found: dict[str, Tensor] = {}
        for part in parts:
            _add(found, part)
        self._log_steps(found)
        return torch.stack([part.loss for part in parts]).sum()

    def _parts(self, inputs: Any) -> Iterator[Part]:
        return self.objective.parts(self.chat, inputs, self.state.global_step / max(1, self.state.max_steps))

    def _log_steps(self, found: dict[str, Tensor]) -> None:
        """The rows of all processes, so that all stop where the loss of one is no number."""
        for each in gathered({name: x.item() for name, x in found.items()}):
            self._log_step(each)

    def _log_step(self, found: dict[str, float]) -> None:
        step = self.state.global_step + 1
        if not math.isfinite(found["loss"]):
            raise Diverged(
                f"The loss is {found['loss']} at step {step} ({found}): lower alpha or the learning "
                "rate, or set max_distance. The best adapter so far is kept."
            )
        self.history.append({"step": step} | found)


def _add(found: dict[str, Tensor], part: Part) -> None:
    for name, x in {"loss": part.loss, **part.terms}.items():
        found[name] = found.get(name, 0) + x.detach()


def _arguments(config: TrainConfig, out: Path, *, cpu: bool = False) -> TrainingArguments:
    """What the Trainer is told; it trains where the model is, in several processes too."""
    return TrainingArguments(
        output_dir=str(out),
        use_cpu=cpu,
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
