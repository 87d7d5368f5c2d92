"""Activations on disk: bits kept, slices read alone, damage noticed, a killed capture gone on with."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from helpers import tiny
from helpers.tolerance import close
from replib.activations import store as shards
from replib.activations.capture import capture, capture_to, finish_capture
from replib.activations.store import Activations
from replib.core.errors import ReplibError
from replib.models.load import load

PROMPTS = [f"w{i % 40} " * (1 + i % 7) for i in range(22)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saving_keeps_every_bit_and_the_provenance(model, tmp_path, dtype):
    acts = capture(model, PROMPTS, positions=["last_prompt", -2], dtype=dtype, labels=["a", "b"] * 11)
    again = Activations.load(acts.save(tmp_path / "acts", shard=5))
    assert again.values.dtype == dtype and torch.equal(acts.values, again.values)
    for name in ("layers", "positions", "site", "labels", "provenance"):
        assert getattr(again, name) == getattr(acts, name)
    assert not list(tmp_path.rglob("*.partial*"))


def test_what_is_captured_to_a_folder_is_what_is_captured(model, tmp_path):
    wanted = {"positions": [-1, -2], "layers": [2, 0]}
    written = Activations.load(capture_to(model, PROMPTS, tmp_path / "acts", shard=6, **wanted))
    close(written.values, capture(model, PROMPTS, **wanted).values)
    assert written.provenance == capture(model, PROMPTS, **wanted).provenance
    assert len(list((tmp_path / "acts").glob("shard-*"))) == 4


def test_single_tokens_keep_their_prompt_across_shards(model, tmp_path):
    acts = capture(model, PROMPTS, positions="prompt", pool="none")
    again = Activations.load(capture_to(model, PROMPTS, tmp_path / "a", shard=5, positions="prompt", pool="none"))
    assert torch.equal(acts.prompt, again.prompt)
    close(acts.values, again.values)
    some = Activations.load(tmp_path / "a", prompts=range(3, 12))
    assert torch.equal(some.values, again.of(range(3, 12)).values)
    assert torch.equal(some.prompt, again.of(range(3, 12)).prompt)
    assert torch.equal(Activations.load(acts.save(tmp_path / "b", shard=4)).prompt, acts.prompt)


def test_a_slice_reads_only_its_own_tensors(model, tmp_path, monkeypatch):
    acts = capture(model, PROMPTS, labels=[str(i) for i in range(22)])
    acts.save(tmp_path / "acts", shard=4)
    touched = []
    checked = shards._checked
    monkeypatch.setattr(
        shards, "_checked", lambda path, names: touched.append((path.name, *names)) or checked(path, names)
    )
    part = Activations.load(tmp_path / "acts", layers=[1], prompts=range(5, 9))
    assert torch.equal(part.values, acts.values[1:2, 5:9]) and part.labels == ("5", "6", "7", "8")
    assert touched == [(f"shard-0000{i}.safetensors", "resid_post.1") for i in (1, 2)]


def test_several_sites_in_one_folder(model, tmp_path):
    capture_to(model, PROMPTS, tmp_path / "acts", site=("resid_mid", "mlp_out"))
    mid = Activations.load(tmp_path / "acts", site="resid_mid")
    close(mid.values, capture(model, PROMPTS, site="resid_mid").values)
    with pytest.raises(ReplibError, match="holds resid_mid, mlp_out: choose"):
        Activations.load(tmp_path / "acts")


# Stops itself with SIGKILL after two shards.
KILLED = """
import os, signal, sys
from replib import capture_to, load
from replib.activations import store
write, done = store.Shards.write, []
def dying(self, *args):
    write(self, *args)
    done.append(1)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
