"""Several processes of one command: their parts, their devices, and how they wait for each other."""

import threading
import warnings

import pytest
import torch
from torch.distributed import HashStore

from replib.core import distributed as processes
from replib.core import progress
from replib.core.distributed import own_device, part, together
from replib.core.errors import ReplibError


@pytest.fixture
def second_of_two(monkeypatch):
    """The variables that torchrun gives to the second of two processes on one machine."""
    values = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(monkeypatch, second_of_two):
    """A store inside this process, where torchrun's would be."""
    store = HashStore()
    monkeypatch.setattr(processes, "_store", lambda: store)
    monkeypatch.setattr(processes, "PAUSE", 0.01)
    return store


def gpus(monkeypatch, count):
    taken = []
    for name, value in {"is_available": bool(count), "device_count": count, "current_accelerator": "cuda"}.items():
        monkeypatch.setattr(torch.accelerator, name, lambda value=value: value)
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    return taken


def test_a_part_is_what_torchrun_says_and_nothing_else(monkeypatch, second_of_two):
    assert part() == (1, 2)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # a cluster may set the other variables for purposes of its own
    assert part() == (0, 1)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch, second_of_two):
    taken = gpus(monkeypatch, 2)
    assert own_device(None) == own_device("cuda") == "cuda:1" and taken == [1, 1]
    assert (own_device("cpu"), own_device("cuda:0")) == ("cpu", "cuda:0")
    gpus(monkeypatch, 0)
    assert own_device(None) is None


def test_a_single_process_keeps_its_device(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert gpus(monkeypatch, 2) == [] and own_device(None) is None and own_device("auto") == "auto"


def test_too_many_processes_and_a_spread_model_are_refused(monkeypatch, second_of_two):
    gpus(monkeypatch, 1)
    with pytest.raises(ReplibError, match="2 processes, but 1 GPU.*--nproc_per_node=1"):
        own_device(None)
    with pytest.raises(ReplibError, match="start one process"):
        own_device("auto")


def test_one_waits_until_the_other_is_done(store):
    left = []

    def work():
        with together():
            pass
        left.append(1)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(0.3)
    assert not left
    store.add(processes._key(processes.DONE), 1)
    thread.join(5)
    assert left


def test_the_error_of_another_ends_one_that_waits(store):
    store.set(processes._key(processes.FAILED), "no room.")
    with pytest.raises(ReplibError, match="Another process failed: no room. Finished shards are kept"), together():
        pass


@pytest.mark.parametrize("error", [ReplibError("no room."), KeyboardInterrupt()])
def test_an_error_is_told_to_the_others_and_stays_what_it_is(store, error):
    with pytest.raises(type(error)), together():
        raise error
    assert store.get(processes._key(processes.FAILED)).decode() in ("no room.", "KeyboardInterrupt")


def test_a_first_attempt_says_nothing_about_a_second(store, monkeypatch):
    store.set(processes._key(processes.FAILED), "no room.")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    store.add(processes._key(processes.DONE), 1)
    with together():
        pass


def test_others_that_are_gone_are_not_waited_for_without_end(store, monkeypatch):
    monkeypatch.setattr(processes, "LONGEST", 0.05)
    with pytest.raises(ReplibError, match="Only 1 of 2 processes"), together():
        pass
    monkeypatch.setattr(processes, "_store", lambda: (_ for _ in ()).throw(RuntimeError("connection reset")))
    with pytest.raises(ReplibError, match="Lost the other processes .connection reset"), together():
        pass


@pytest.mark.parametrize("rank, said", [("0", 1), ("1", 0)])
def test_only_the_first_process_warns(store, monkeypatch, recwarn, rank, said):
    monkeypatch.setenv("RANK", rank)
    store.add(processes._key(processes.DONE), 1)
    with together():
        warnings.warn("long prompts", stacklevel=1)
    assert len(recwarn) == said


def test_only_the_first_process_shows_a_bar(monkeypatch, second_of_two):
    monkeypatch.setenv("JPY_SESSION_NAME", "x")
    assert not progress.watched()
    monkeypatch.setenv("RANK", "0")
    assert progress.watched()
