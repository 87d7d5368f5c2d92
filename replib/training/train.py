"""Training of a defence, with resumption from checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from transformers import set_seed

from replib.core.distributed import broadcast, is_first, sharded_launch
from replib.core.errors import Diverged, ReplibError
from replib.core.storage import content_hash, versions
from replib.data.mixtures import DefenceData
from replib.data.prompts import Contrast, Dialogue
from replib.models.adapters import attached_lora, perturb, undone, unfrozen
from replib.models.architecture import adapter_hash
from replib.models.chat_model import ChatModel
from replib.training.checkpoints import Checkpoints, claim_run_folder, release_run_folder
from replib.training.config import TrainConfig, said_of_full
from replib.training.model_selection import BestStepCallback, Measure, default_choice
from replib.training.objective import Lora, Objective
from replib.training.result import TrainResult
from replib.training.trainer import DefenceTrainer, Steps, arguments

_ResultT = TypeVar("_ResultT", Contrast, Dialogue)
ANSWER_FIELDS = {Contrast: ("safe_response", "unsafe_response"), Dialogue: ("response",)}


@dataclass(frozen=True)
class MaxLengths:
    """Most tokens of the instruction and of the answer."""

    request: int = 512
    response: int = 512

    def __post_init__(self) -> None:
        if min(self.request, self.response) < 1:
            raise ReplibError(f"{self}: prompts or answers would be empty; allow 1 token or more.")

    def cut(self, chat: ChatModel, lists: Mapping[str, Sequence[_ResultT]]) -> dict[str, list[_ResultT]]:
        """Lists cut to these lengths, with a warning that counts the changed rows."""
        found = {name: [self._fitted(chat, row) for row in rows] for name, rows in lists.items()}
        changed = sum(a != b for name in lists for a, b in zip(lists[name], found[name], strict=True))
        if changed:
            warnings.warn(
                f"{changed} of {sum(map(len, lists.values()))} dialogues were longer than {self.request} tokens of "
                f"prompt or {self.response} of answer and lost their end.",
                stacklevel=3,
            )
        return found

    def _fitted(self, chat: ChatModel, row: _ResultT) -> _ResultT:
        if type(row) not in ANSWER_FIELDS:  # labels belong to the uncut answer
            return row
        limits = {"prompt": self.request} | dict.fromkeys(ANSWER_FIELDS[type(row)], self.response)
        return replace(row, **{name: shortened(chat, getattr(row, name), n) for name, n in limits.items()})


def shortened(chat: ChatModel, text: str, tokens: int) -> str:
    """Longest beginning of a text with at most ``tokens`` tokens."""
    if len(text) <= tokens:  # a token has one character or more
        return text
    while len(places := _places(chat, text)) > tokens:  # a cut may change the tokens
        text = text[: places[tokens][0]]  # cut before the token, which may be part of a character
    return text


def _places(chat: ChatModel, text: str) -> list[tuple[int, int]]:
    """First and last character of each token, end exclusive."""
    return chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def train(
    model: ChatModel,
    data: Any,
    objective: Objective,
    *,
    config: TrainConfig | None = None,
    validation: Measure | None = None,
    choose: Callable[[dict[str, float], dict[str, float]], float] | None = None,
    out: Path | str = "runs/bend",
    say: Callable[[str], object] = print,
) -> TrainResult:
    """Train a defence as an adapter on the given model, without a second copy of its weights.

    Use ``result.model`` afterwards; ``result.model.adapter_off()`` is the base.

    Args:
        model: an adapter-free model.
        data: fit prompts only: ``BendData`` for RepBend, ``DefenceData`` for the others.
        objective: the defence with its hyper-parameters.
        config: steps, rate, batch and LoRA shape.
        validation: measures the model on validation prompts every ``config.probe_every`` steps (and before step 1).
        choose: score of a measurement given the one before training; the step with the highest score is kept.
        out: scratch folder. A run longer than ``config.save_every`` steps keeps checkpoints there until its end; the
            same call resumes from the newest complete one, bit for bit on the CPU if ``validation`` and ``choose``
            are the same too.
        say: receives a summary of the objective before the first step.

    Raises:
        Diverged: the loss is not finite, or states exceed ``config.max_growth``; the best adapter so far is saved.
        ReplibError: target layers out of range, a model with an adapter, an ``out`` with another run or other files.
            The model is then unchanged.
    """
    config = config or TrainConfig()
    lists = _checked(model, data, objective, config)
    announced = objective.announced(config, model.n_layers) + said_of_full(model, config)
    if is_first():
        say(announced)
    args = arguments(config, Path(out), cpu=model.device.type == "cpu" and not sharded_launch())
    facts = model.provenance() | versions() | _recipe(objective, config, data, model.n_layers)
    scratch = Path(out) if 0 < config.save_every < config.steps else None
    start = scratch and claim_run_folder(scratch, _identity(facts, args.world_size, validation is not None))
    tuned = attach(model, config, objective.lora(model.n_layers), objective.name)
    keeper = BestStepCallback(tuned, validation, choose or default_choice, config.probe_every, config.patience)
    steps = broadcast(Steps(lists, objective.draws(config), config, args.world_size))
    trainer = DefenceTrainer(
        args=args, train_dataset=steps, callbacks=[keeper], chat=tuned, objective=objective, config=config
    )

    def result() -> TrainResult:
        history, probes = pd.DataFrame(trainer.history), pd.DataFrame(keeper.rows or {"step": []})
        step = keeper.restore_best()
        tuned.model.eval()
        return TrainResult(tuned, history, probes, step, facts | {"adapter_hash": adapter_hash(tuned.model)})

    try:
        if scratch:
            trainer.add_callback(Checkpoints(scratch, config.save_every, trainer, keeper).restored(start))
        trainer.train(resume_from_checkpoint=start and str(start))
    except Diverged as error:
        place = Path(out).absolute().with_name(Path(out).name + "-last-good")
        kept = f"Step {keeper.best[1]} is kept in {result().save(place)}." if keeper.best else "No step was measured."
        undone(tuned)
        raise Diverged(f"{error} {kept}") from error
    except BaseException:  # an interrupt too, since the same call may be repeated
        undone(tuned)
        raise
    finally:
        trainer.bar.close()
    if scratch:
        release_run_folder(scratch)
    return result()


def _checked(model: ChatModel, data: Any, objective: Objective, config: TrainConfig) -> dict[str, list]:
    """Lists that the objective draws from, cut to length; ReplibError if model, data and configuration disagree."""
    objective.check(model, data)
    objective.restore({})  # drops the state of an earlier run
    if config.first_block > (lowest := objective.lowest(model.n_layers)):
        raise ReplibError(
            f"first_block={config.first_block} is too high: {objective.name} changes the output of block {lowest}, "
            f"below every adapter. Take {lowest} at most."
        )
    if config.full and sharded_launch():
        raise ReplibError("full=True keeps a whole frozen copy in each process: train LoRA with FSDP or DeepSpeed.")
    lengths = MaxLengths(config.request_tokens, config.response_tokens)
    return lengths.cut(model, {name: getattr(data, name) for name in objective.draws(config)})


def _identity(facts: dict[str, Any], processes: int, probed: bool) -> dict[str, Any]:
    """Facts that a resumed run must share; ``save_every`` may differ."""
    train = {name: x for name, x in facts["train"].items() if name != "save_every"}
    return facts | {"train": train, "processes": processes, "probed": probed}


def _recipe(objective: Objective, config: TrainConfig, data: Any, depth: int) -> dict[str, Any]:
    """Method, objective, configuration and data hashes, as plain values."""
    lists = {name: getattr(data, name) for name in objective.draws(config)}
    return {
        "method": objective.name,
        "objective": objective.about(depth),
        "train": asdict(config),
        "data": {name: content_hash(rows) for name, rows in lists.items() if rows},
        "builds": [asdict(build) for build in data.builds],
    }


def attach(model: ChatModel, config: TrainConfig, lora: Lora | None = None, name: str = "untrained") -> ChatModel:
    """The model with the LoRA adapter of a configuration, or with all weights in training and a frozen copy.

    Args:
        model: an adapter-free model.
        config: shape of the adapter, its first block, dropout and seed.
        lora: adapted blocks and modules; None is every linear layer of every block.
        name: name of the adapter in results until it is saved.

    Raises:
        ReplibError: the model carries an adapter already, or no block is left to adapt.
    """
    set_seed(config.seed)
    lora = lora or Lora()
    blocks = [i for i in lora.blocks or range(model.n_layers) if i >= config.first_block]
    if config.full:
        tuned = unfrozen(model)
    elif blocks:
        shape: dict[str, Any] = {"rank": config.rank, "alpha": config.lora_alpha, "dropout": config.dropout}
        tuned = attached_lora(model, **shape, blocks=blocks, modules=lora.modules, name=name)
    else:
        raise ReplibError(
            f"first_block={config.first_block} leaves no block to adapt: {model.name} has {model.n_layers}."
        )
    if config.perturbation:
        perturb(tuned, config.perturbation, config.seed)
    if config.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the newer name is not in every transformers 5
            tuned.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    return tuned


FitDefence = Callable[[ChatModel, DefenceData, Objective], TrainResult]