store.Shards.write = dying
capture_to(load(sys.argv[1]), sys.argv[3:], sys.argv[2], shard=4)
"""


def test_a_killed_capture_goes_on_and_gives_the_same_bytes(folder, model, tmp_path, monkeypatch):
    whole = capture_to(model, PROMPTS, tmp_path / "whole", shard=4)
    arguments = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed"), *PROMPTS]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob("shard-*"))) == 2
    with pytest.raises(ReplibError, match="only 2 shards of an unfinished capture"):
        Activations.load(tmp_path / "killed")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("shard-*")}
    capture_to(model, PROMPTS, tmp_path / "killed", shard=4)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in times.items())
    assert contents(whole) == contents(tmp_path / "killed")


def test_more_prompts_are_appended_and_the_full_shards_kept(model, tmp_path):
    capture_to(model, PROMPTS[:10], tmp_path / "acts", shard=4)
    kept = tmp_path / "acts" / "shard-00001.safetensors"
    stamp = kept.stat().st_mtime_ns
    time.sleep(0.01)
    capture_to(model, PROMPTS, tmp_path / "acts", shard=4)
    assert kept.stat().st_mtime_ns == stamp
    assert contents(tmp_path / "acts") == contents(capture_to(model, PROMPTS, tmp_path / "once", shard=4))


def test_nothing_of_another_capture_is_overwritten(model, tmp_path):
    capture_to(model, PROMPTS, tmp_path / "acts", shard=4)
    before = contents(tmp_path / "acts")
    with pytest.raises(ReplibError, match=r"another capture \(its layers differ\)"):
        capture_to(model, PROMPTS, tmp_path / "acts", shard=4, layers=[1])
    with pytest.raises(ReplibError, match="activations of other prompts"):
        capture_to(model, PROMPTS[::-1], tmp_path / "acts", shard=4)
    assert contents(tmp_path / "acts") == before


def test_parts_of_several_processes_make_the_bytes_of_one(model, tmp_path):
    for i in (1, 0):
        capture_to(model, PROMPTS, tmp_path / "parts", shard=4, part=(i, 2))
        if i:
            with pytest.raises(ReplibError, match=r"shard-00000.* is missing"):
                finish_capture(model, PROMPTS, tmp_path / "parts", shard=4)
    finish_capture(model, PROMPTS, tmp_path / "parts", shard=4)
    assert contents(tmp_path / "parts") == contents(capture_to(model, PROMPTS, tmp_path / "one", shard=4))


def test_a_flipped_bit_is_noticed_and_named(model, tmp_path):
    capture(model, PROMPTS).save(tmp_path / "acts")
    file = tmp_path / "acts" / "shard-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ReplibError, match=r"shard-00000.safetensors is damaged: the checksum"):
        Activations.load(tmp_path / "acts")
    file.write_bytes(data[:100])
    with pytest.raises(ReplibError, match=r"shard-00000.safetensors cannot be read"):
        Activations.load(tmp_path / "acts")


def test_provenance_is_readable_without_us(model, tmp_path):
    about = json.loads((capture_to(model, PROMPTS, tmp_path / "acts") / "activations.json").read_text())
    assert about["prompts"] == [22] and about["sites"] == ["resid_post"]
    told = {
        "model",
        "revision",
        "fingerprint",
        "adapter_hash",
        "template",
        "prompts",
        "positions",
        "stored",
        "torch",
        "n",
    }
    assert told <= set(about["provenance"])
    with safe_open(tmp_path / "acts" / "shard-00000.safetensors", "pt") as file:
        assert set(file.keys()) == {f"resid_post.{i}" for i in range(3)}
    assert (tmp_path / "acts" / "shard-00000.safetensors").stat().st_mode & 0o044 == 0o044  # others too


def test_what_is_not_there_is_named(model, tmp_path):
    with pytest.raises(ReplibError, match="holds no activations. Capture first"):
        Activations.load(tmp_path)
    capture(model, PROMPTS, layers=[1]).save(tmp_path / "acts")
    with pytest.raises(ReplibError, match=r"Layer 0 is not in .*: it holds \[1\]"):
        Activations.load(tmp_path / "acts", layers=[0])
    with pytest.raises(ReplibError, match="holds 22 prompts, none of them in range"):
        Activations.load(tmp_path / "acts", prompts=range(30, 40))


def test_saving_replaces_activations_and_nothing_else(model, tmp_path):
    acts = capture(model, PROMPTS)
    acts.save(tmp_path / "acts", shard=4)
    assert len(list(acts.save(tmp_path / "acts").glob("shard-*"))) == 1
    (tmp_path / "acts" / "thesis.tex").write_text("")
    with pytest.raises(ReplibError, match=r"holds thesis.tex, which is not part of any activations"):
        acts.save(tmp_path / "acts")
    assert (tmp_path / "acts" / "thesis.tex").exists()


def test_an_unwritable_folder_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    for write in (capture(model, PROMPTS).save, lambda folder: capture_to(model, PROMPTS, folder)):
        with pytest.raises(ReplibError, match="Cannot write .*REPLIB_OUT"):
            write(tmp_path / "file" / "acts")
