"""A small training run that is killed and goes on: the script and the parts that the tests of checkpoints share.

As a script it kills one run at every point where it can be, lets each go on, and says which result differs.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from replib.core import storage as store
from replib.data.mixtures import BendData
from replib.data.prompts import Contrast, Dialogue
from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import RepBend
from replib.models.load import load
from replib.training import checkpoints
from replib.training.config import TrainConfig
from replib.training.train import train
from replib.training.trainer import DefenceTrainer

CONTRASTS = [Contrast(f"w{i} w{i + 1}", "w30 w31", "w32 w33 w34") for i in range(4)]
DATA = BendData(CONTRASTS, [Dialogue(f"w{i} w9", f"w{i} w8") for i in range(4)])
# Dropout, accumulation and the paper's queue: all that a step hands on to the next.
CONFIG = TrainConfig(
    steps=7, accumulation=2, contrasts=2, retain=2, rank=2, lora_alpha=2, dropout=0.2, learning_rate=1e-2,
    probe_every=2, save_every=2, schedule="linear",
)  # fmt: skip


def paper():
    return RepBend(BendConfig(fidelity="paper", target_layers=(1, 2)))


def drift(chat):
    """A probe that depends on the weights, and is best in the middle."""
    size = sum(p.detach().abs().sum().item() for n, p in chat.model.named_parameters() if "lora_B" in n)
    return {"attack": abs(size - 8.0)}


def trained(folder, out, **changes):
    """Every bit that a run gives."""
    result = train(
        load(folder), DATA, paper(), config=replace(CONFIG, **changes), validation=drift, out=out, say=lambda _: None
    )
    return outcome(result)


def stopping(monkeypatch, at):
    """Ctrl-C in the n-th micro-batch; once."""
    step, calls = DefenceTrainer.training_step, []

    def stopped(self, *rest):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return step(self, *rest)

    monkeypatch.setattr(DefenceTrainer, "training_step", stopped)


def outcome(result):
    lora = {n: p.detach().clone() for n, p in result.model.model.named_parameters() if "lora_" in n}
    return lora, result.history.to_dict("list"), result.probes.to_dict("list"), result.step


def same(a, b):
    weights = a[0].keys() == b[0].keys() and all(torch.equal(x, b[0][n]) for n, x in a[0].items())
    return weights and str(a[1:]) == str(b[1:])  # as text: NaN is not itself


# ------------------------------------------------------------------------------------------- faults
def dying(before=None):
    """A function that kills this process at its n-th call, after ``before``."""

    def at(owner, name, n):
        whole, calls = getattr(owner, name), []

        def faulty(*args, **kwargs):
            calls.append(1)
            if len(calls) == n:
                if before:
                    before(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)

        setattr(owner, name, faulty)

    return at


def half(_, path, *__):
    """The beginning of a file."""
    Path(path).write_bytes(b"PK\x03\x04half")


POINTS = (
    [(f"micro-batch {n}", dying(), (DefenceTrainer, "training_step", n)) for n in (1, 5, 10, 14)]
    + [(f"backward {n}", dying(), (torch.Tensor, "backward", n)) for n in (8, 17)]
    + [(f"torch.save {n}", dying(half), (torch, "save", n)) for n in range(5, 9)]  # those of the second checkpoint
    + [(f"tensors {n}", dying(), (checkpoints, "write_tensors", n)) for n in (1, 2)]
    + [(f"mark {n}", dying(), (checkpoints, "write_text", n)) for n in (1, 2, 3)]
    + [(f"rename {n}", dying(), (store.os, "replace", n)) for n in (1, 4, 5)]
    + [(f"removal {n}", dying(), (checkpoints.shutil, "rmtree", n)) for n in (1, 2, 3)]
)  # fmt: skip


def forked(work):
    """Exit status of some work in a process of its own."""
    if not (child := os.fork()):
        try:
            work()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder, scratch):
    """Kill, go on and compare, point by point."""
    forked(lambda: torch.save(trained(folder, scratch / "whole"), scratch / "whole.pt"))
    whole, said = torch.load(scratch / "whole.pt", weights_only=False), {}
    for number, (name, kill, where) in enumerate(POINTS):
        out = scratch / str(number)

        def first(kill=kill, where=where, out=out):
            kill(*where)
            trained(folder, out)

        def second(out=out, number=number):
            begun = sorted(c.parent.name for c in out.glob("*/state.json"))
            equal = same(trained(folder, out), whole)
            (scratch / f"{number}.json").write_text(json.dumps([begun, equal, not out.exists()]))

        killed, ended = forked(first), forked(second)
        found = json.loads((scratch / f"{number}.json").read_text()) if not ended else []
        said[name] = [killed, ended, *found]
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
