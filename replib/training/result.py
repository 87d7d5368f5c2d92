"""Result of a training: the model, its logs, and the folder that saves and loads both."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from replib.core.distributed import is_first, trained, wait
from replib.core.storage import replacing
from replib.models.adapters import attached
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.training.checkpoints import check_free

_USE = {
    False: """from replib.models import load

model = load({base!r}, adapter="<this folder>")  # an ordinary peft adapter: PeftModel.from_pretrained reads it too""",
    True: """from replib.models import load

model = load("<this folder>")  # an ordinary transformers model""",
}


def card(about: Mapping[str, Any], probes: pd.DataFrame) -> str:
    """Model card in Markdown, with the header of the hub.

    Args:
        about: ``TrainResult.config`` with ``step``.
        probes: one row a probe.
    """
    full = about["train"]["full"]
    head = ["---", f"base_model: {about['model']}", f"library_name: {'transformers' if full else 'peft'}",
            f"tags: [replib, safety, {about['method']}]", "---"]  # fmt: skip
    tables = {
        "Hyper-parameters": _facts(about["objective"]),
        "Training": _facts(about["train"]),
        "Data, by hash": _facts(about["data"]),
        "Model and versions": _facts({k: v for k, v in about.items() if isinstance(v, str) and v and k != "method"}),
    }
    sections = [f"## {title}\n\n{table}\n" for title, table in tables.items()]
    use = f"```python\n{_USE[full].format(base=about['model'])}\n```\n"
    return "\n".join([*head, f"# {about['model']} + {about['method']}\n", _opening(about, probes), use, *sections])


def _opening(about: Mapping[str, Any], probes: pd.DataFrame) -> str:
    text = f"Step {about['step']} of {about['train']['steps']}, seed {about['train']['seed']}. "
    if about.get("share", 1) < 1:
        text += f"{about['share']} of the change in weights is kept, by validation; the table measures all of it. "
    if probes.empty:
        return text + "Training had no validation; the last step is kept.\n"
    text += "Rates on the validation prompts that chose the step are too good; report an audit on other prompts.\n\n"
    return text + markdown(probes[probes.step.isin([0, about["step"]])].round(3)) + "\n"


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.astype(str).values]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _facts(table: Mapping[str, Any]) -> str:
    return markdown(pd.DataFrame({"name": list(table), "value": [str(v) for v in table.values()]}))


@dataclass(frozen=True)
class TrainResult:
    """The trained model, its logs, and the step that validation chose."""

    model: ChatModel
    history: pd.DataFrame
    """One row a micro-batch: step, loss, safe, unsafe, cosine, kl, (pairing,) unsafe_norm, safe_norm."""
    probes: pd.DataFrame
    """One row a probe: step and the measurements on validation prompts."""
    step: int
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, model: ChatModel, folder: Path | str) -> TrainResult:
        """Attach a saved adapter to its base model; a fully trained model is loaded beside the base."""
        folder = Path(folder)
        config = json.loads((folder / "replib.json").read_text())
        full = config["train"]["full"]
        bent = load(folder, dtype=model.dtype, device=str(model.device)) if full else attached(model, folder)
        history, probes = (pd.read_csv(folder / name) for name in ("history.csv", "probes.csv"))
        return cls(bent, history, probes, config.pop("step"), config)

    @classmethod
    def kept(cls, model: ChatModel, folder: Path | str, make: Callable[[], TrainResult]) -> TrainResult:
        """Load the result of a folder onto the model; if there is none, make it and save it there."""
        if (Path(folder) / "replib.json").exists():
            return cls.load(model, folder)
        made = make()
        made.save(folder)
        return made

    def save(self, folder: Path | str) -> Path:
        """Write a peft adapter (or model) folder with replib.json, a card and both logs, atomically.

        Raises:
            ReplibError: the folder cannot be written, or holds another run or other files.
        """
        folder, about = Path(folder), json.loads(json.dumps(self.config | {"step": self.step}, default=str))
        weights = trained(self.model.model)  # gathered by all processes if split; empty for a loaded adapter
        if is_first():
            self._write(folder, about, weights)
        wait()
        if self.model.frozen is None:
            self.model.adapter = str(folder)
        return folder

    def _write(self, folder: Path, about: dict[str, Any], weights: dict[str, Tensor]) -> None:
        check_free(folder, "replib.json", about)
        with replacing(folder) as partial:
            full = self.model.frozen is not None
            self.model.model.save_pretrained(partial, state_dict=None if full else weights or None)
            if full:
                self.model.tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card(about, self.probes), encoding="utf-8")
            self.history.to_csv(partial / "history.csv", index=False)
            self.probes.to_csv(partial / "probes.csv", index=False)
            (partial / "replib.json").write_text(json.dumps(about, indent=1))


def trained_by(adapter: str) -> str:
    """Method that trained an adapter, read from its record; the folder name if there is no record."""
    record = Path(adapter) / "replib.json"
    return json.loads(record.read_text(encoding="utf-8"))["method"] if record.exists() else Path(adapter).name
