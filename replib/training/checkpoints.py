"""Checkpoints of a training run, from which the same call resumes after a kill.

out
├── run.json                      identity of the run: model, data, objective, configuration, number of processes
└── checkpoint-<step>             files of the Trainer: adapter, optimizer, schedule, random states
    ├── state-<rank>.safetensors  state of the objective, and the best adapter so far
    └── state.json                history and probes; written last, so that it marks a complete checkpoint
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback

from replib.core.distributed import broadcast, is_first, part, wait
from replib.core.errors import ReplibError
from replib.core.storage import write_tensors, write_text

_RUN, _STATE = "run.json", "state.json"
_BEST, _OBJECTIVE = "best.", "objective."  # prefixes of tensor names in a file


def claim_run_folder(folder: Path, facts: Mapping[str, Any]) -> Path | None:
    """Reserve a scratch folder for this run; returns its newest complete checkpoint, or None.

    Raises:
        ReplibError: the folder holds another run or other files.
    """
    return broadcast(_claimed(folder, json.loads(json.dumps(facts, default=str))) if is_first() else None)


def _claimed(folder: Path, facts: dict[str, Any]) -> Path | None:
    check_free(folder, _RUN, facts)
    if not (folder / _RUN).exists():
        write_text(folder / _RUN, json.dumps(facts, indent=1))
    complete = [c for c in _checkpoints(folder) if (c / _STATE).exists()]
    newest = max(complete, key=_step, default=None)
    _remove(c for c in _checkpoints(folder) if c != newest)
    return newest


def check_free(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Raise ReplibError unless a folder is empty or absent, or its file ``name`` says these facts."""
    if folder.is_file():
        raise ReplibError(f"{folder} is a file: name a folder.")
    if not folder.exists() or {file.name for file in folder.iterdir()} <= {f"{name}.partial"}:
        return
    if not (folder / name).is_file():
        raise ReplibError(f"{folder} holds other files (no {name}): nothing was written. Name an empty or new folder.")
    there = json.loads((folder / name).read_text(encoding="utf-8"))
    if differing := differences(there, facts):
        raise ReplibError(f"{folder} holds another run: {'; '.join(differing)} (there -> here). Nothing was "
                          "overwritten. Name another folder, or remove that one.")  # fmt: skip


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Differences of two nested tables, each as ``field: there -> here``."""
    a, b = _flat(there), _flat(here)
    return [f"{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}" for k in a | b if a.get(k) != b.get(k)]


def _flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
    return found


def release_run_folder(folder: Path) -> None:
    """Remove the checkpoints and the record of a finished run."""
    if is_first():
        _remove(_checkpoints(folder))
        (folder / _RUN).unlink(missing_ok=True)
        with suppress(OSError):  # absent, or holds other files
            folder.rmdir()


def _checkpoints(folder: Path) -> list[Path]:
    return [c for c in folder.glob("checkpoint-*") if c.name.partition("-")[2].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _remove(checkpoints: Any) -> None:
    for checkpoint in checkpoints:
        (checkpoint / _STATE).unlink(missing_ok=True)  # first, so that a checkpoint half removed counts as incomplete
        shutil.rmtree(checkpoint)


class Checkpoints(TrainerCallback):
    """Requests a checkpoint from the Trainer every few steps, completes it, and removes the one before.

    The last step writes none, and neither does an early end of training.

    Args:
        folder: folder reserved by ``claim_run_folder``.
        every: steps between checkpoints.
        trainer: holds the saved history and objective.
        keeper: holds the saved probes and best adapter.
    """

    def __init__(self, folder: Path, every: int, trainer: Any, keeper: Any):
        self.folder, self.every, self.trainer, self.keeper = folder, every, trainer, keeper

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Request a checkpoint at every ``every``-th step."""
        control.should_save |= state.global_step % self.every == 0 and not control.should_training_stop

    def on_save(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Add history, probes, objective state and best adapter to the Trainer's files."""
        here = self.folder / f"checkpoint-{state.global_step}"
        known, best = self.keeper.state()
        own = {_OBJECTIVE + name: x for name, x in self.trainer.objective.state().items()}
        write_tensors(here / _tensors(), own | {_BEST + name: x for name, x in best.items()})
        wait()  # for the files of all processes
        if is_first():
            write_text(here / _STATE, json.dumps({"history": self.trainer.history} | known, default=float))
            _remove(c for c in _checkpoints(self.folder) if c != here)

    def restored(self, checkpoint: Path | None) -> Checkpoints:
        """Restore the files of ``on_save`` if there is a checkpoint; the Trainer restores its own."""
        if checkpoint:
            known = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
            tensors = load_file(checkpoint / _tensors(), device=str(self.trainer.chat.device))
            self.trainer.history.extend(known.pop("history"))
            self.trainer.objective.restore(_named(tensors, _OBJECTIVE))
            self.keeper.restore(known, {name: x.cpu() for name, x in _named(tensors, _BEST).items()})
        return self


def _tensors() -> str:
    return f"state-{part()[0]}.safetensors"


def _named(tensors: Mapping[str, Any], begin: str) -> dict[str, Any]:
    return {name.removeprefix(begin): x for name, x in tensors.items() if name.startswith(begin)}
