"""``replib capture``: what it writes, what it says before, how it goes on, and several processes that share it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from importlib import import_module

import pytest
import torch
from safetensors import safe_open

from helpers import tiny
from helpers.tolerance import close
from replib.activations.capture import capture, capture_cost, capture_to
from replib.activations.store import Activations, Shards
from replib.cli import app as cli
from replib.core.errors import ReplibError
from replib.data.prompts import load_prompts
from replib.models.load import load

PROMPTS = [f"w{i % 40} " * (1 + i % 7) + f"w{i}" for i in range(22)]
LABELS = ["harmful", "harmless"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"text": p, "label": LABELS[i % 2]} for i, p in enumerate(PROMPTS)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def arguments(folder, prompts, tmp_path):
    return ["capture", "--model", str(folder), "--prompts", str(prompts), "--out", str(tmp_path), "--shard", "4"]


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def size(folder):
    """Bytes of all tensors of a folder."""
    total = 0
    for file in folder.glob("shard-*"):
        with safe_open(file, "pt") as opened:
            total += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    return total


def test_it_writes_what_capture_to_writes_and_says_the_price_and_the_folder(arguments, model, tmp_path, capsys):
    more = (
        "--site resid_mid,mlp_out --layers -1,0 --positions -2,instruction --stored-dtype bfloat16 --system w1".split()
    )
    assert cli.main([*arguments, *more, "--name", "mine"]) == 0
    wanted = {"site": ["resid_mid", "mlp_out"], "layers": [-1, 0], "positions": [-2, "instruction"], "system": "w1"}
    options = wanted | {"dtype": torch.bfloat16, "labels": LABELS * 11, "shard": 4, "batch_size": 128}
    written = tmp_path / "activations" / "mine"
    assert contents(written) == contents(capture_to(model, PROMPTS, tmp_path / "other", **options))
    said = capsys.readouterr().out.splitlines()
    tokens = sum(len(row) for row in model.tokenize(PROMPTS, system="w1"))
    assert said[0].startswith(f"22 prompts, {tokens:,} tokens, {size(written) / 1e9:.3g} GB on disk in 6 shards, 0 of")
    assert said[-1] == f"wrote {written}"


def test_both_classes_of_the_settings_are_labelled(tmp_path):
    limits = ["--limit", "5", "--layers", "0", "--seed", "3"]
    assert cli.main(["capture", "--out", str(tmp_path), *limits]) == 0
    acts = Activations.load(tmp_path / "activations" / "aligned")
    assert acts.labels == ("harmful",) * 5 + ("harmless",) * 5
    texts = [p.text for p in load_prompts("organism/harmless", limit=5, seed=3)]
    expected = capture(load("aligned"), texts, layers=[0]).values
    close(acts.where("harmless").values, expected)


def test_unlabelled_prompts_stay_so_and_an_adapter_names_the_folder(arguments, folder, tmp_path):
    tiny.save_adapter(tmp_path / "lora", folder)
    (tmp_path / "plain.txt").write_text("w1\nw2 w3\n")
    more = ["--prompts", str(tmp_path / "plain.txt"), "--adapter", str(tmp_path / "lora")]
    assert cli.main([*arguments, *more]) == 0
    assert Activations.load(tmp_path / "activations" / "llama+lora").labels == ()


def test_what_is_there_is_kept_and_counted(arguments, tmp_path, capsys):
    cli.main(arguments)
    written = tmp_path / "activations" / "llama"
    before = contents(written)
    (written / "shard-00002.safetensors").unlink()
    times = {file: file.stat().st_mtime_ns for file in written.glob("shard-*")}
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert "6 shards, 5 of them there already" in capsys.readouterr().out
    assert contents(written) == before and all(file.stat().st_mtime_ns == stamp for file, stamp in times.items())


def test_an_interrupt_keeps_finished_shards_and_the_same_command_goes_on(arguments, tmp_path, monkeypatch, capsys):
    write, done = Shards.write, []

    def stopping(self, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        write(self, number, *rest)
        done.append(number)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", stopping)
        assert cli.main(arguments) == 130
    assert done == [0, 1] and "the same command goes on from there" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert "2 of them there already" in capsys.readouterr().out
    cli.main([*arguments, "--name", "whole"])
    assert contents(tmp_path / "activations" / "llama") == contents(tmp_path / "activations" / "whole")


@pytest.mark.parametrize(
    "wrong, repair",
    [
        (["--layers", "1,x"], "write for example 0,5,-1"),
        (["--layers", "1,,2"], "write for example 0,5,-1"),
        (["--layers", "-9"], "it has 3 blocks, 0 to 2"),
        (["--positions", ""], "write for example last_prompt,-2"),
        (["--positions", "middle"], "use last_prompt, instruction"),
        (["--site", "resid"], "use one of resid_pre"),
        (["--pool", "max"], "write mean or none"),
        (["--pool", "none"], "takes one span"),
        (["--max-new-tokens", "-1"], "whole number of 0 or more"),
        (["--shard", "0"], "whole number of 1 or more"),
        (["--stored-dtype", "int8"], "write float32 or bfloat16"),
        (["--overflow", "wrap"], "write refuse or truncate"),
        (["--prompts", "none.csv"], "none.csv"),
    ],
)
def test_a_bad_value_is_refused_with_what_to_write_and_writes_nothing(wrong, repair, arguments, tmp_path, capsys):
    assert cli.main([*arguments, *wrong]) == 2
    assert repair in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_misspelt_site_or_position_is_refused_before_the_model_is_loaded(arguments, monkeypatch):
    monkeypatch.setattr(import_module("replib.models.load"), "load", lambda *_a, **_k: pytest.fail("loaded"))
    assert cli.main([*arguments, "--site", "resid"]) == cli.main([*arguments, "--positions", "last"]) == 2


def test_a_foreign_model_needs_its_own_prompts(folder, tmp_path, capsys):
    assert cli.main(["capture", "--model", str(folder), "--out", str(tmp_path)]) == 2
    assert "set REPLIB_HARMFUL" in capsys.readouterr().err


@pytest.mark.parametrize("part", [(0, 2), (1, 2)])
def test_no_process_adds_to_another_capture(model, tmp_path, part):
    capture_to(model, PROMPTS[:4], tmp_path / "acts", shard=4)
    before = contents(tmp_path / "acts")
    with pytest.raises(ReplibError, match=r"another capture \(its layers differ\)"):
        capture_to(model, PROMPTS, tmp_path / "acts", shard=4, layers=[1], part=part)
    assert contents(tmp_path / "acts") == before


def test_fewer_prompts_than_a_folder_holds_are_refused(model, tmp_path):
    capture_to(model, PROMPTS, tmp_path / "acts", shard=4)
    with pytest.raises(ReplibError, match="holds more prompts than these"):
        capture_to(model, PROMPTS[:8], tmp_path / "acts", shard=4)


@pytest.mark.parametrize("span", ["instruction", "post_instruction", "prompt", "response", "all"])
def test_the_price_of_single_tokens_is_what_they_take(model, tmp_path, span):
    options = {"positions": span, "pool": "none", "responses": ["w1 w2"] * 11 + ["w3"] * 11, "layers": [0, 2]}
    said = capture_cost(model, PROMPTS, tmp_path / "acts", shard=5, **options)
    capture_to(model, PROMPTS, tmp_path / "acts", shard=5, **options)
    assert said.size == said.missing == size(tmp_path / "acts")
    again = capture_cost(model, PROMPTS, tmp_path / "acts", shard=5, **options)
    assert (again.missing, again.there, again.size) == (0, 5, said.size)


def test_the_price_of_written_answers_is_a_bound(model, tmp_path):
    options = {"positions": "response", "pool": "none", "max_new_tokens": 3}
    said = capture_cost(model, PROMPTS, tmp_path / "acts", **options)
    assert said.written == 66 and "+ at most 66 written" in str(said)
    capture_to(model, PROMPTS, tmp_path / "acts", **options)
    assert size(tmp_path / "acts") <= said.size


def test_a_disk_without_room_is_noticed_before(model, tmp_path, monkeypatch):
    needed = capture_cost(model, PROMPTS, tmp_path / "acts").size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    with pytest.raises(ReplibError, match="has room for .* REPLIB_OUT"):
        capture_cost(model, PROMPTS, tmp_path / "acts")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    capture_cost(model, PROMPTS, tmp_path / "acts")


# The command, with a fault on one rank before its second shard: $FAULT.
FAULTY = """
import os, signal, sys, time
from replib import cli
from replib.activations.store import Shards
from replib.core import errors
write, done = Shards.write, []
def faulty(self, *rest):
    fault = os.environ["FAULT"] if os.environ["RANK"] == "1" and done else ""
    if fault == "error":
        time.sleep(2)  # by now the other one waits
        raise errors.ReplibError("the disk of rank 1 is gone.")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["FAULT"] == "slow" and done:
        time.sleep(600)
    write(self, *rest)
    done.append(1)
