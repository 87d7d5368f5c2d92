"""The audit of defended models: who is asked what, what is asked again, and what is packed."""

import json
from copy import copy
from dataclasses import replace

import pytest
import torch

from replib.core.errors import ReplibError
from replib.core.settings import Settings
from replib.experiments import runner
from replib.experiments import transport_audit as defended
from replib.experiments import transport_questions as examiner
from replib.experiments.comparison import SEEDS
from replib.experiments.defence_runs import Bench
from replib.experiments.transport_audit import (
    AUDITED_DEFENCES,
    ONCE,
    REPLANTED,
    SHIPPED,
    TRUTH,
    Subject,
    Subjects,
    audit_of,
    everyone,
    key,
    questions,
)
from replib.experiments.transport_results import TransportAudit
from replib.models.load import load
from replib.organism.build import PLANTED_BLOCKS, STAGES


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return Bench(Settings(out=tmp_path_factory.mktemp("opened")))


@pytest.fixture
def subjects(opened, tmp_path):
    """Subjects of which none is asked yet, and no defence is trained."""
    bench = copy(opened)
    bench.folder = tmp_path / "comparison"
    found = Subjects(bench)
    found.folder = tmp_path / "transport_audit"
    return found


@pytest.fixture
def told(monkeypatch):
    """Answers at no cost, and a list of what was asked."""
    asked = []
    monkeypatch.setattr(defended, "answered", lambda case, question: asked.append(question) or {"said": question})
    monkeypatch.setattr(Subjects, "load", lambda self, subject: self.bench.study.model)
    return asked


def test_one_seed_of_all_comes_before_the_other_seeds():
    all_of_them = everyone()
    assert len(set(all_of_them)) == len(all_of_them)
    seeds = [subject.seed for subject in all_of_them]
    assert seeds == sorted(seeds) and {s.name for s in all_of_them} == {*SHIPPED, *REPLANTED, *AUDITED_DEFENCES}
    several = set(AUDITED_DEFENCES) - set(ONCE)
    assert all({s.seed for s in all_of_them if s.name == name} == set(SEEDS) for name in several)
    assert {s.name for s in all_of_them if s.seed} == several


def test_what_is_planted_elsewhere_does_not_overlap():
    blocks = [block for pair in TRUTH.values() for block in pair]
    assert len(set(blocks)) == len(blocks) and TRUTH["planted"] == PLANTED_BLOCKS
    assert set(questions(Subject("planted"))) == set(examiner.QUESTIONS) and questions(Subject("base")) == ["gaps"]
    assert "places" not in questions(Subject("rmu"))


def test_subjects_and_questions_have_keys_of_their_own(subjects):
    keys = [key(subjects, subject, question) for subject in everyone() for question in questions(subject)]
    assert len(set(keys)) == len(keys)


def test_defences_that_are_not_trained_yet_are_left_out(subjects):
    names = {subject.name for subject, _ in audit_of(subjects).missing()}
    assert names == {*SHIPPED, *REPLANTED}
    adapter = subjects.weights(Subject("sft", 3))
    adapter.mkdir(parents=True)
    assert {s for s, _ in audit_of(subjects).missing()} - {Subject(name) for name in names} == {Subject("sft", 3)}


def test_the_audit_goes_on_where_it_stopped(subjects, told, monkeypatch, capsys):
    whole = audit_of(subjects).missing()
    assert audit_of(subjects).minutes() > 4 * defended.TRAINING / 60

    def interrupted(case, question):
        if len(told) == 3:
            raise KeyboardInterrupt
        return told.append(question) or {"said": question}

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(defended, "answered", interrupted)
        audit_of(subjects).run()
    assert len(told) == 3 and audit_of(subjects).missing() == whole[3:]
    audit_of(subjects).run()
    assert told == [question for _, question in whole] and not audit_of(subjects).missing()
    assert "not trained yet" in capsys.readouterr().out


def test_what_is_packed_is_what_was_answered(subjects, told, monkeypatch, tmp_path):
    with pytest.raises(ReplibError, match="No result in"):
        audit_of(subjects).pack()
    audit_of(subjects).run()
    monkeypatch.setattr(runner, "recorded_file", lambda name: tmp_path / f"{name}.json")
    found = TransportAudit.load(audit_of(subjects).pack())
    assert found.names("gaps") == [*SHIPPED, *REPLANTED] and found.answers("deep", "tokens") == [{"said": "tokens"}]
    assert json.loads(json.dumps(found.about["design"])) == json.loads(json.dumps(examiner.DESIGN))
    assert found.subjects[2]["planted"] == list(PLANTED_BLOCKS)


@pytest.mark.slow
def test_a_model_planted_elsewhere_is_trained_there_alone_and_once(subjects, monkeypatch):
    subject = Subject("planted_9_10")
    short = replace(STAGES["planted"], steps=1)
    monkeypatch.setitem(STAGES, "planted", short)
    model, base = subjects.load(subject), load("base")
    moved = [
        i
        for i, pair in enumerate(zip(model.blocks, base.blocks, strict=True))
        if any(not torch.equal(a, b) for a, b in zip(*(x.parameters() for x in pair), strict=True))
    ]
    assert moved == [9, 10]
    monkeypatch.delitem(STAGES, "planted")  # what is there is read
    assert subjects.load(subject).provenance()["fingerprint"] == model.provenance()["fingerprint"]
