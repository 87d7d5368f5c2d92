"""An experiment makes each row once, shares the work between processes, and packs it."""

import json
import sys

import pytest

from replib.core.errors import ReplibError
from replib.core.storage import finished
from replib.experiments import runner
from replib.experiments.runner import Experiment, command_line, packed_text


@pytest.fixture
def made():
    return []


@pytest.fixture
def experiment(tmp_path, made, monkeypatch):
    """Two stages of numbers; the second repeats one, and an odd number above ten is impossible."""
    monkeypatch.setattr(runner, "recorded_file", lambda name: tmp_path / f"{name}.json")
    return Experiment(
        "numbers",
        tmp_path / "rows",
        (lambda: [[1, 2], [3], [4]], lambda: [[4, 10], [11]]),
        key=str,
        make=lambda job: made.append(job) or {"job": job, "square": job * job},
        seconds=lambda job: 60.0,
        describe=lambda row: f"job {row['job']}",
        contents=lambda done: {"limit": 10, "empty": [], "squares": [*done.values()]},
        possible=lambda job, done: job < 11 and (job != 10 or "4" in done),
    )


def test_every_possible_job_is_done_once_in_order(experiment, made, capsys):
    assert experiment.minutes() == 4
    experiment.run()
    assert made == [1, 2, 3, 4, 10] and not experiment.missing()
    experiment.run()
    assert len(made) == 5 and "job 10; 0 core minutes left" in capsys.readouterr().out


def test_a_part_does_its_share_first_and_then_what_the_others_left(experiment, made):
    experiment.run(2, 2)
    assert made == [3, 4, 1, 2, 10]


def test_an_interrupted_run_goes_on(experiment, made):
    def interrupted(job):
        if job == 3:
            raise KeyboardInterrupt
        return {"job": job}

    with pytest.raises(KeyboardInterrupt):
        Experiment(**vars(experiment) | {"make": interrupted}).run(1, 2)
    assert set(finished(experiment.folder)) == {"1", "2", "4"}
    experiment.run()
    assert made == [3, 10]


def test_what_is_packed_comes_back_a_line_a_row(experiment):
    with pytest.raises(ReplibError, match=r"No result in .*rows: run python -m replib\.experiments\.numbers first"):
        experiment.pack()
    experiment.run()
    text = experiment.pack().read_text()
    assert json.loads(text) == experiment.contents(finished(experiment.folder))
    assert text == packed_text(json.loads(text)) and text.count('{"job"') == text.count("\n{") == 5


@pytest.mark.parametrize(("words", "part"), [((), (1, 1)), (("--part", "2"), (2, 2)), (("--part", "3/4"), (3, 4))])
def test_the_command_line_names_the_part(words, part, experiment, monkeypatch):
    seen = []
    monkeypatch.setattr(Experiment, "run", lambda self, *part: seen.append(part))
    monkeypatch.setattr(Experiment, "pack", lambda self: seen.append("packed"))
    monkeypatch.setattr(sys, "argv", ["numbers", *words])
    command_line("Numbers.", lambda _: experiment)
    monkeypatch.setattr(sys, "argv", ["numbers", "--pack"])
    command_line("Numbers.", lambda _: experiment, shared=False)
    assert seen == [part, "packed"]