Shards.write = faulty
raise SystemExit(cli.main())
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def environment(fault=""):
    single = {"OMP_NUM_THREADS": "1", "REPLIB_DEVICE": "cpu"}  # the bytes of a sum depend on its threads
    return os.environ | single | {"FAULT": fault}


def ran(*command, fault=""):
    return subprocess.run(command, env=environment(fault), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def one(arguments, tmp_path):
    """Bytes that one process writes."""
    assert ran(sys.executable, "-m", "replib", *arguments, "--name", "one").returncode == 0
    return contents(tmp_path / "activations" / "one")


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one_and_only_the_first_speaks(arguments, tmp_path, one):
    two = ran(*TORCHRUN, "-m", "replib", *arguments)
    assert two.returncode == 0, two.stderr
    assert contents(tmp_path / "activations" / "llama") == one
    assert len(two.stdout.splitlines()) == 2 and two.stdout.count("22 prompts") == two.stdout.count("wrote") == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault, reason", [("error", "the disk of rank 1 is gone."), ("kill", "Signal 9")])
def test_a_failure_of_one_ends_all_and_a_second_run_completes(fault, reason, arguments, tmp_path, one):
    (tmp_path / "faulty.py").write_text(FAULTY)
    start = time.monotonic()
    failed = ran(*TORCHRUN, str(tmp_path / "faulty.py"), *arguments, fault=fault)
    assert failed.returncode not in (0, None) and time.monotonic() - start < 60
    assert reason in failed.stderr
    written = tmp_path / "activations" / "llama"
    kept = {name: data for name, data in contents(written).items() if name.endswith(".safetensors")}
    assert kept and "activations.json" not in contents(written)
    assert all(one[name] == data for name, data in kept.items())
    stamp = (written / "shard-00001.safetensors").stat().st_mtime_ns
    assert ran(*TORCHRUN, "-m", "replib", *arguments).returncode == 0
    assert (written / "shard-00001.safetensors").stat().st_mtime_ns == stamp
    assert {name: data for name, data in contents(written).items() if "partial" not in name} == one


@pytest.mark.slow
def test_an_interrupt_of_all_is_said_once_and_keeps_finished_shards(arguments, tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    written = tmp_path / "activations" / "llama"
    command = [*TORCHRUN, str(tmp_path / "faulty.py"), *arguments]
    process = subprocess.Popen(command, env=environment("slow"), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while len(list(written.glob("shard-*.safetensors"))) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.count("the same command goes on from there") == 1
    assert len(list(written.glob("shard-*.safetensors"))) == 2
