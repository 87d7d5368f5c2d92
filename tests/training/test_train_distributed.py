"""Several processes train as one does with as many micro-batches a step: whole models, and models that FSDP2 splits."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers import Trainer

import replib
from helpers import WITH_HELPERS, tiny
from helpers.parts import items_of
from helpers.resumed import CONFIG, DATA
from helpers.tolerance import GRADIENT, close
from replib.core import distributed as parallel
from replib.defences.repbend.config import BendConfig
from replib.defences.repbend.objective import RepBend
from replib.models.load import load
from replib.training.train import attach
from replib.training.trainer import DefenceTrainer, Steps, arguments

CONFIGS = Path(replib.__file__).parent / "training" / "configs"
PYTHON, TORCHRUN = (
    [sys.executable],
    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
)


def launched(name):
    """What ``accelerate launch`` makes of a configuration; it refuses names that it does not know."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), "-m", "replib", "bend"])
    args, config, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = list(config.deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


def ran(command, folder, out, *more, name="ddp.yaml"):
    wanted = {k: v for k, v in launched(name).items() if k.startswith(("ACCELERATE_USE", "FSDP"))}
    environment = WITH_HELPERS | wanted | {"OMP_NUM_THREADS": "1"}
    out.mkdir(exist_ok=True)
    command = [*command, "-m", "helpers.joined", str(folder), str(out), *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def found(out, rank=0):
    return torch.load(out / f"rank-{rank}.pt", weights_only=False)


def test_the_configurations_say_what_they_are_named_after():
    assert launched("fsdp.yaml")["FSDP_VERSION"] == "2" and "ACCELERATE_USE_FSDP" not in launched("ddp.yaml")
    for stage in ("1", "2"):
        environment = launched(f"deepspeed_zero{stage}.yaml")
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert {file.name for file in CONFIGS.iterdir()} == {
        "ddp.yaml", "fsdp.yaml", "deepspeed_zero1.yaml", "deepspeed_zero2.yaml",
    }  # fmt: skip


def test_a_single_process_needs_no_other():
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    parallel.average_gradients(model)
    assert model.weight.grad.sum() == 4 and model.bias.grad is None
    assert parallel.gather(3) == [3] and parallel.broadcast(3) == 3 and not parallel.is_split(model)


def test_the_loss_taken_at_once_has_the_gradient_of_its_parts(tmp_path):
    """As DeepSpeed takes it: one backward pass a micro-batch."""
    gradients = []
    for step in (Trainer.training_step, DefenceTrainer.training_step):
        chat, objective = attach(load(tiny.save_model(tmp_path / "llama")), CONFIG), RepBend(BendConfig(), tokens=8)
        chat.model.requires_grad_(False)
        for name, weight in chat.model.named_parameters():
            weight.requires_grad_("lora_" in name)
        trainer = DefenceTrainer(
            args=arguments(CONFIG, tmp_path), chat=chat, objective=objective, config=CONFIG,
            train_dataset=Steps(vars(DATA), objective.draws(CONFIG), CONFIG),
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 2
        torch.manual_seed(0)
        loss = step(trainer, chat.model, items_of(DATA.contrasts, DATA.retain))
        assert loss.item() == pytest.approx(trainer.history[0]["loss"] / 2)
        gradients.append(torch.cat([p.grad.flatten() for p in chat.model.parameters() if p.grad is not None]))
    close(*gradients, depth=GRADIENT)
    assert gradients[0].norm() > 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    """One process with two micro-batches a step."""
    out = tmp_path_factory.mktemp("one")
    ended = ran(PYTHON, folder, out, "2")
    assert ended.returncode == 0, ended.stderr
    return found(out)


@pytest.mark.slow
@pytest.mark.parametrize("name, split", [("ddp.yaml", False), ("fsdp.yaml", True)])
def test_two_processes_are_one_with_doubled_accumulation(folder, one, tmp_path, name, split):
    ended = ran(TORCHRUN, folder, tmp_path, "1", name=name)
    assert ended.returncode == 0, ended.stderr
    first, second = found(tmp_path), found(tmp_path, 1)
    assert first["backend"] == "gloo" and first["split"] is second["split"] is split
    for weight, value in one["lora"].items():
        torch.testing.assert_close(first["lora"][weight], value, atol=1e-5, rtol=1e-5)
        assert torch.equal(first["lora"][weight], second["lora"][weight])
    assert first["history"]["loss"] == pytest.approx(one["history"]["loss"], abs=1e-4)  # the same micro-batches
    assert first["step"] == second["step"] == one["step"]  # though the probe of the second would have chosen another
    assert first["probes"] == second["probes"] and len(first["probes"]["step"]) == 5
    # Adapter off is the model that was given, under the wrapper too, and hooks see whole states.
    model = load(folder)
    for each in (one, first, second):
        with torch.no_grad():
            base = model.forward(model.encode(each["texts"]))
        torch.testing.assert_close(each["off"], base, atol=1e-5, rtol=1e-5)
        assert (each["on"] - base).abs().max() > 0.1 and each["shapes"] == [(len(base), base.shape[1], 16)] * 2
    assert load(folder, adapter=str(tmp_path / "adapter")).provenance()["adapter_hash"]
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["adapter", "rank-0.pt", "rank-1.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp.yaml"])
@pytest.mark.parametrize("fault, reason", [("error", "rank 1 has had enough"), ("kill", "Signal 9")])
def test_a_failure_of_one_ends_all_and_a_second_run_goes_on_bit_for_bit(folder, tmp_path, name, fault, reason):
    broken, whole, start = tmp_path / "broken", tmp_path / "whole", time.monotonic()
    failed = ran(TORCHRUN, folder, broken, "1", fault, name=name)
    assert failed.returncode != 0 and reason in failed.stderr and time.monotonic() - start < 120
    assert [c.name for c in broken.glob("run/checkpoint-*")] == ["checkpoint-4"]
    for out in (broken, whole):
        assert ran(TORCHRUN, folder, out, "1", name=name).returncode == 0
    for rank in (0, 1):
        a, b = found(broken, rank), found(whole, rank)
        assert all(torch.equal(x, b["lora"][n]) for n, x in a["lora"].items())
        assert [str(a[k]) for k in ("history", "probes", "step")] == [str(b[k]) for k in ("history", "probes", "step")]


@pytest.mark.slow
def test_another_number_of_processes_is_another_run(folder, tmp_path):
    assert ran(TORCHRUN, folder, tmp_path, "1", "error").returncode != 0
    refused = ran(PYTHON, folder, tmp_path, "1")
    assert refused.returncode != 0 and "processes: 2 -> 1 (there -> here)" in refused.stderr
