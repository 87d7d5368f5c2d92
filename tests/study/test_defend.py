"""Any defence by its name, in a study: its values, its folder, and what is not made twice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replib.cli.commands import run_defend
from replib.core.errors import ReplibError
from replib.core.settings import Settings
from replib.defences.catalogue import DEFENCES, Baseline
from replib.defences.organism_grid import ORGANISM
from replib.defences.preference import DPO, NPO
from replib.defences.sft import SFT
from replib.defences.task_arithmetic import TaskArithmetic
from replib.defences.whp import WHP
from replib.study import training as module
from replib.study.study import Study
from replib.study.training import baseline_for, defend, paper_mix
from replib.training.config import TrainConfig

FEW = TrainConfig(steps=2, learning_rate=1e-3, contrasts=2, retain=2, dropout=0.0, probe_every=2, save_every=0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Eight contrasts are read, and probes ask one prompt a task."""
    monkeypatch.setattr("replib.study.study.SORTED", 8)
    validation = Study.validation_measure
    monkeypatch.setattr(Study, "validation_measure", lambda self: validation(self, 1))


@pytest.fixture
def study(tmp_path):
    return lambda: Study.open(Settings(out=tmp_path, limit=4))


def test_values_are_the_organisms_or_those_of_the_source(study):
    here = study()
    assert baseline_for(here, "sft") == ORGANISM["sft"]
    with pytest.raises(ReplibError, match="'repbend'.*sft, dpo"):
        baseline_for(here, "repbend")
    elsewhere = replace(here, settings=replace(here.settings, harmful="advbench.csv"))
    assert baseline_for(elsewhere, "whp_retain") == DEFENCES["whp_retain"]


@pytest.mark.parametrize(
    ("objective", "trainings"),
    [
        pytest.param(NPO(), 1, marks=pytest.mark.slow),
        pytest.param(WHP(), 2, marks=pytest.mark.slow),
        (TaskArithmetic(((1.0, 0.0), (1.0, 0.3))), 2),
    ],
)
def test_a_defence_is_kept_with_a_card_and_read_again(objective, trainings, study, monkeypatch):
    made, train = [], module.train

    def counted(model, data, objective, **how):
        made.append(how["validation"] is None if "validation" in how else True)
        return train(model, data, objective, **how)

    monkeypatch.setattr(module, "train", counted)
    first = defend(study(), "some", Baseline(objective, FEW))
    assert len(made) == trainings
    text = (Path(first.model.adapter) / "README.md").read_text()
    assert objective.name in text and "attack" in text
    again = defend(study(), "some", Baseline(objective, FEW))
    assert len(made) == trainings
    batch = again.model.encode(["Repeat: sun moon"])
    with torch.no_grad():
        torch.testing.assert_close(again.model.forward(batch), first.model.forward(batch))


@pytest.mark.slow
def test_what_only_leads_to_a_defence_is_not_trained_twice(study, monkeypatch):
    train = module.train

    def stops(model, data, objective, **how):
        if isinstance(objective, WHP):
            raise KeyboardInterrupt
        return train(model, data, objective, **how)

    monkeypatch.setattr(module, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        defend(study(), "whp", Baseline(WHP(), FEW))

    def only_whp(model, data, objective, **how):
        assert not isinstance(objective, SFT), "trained again"
        return train(model, data, objective, **how)

    monkeypatch.setattr(module, "train", only_whp)
    assert defend(study(), "whp", Baseline(WHP(), FEW)).config["method"] == "WHP"


def test_the_verb_changes_single_values(tmp_path):
    folder = run_defend("rmu", settings=Settings(out=tmp_path, limit=4), steps=2, learning_rate=1e-4)
    assert '"steps": 2' in (folder / "replib.json").read_text() and "aligned-rmu-" in folder.name
    with pytest.raises(ReplibError, match="No defence is called 'rmuu'"):
        run_defend("rmuu", settings=Settings(out=tmp_path, limit=4))


def test_a_papers_mix_is_read_by_name_and_its_run_has_a_folder_of_its_own(study):
    rows = {mix: paper_mix(study(), mix) for mix in ("repbend", "circuit_breaker")}
    assert all(row.safe and row.pairs for row in rows.values()) and rows["repbend"] != rows["circuit_breaker"]
    folders = {defend(study(), "dpo", Baseline(DPO(), FEW), mix=mix).model.adapter for mix in (None, "circuit_breaker")}
    assert len(folders) == 2
    with pytest.raises(ReplibError, match="mix"):
        paper_mix(study(), "repbent")
    with pytest.raises(ReplibError, match="breakers, xstest, chat"):
        paper_mix(study(), "circuit_breaker", {"breaker": "a.json"})
    elsewhere = replace(study(), settings=replace(study().settings, harmful="advbench.csv"))
    with pytest.raises(ReplibError, match="circuit_breakers_train.json has no source"):
        paper_mix(elsewhere, "circuit_breaker")


def test_task_arithmetic_is_not_merged_by_several_processes(study, monkeypatch):
    monkeypatch.setattr("replib.defences.task_arithmetic.part", lambda: (0, 2))
    with pytest.raises(ReplibError, match="without torchrun"):
        defend(study(), "task_arithmetic", Baseline(TaskArithmetic(), FEW))
