"""Hardening in one call: its values for a model, what few prompts allow, its folder, and what is not made twice."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers import tiny
from replib.cli.commands import run_harden
from replib.core.errors import ReplibError
from replib.core.settings import Settings
from replib.defences.adversary import EditDistribution
from replib.defences.hardening import Hardening
from replib.defences.repbend.objective import RepBend
from replib.study import training as module
from replib.study.study import Study
from replib.study.training import ELSEWHERE, HARDENING, TRAIN, harden, hardened, inner_of, schedule

FEW = {"steps": 2, "contrasts": 2, "retain": 2, "probe_every": 2, "save_every": 0}
SMALL = Hardening(
    edits=1, plain=1, rows=1, arsenal=EditDistribution(ks=(1,), prompts=4, reads=("last_prompt", "response"))
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    for name, word in (("harmful", "w1"), ("harmless", "w2")):
        rows = [f"w{i % 40} {word} w{i // 3} w{i % 7}" for i in range(80)]
        pd.DataFrame({"prompt": rows}).to_csv(folder / f"{name}.csv", index=False)
    model = tiny.save_model(folder / "model")
    files = {name: str(folder / f"{name}.csv") for name in ("harmful", "harmless")}
    return Settings(model=str(model), out=folder / "out", seed=3, limit=4, **files)


def test_values_are_those_of_the_organism_or_milder(settings):
    organism, other = Study.open(Settings()), Study.open(settings)
    assert schedule(organism) == TRAIN and schedule(other) == replace(ELSEWHERE, seed=3)
    assert ELSEWHERE.learning_rate < TRAIN.learning_rate
    assert isinstance(inner_of(other, "repbend"), RepBend) and inner_of(other, "retention").name == "retention"
    with pytest.raises(ReplibError, match="inner='sft'"):
        inner_of(other, "sft")


def test_few_prompts_fit_edits_of_fewer_components(settings):
    objective = hardened(Study.open(settings))
    arsenal, rows = objective.hardening.arsenal, min(len(objective.harmful), len(objective.harmless))
    assert rows < HARDENING.arsenal.prompts == 48 and arsenal.prompts == rows and max(arsenal.ks) < rows
    assert objective.seed == 3 and hardened(Study.open(settings), hardening=SMALL).hardening == SMALL
    arsenal.check(3, objective.harmful, objective.harmless)
    assert EditDistribution().within(9).ks == (1, 2, 8) and EditDistribution().within(48) == EditDistribution()
    with pytest.raises(ReplibError, match="cannot fit K"):
        EditDistribution().within(1)


def test_it_is_kept_with_its_share_and_read_again(settings, monkeypatch):
    config, made, train = replace(schedule(Study.open(settings)), **FEW), [], module.train
    monkeypatch.setattr(module, "train", lambda *a, **how: (made.append(a), train(*a, **how))[1])
    first, again = (harden(Study.open(settings), hardening=SMALL, config=config) for _ in range(2))
    assert len(made) == 1 and again.config["share"] == first.config["share"] in (1.0, 0.85, 0.7)
    assert {"edited", "prefill", "attack"} <= set(first.probes.columns)
    batch = again.model.encode(["w1 w2"])
    with torch.no_grad():
        torch.testing.assert_close(again.model.forward(batch), first.model.forward(batch))
    harden(Study.open(settings), inner_of(Study.open(settings), "retention"), SMALL, config)
    assert len(made) == 2


def test_the_command_passes_what_was_changed(settings, monkeypatch):
    seen = {}

    def noting(study, inner, *, config):
        seen.update(inner=inner.name, config=config)
        study.model.adapter = "folder"
        return type("Result", (), {"model": study.model})

    monkeypatch.setattr("replib.study.training.harden", noting)
    assert run_harden(settings=settings, inner="retention", steps=7) == Path("folder")
    assert seen == {"inner": "retention", "config": replace(ELSEWHERE, seed=3, steps=7)}
    assert run_harden(settings=settings) == Path("folder") and seen["inner"] == "RepBend"
