"""A run that is killed goes on bit for bit; what holds another run is not overwritten."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import WITH_HELPERS, resumed, tiny
from helpers.resumed import CONFIG, DATA, drift, outcome, paper, same, stopping, trained
from replib.core.errors import ReplibError
from replib.data.mixtures import BendData
from replib.data.prompts import Dialogue
from replib.defences.repbend.objective import RepBend
from replib.models.load import load
from replib.training.checkpoints import Checkpoints, differences
from replib.training.config import TrainConfig
from replib.training.result import TrainResult
from replib.training.train import attach, train

QUIET = {"say": lambda text: None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The run without a break."""
    return trained(folder, tmp_path_factory.mktemp("whole") / "run")


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# ------------------------------------------------------------------------------------------- going on
@pytest.mark.parametrize("at", [2, 6, 12])
def test_after_an_interrupt_the_same_call_on_the_same_model_goes_on(folder, whole, tmp_path, monkeypatch, at):
    stopping(monkeypatch, at)
    model, out, objective = load(folder), tmp_path / "run", paper()
    before = model.forward(model.encode(["w1 w2"]))
    with pytest.raises(KeyboardInterrupt):
        train(model, DATA, objective, config=CONFIG, validation=drift, out=out, **QUIET)
    assert torch.equal(model.forward(model.encode(["w1 w2"])), before) and not model.provenance()["adapter_hash"]
    assert len(list(out.glob("checkpoint-*"))) == (at > 4)
    result = train(model, DATA, objective, config=CONFIG, validation=drift, out=out, **QUIET)
    assert same(outcome(result), whole) and not out.exists()


def test_checkpoints_change_nothing_and_only_the_newest_is_kept(folder, whole, tmp_path, monkeypatch):
    assert same(trained(folder, tmp_path / "run", save_every=0), whole)
    kept, save = [], Checkpoints.on_save

    def counting(self, *rest, **named):
        save(self, *rest, **named)
        kept.append(sorted(c.name for c in self.folder.glob("checkpoint-*")))

    monkeypatch.setattr(Checkpoints, "on_save", counting)
    assert same(trained(folder, tmp_path / "run"), whole)
    assert kept == [["checkpoint-2"], ["checkpoint-4"], ["checkpoint-6"]] and not list(tmp_path.iterdir())


def test_what_is_kept_between_checkpoints_may_change_on_the_way(folder, whole, tmp_path, monkeypatch):
    stopping(monkeypatch, 12)
    with pytest.raises(KeyboardInterrupt):
        trained(folder, tmp_path / "run")
    assert same(trained(folder, tmp_path / "run", save_every=3), whole)


def test_own_files_hold_no_pickle(folder, tmp_path, monkeypatch):
    stopping(monkeypatch, 12)
    with pytest.raises(KeyboardInterrupt):
        trained(folder, tmp_path)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert json.loads((checkpoint / "state.json").read_text()).keys() == {"history", "rows", "before", "waited", "best"}
    assert {f.suffix for f in checkpoint.glob("state*")} == {".json", ".safetensors"}


def test_a_run_that_keeps_nothing_leaves_its_folder_alone(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    trained(folder, tmp_path, save_every=7)
    trained(folder, tmp_path, save_every=0)
    assert files(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.slow
def test_a_run_killed_at_any_point_goes_on_bit_for_bit(folder, tmp_path):
    """In the middle of each step, while each file of a checkpoint is written, and while the one before is removed."""
    command = [sys.executable, "-m", "helpers.resumed", str(folder), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True, env=WITH_HELPERS)
    said = json.loads(ran.stdout)
    assert len(said) == len(resumed.POINTS)
    for name, (killed, ended, *found) in said.items():
        assert killed == -9 and ended == 0, (name, ran.stderr)
        begun, equal, cleared = found
        assert equal and cleared and len(begun) < 2, name
    begun = {found[0][0] if found[0] else "" for _, _, *found in said.values()}
    assert begun == {"", "checkpoint-2", "checkpoint-4", "checkpoint-6"}


# ------------------------------------------------------------------------------------------- refusals
@pytest.fixture
def stopped(folder, tmp_path, monkeypatch):
    """A folder with a checkpoint."""
    with monkeypatch.context() as patch:
        stopping(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            trained(folder, tmp_path / "run")
    return tmp_path / "run"


OTHER = BendData(DATA.contrasts, [*DATA.retain[1:], Dialogue("w1", "w2")])


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"config": replace(CONFIG, learning_rate=0.5, steps=9)}, r"train.steps: 7 -> 9; train.learning_rate"),
        ({"data": OTHER}, r"data.retain: \w+ -> \w+ \(there"),
        ({"objective": RepBend(replace(paper().config, alpha=0.25))}, r"objective.alpha: 0.5 -> 0.25 \(there"),
        ({"objective": RepBend(paper().config, tokens=64)}, r"objective.tokens: None -> 64"),
        ({"validation": None}, r"probed: True -> False"),
        ({"kind": "gpt2"}, r"fingerprint: \w+ -> \w+"),
    ],
)  # fmt: skip
def test_another_run_is_refused_with_what_differs_and_nothing_is_overwritten(folder, stopped, tmp_path, changed, said):
    before, options = files(stopped), {"config": CONFIG, "validation": drift} | changed
    model = load(tiny.save_model(tmp_path / "other", options.pop("kind")) if "kind" in options else folder)
    data, objective = options.pop("data", DATA), options.pop("objective", paper())
    with pytest.raises(ReplibError, match="holds another run: .*" + said):
        train(model, data, objective, out=stopped, **options, **QUIET)
    assert files(stopped) == before and not model.provenance()["adapter_hash"]


