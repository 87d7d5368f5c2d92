"""The README's examples run as they stand, and give what their comments say."""

import re
from pathlib import Path

import pytest
import torch

from helpers import gaussians, tiny
from replib.activations.capture import capture
from replib.cli import app as cli
from replib.core.settings import data_dir
from replib.defences.repbend.config import OFFICIAL
from replib.models.load import PUBLISHED
from replib.transport.gaussian_map import GaussianMap

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Activations\n")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The names that the example leaves."""
    folder = tmp_path_factory.mktemp("readme")
    tiny.save_adapter(folder / "my-adapter", data_dir() / "organism" / "aligned")
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = {}
        exec(code, names)
        yield names


def test_slices_hold_what_a_capture_gives(found):
    assert found["labels"] == ["harmful"] * 100 + ["harmless"] * 100
    direct = capture(found["model"], found["texts"][:100], layers=[5]).values[0]
    torch.testing.assert_close(found["harmful"], direct, atol=1e-3, rtol=1e-3)


def test_the_pair_is_the_adapter_on_and_off_and_the_trace_agrees_with_it(found):
    bent, base, traced = (found[name].values for name in ("bent", "base", "traced"))
    assert (traced - base).abs().max() < 1e-4 * base.abs().max() < 0.1 * (bent - base).abs().max()


def test_streamed_moments_are_those_of_all_vectors(found):
    values = capture(found["model"], found["texts"]).values.double()
    torch.testing.assert_close(found["moments"].mean, values.mean(dim=1), atol=1e-4, rtol=1e-4)
    largest = torch.linalg.svdvals(values[5] - values[5].mean(dim=0))[:2].square() / (len(values[5]) - 1)
    torch.testing.assert_close(found["variances"][5], largest, atol=0, rtol=1e-3)


@pytest.mark.parametrize("line", re.findall(r"^replib ((?:capture|sweep) .*?)(?:\s+#.*)?$", README, re.MULTILINE))
def test_every_option_of_the_commands_shown_is_one(line):
    args = cli._parser().parse_args(cli.joined(line.replace("...", "").split()))
    assert args.command == line.split()[0]


def test_the_sweep_that_is_shown_finds_what_it_says(tmp_path, monkeypatch):
    section = README.partition("## Sweeps\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.setenv("REPLIB_OUT", str(tmp_path))
    monkeypatch.setenv("REPLIB_LIMIT", "4")
    names: dict = {}
    exec(code, names)
    table, greedy = names["table"], names["greedy"]
    assert len(table) == 48 and table.compliance.notna().sum() == 6 and table.log_odds.notna().all()
    assert set(table.read) == {None, "last_prompt", 0} and greedy["pairs"] == 3
    assert {"harmless: compliance", "borderline: refusal"} <= set(names["damage"].metric)


def test_the_defence_that_is_shown_trains_and_comes_back(tmp_path, monkeypatch):
    section = README.partition("## Bending\n")[2].partition("\n## ")[0]
    choices, defence = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(choices + defence, names)
    assert names["as_trained"].scope is OFFICIAL and names["mixed"].scope != OFFICIAL
    assert names["again"].provenance()["adapter_hash"] == names["result"].model.provenance()["adapter_hash"]
    shown = re.search(r"`replib defend (sft` \(.*?\))", section, re.DOTALL)[1]
    assert all(f"{name}`" in shown for name in names["DEFENCES"] if name != "whp_retain")


def test_every_published_checkpoint_is_in_the_table():
    for known in PUBLISHED:
        assert known.id in README or (known.is_adapter and known.id.removesuffix("_LoRA") in README)
        assert known.method in README and known.paper in README


def test_the_maps_that_are_shown_are_what_they_say(tmp_path, monkeypatch):
    section = README.partition("## Transport\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = dict(zip(("harmful", "harmless"), gaussians.classes(n=30, m=25, d=40), strict=True))
    exec(code, names)
    first, whole, x = names["first"], names["whole"], names["harmful"]
    assert first.rho_ == pytest.approx(1) and whole.basis_.shape == (40, 40)
    assert (
        gaussians.relative(names["streamed"].transform(x), GaussianMap().fit(x, names["harmless"]).transform(x)) < 1e-9
    )
    composed = whole.transform(first.inverse_transform(x))
    assert gaussians.relative(names["both"](x.float()).double(), composed) < 1e-5
    assert torch.equal(names["same"].transform(x), first.transform(x))
    assert names["null"].p_value.mean < 0.05 < names["gap"].mean