def test_a_folder_with_other_files_or_a_file_is_no_scratch(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ReplibError, match=r"holds other files \(no run.json\)"):
        trained(folder, tmp_path)
    with pytest.raises(ReplibError, match="notes.txt"):
        trained(folder, tmp_path / "notes.txt")
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_differences_name_each_field_on_both_sides():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}) == [
        "a.c: 2 -> 4", "d: 3 -> absent", "e: absent -> 5",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- what is saved
def fresh(folder, **changes):
    config = TrainConfig(steps=1, rank=2, lora_alpha=2, dropout=0.0, perturbation=1e-2, **changes)
    chat = attach(load(folder), config)
    about = {"method": "RepBend", "model": "llama", "objective": {}, "data": {}, "train": vars(config)}
    return TrainResult(chat, *outcome_tables(), 1, about)


def outcome_tables():
    import pandas as pd

    return pd.DataFrame({"step": [1], "loss": [0.5]}), pd.DataFrame({"step": [0]})


def test_an_adapter_is_written_whole_and_read_back(folder, tmp_path):
    result = fresh(folder)
    result.save(tmp_path / "adapter")
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]
    again = TrainResult.load(load(folder), tmp_path / "adapter")
    batch = again.model.encode(["w1 w2"])
    assert torch.equal(again.model.forward(batch), result.model.model.eval() and result.model.forward(batch))
    assert again.step == 1 and again.history["loss"].tolist() == [0.5]


def test_another_adapter_or_other_files_are_not_overwritten(folder, tmp_path):
    fresh(folder).save(tmp_path / "adapter")
    before = files(tmp_path)
    with pytest.raises(ReplibError, match=r"another run: train.seed: 0 -> 1 \(there -> here\)"):
        fresh(folder, seed=1).save(tmp_path / "adapter")
    with pytest.raises(ReplibError, match=r"other files \(no replib.json\)"):
        fresh(folder).save(tmp_path)
    assert files(tmp_path) == before
    fresh(folder).save(tmp_path / "adapter")  # the same run again
    assert files(tmp_path).keys() == before.keys()


def test_a_save_that_was_killed_leaves_no_adapter_and_may_come_again(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fresh(folder).save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    (tmp_path / "adapter.partial").mkdir()  # as SIGKILL leaves it
    fresh(folder).save(tmp_path / "adapter")
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill_and_ends_with_the_same_bytes(tmp_path):
    def command(out):
        options = ["--model", "aligned", "--out", str(out), "--steps", "5", "--save-every", "2", "--limit", "8"]
        return subprocess.Popen([sys.executable, "-m", "replib", "bend", *options], stdout=subprocess.DEVNULL)

    assert command(tmp_path / "whole").wait() == 0
    killed = command(tmp_path / "killed")
    while not list((tmp_path / "killed").rglob("checkpoint-2/state.json")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert not list((tmp_path / "killed").rglob("replib.json"))
    assert command(tmp_path / "killed").wait() == 0
    assert not list((tmp_path / "killed").rglob("checkpoint-*"))
    found = [next((tmp_path / name).rglob("adapter_model.safetensors")).read_bytes() for name in ("whole", "killed")]
    assert found[0] == found[1]
