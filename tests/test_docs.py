"""Code and commands of README and docs/ run as they stand, and give the results that their comments name."""

import re
import sys
from pathlib import Path

import pytest
import torch

import layout_picture
from helpers import gaussians, tiny
from replib import GaussianMap, capture
from replib.cli.app import app
from replib.core.settings import data_dir
from replib.defences.repbend.config import OFFICIAL
from replib.models.load import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
SHOWN = re.compile(r"^(?:.*(?:-m |bin/))?(replib .*)$", re.MULTILINE)
COMMANDS = [line for text in TEXTS.values() for line in SHOWN.findall(text)]


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs the Python blocks of a page, in order and in an empty folder; returns the names that they leave."""

    def run(page, **names):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("REPLIB_OUT", str(tmp_path))
        for code in blocks(page):
            exec(code, names)
        return names

    return run


def test_every_page_with_code_is_run_here():
    assert {page for page in PAGES if blocks(page)} == {"README", "activations", "transport", "ablation", "defences"}


@pytest.mark.parametrize("page", PAGES)
def test_code_imports_public_names_of_replib_and_its_rooms(page):
    modules = re.findall(r"^from (replib[\w.]*) import", "\n".join(blocks(page)), re.MULTILINE)
    own_file = {"replib.defences.repbend.config"}
    own_file |= {f"replib.ablation.{name}" for name in ("block_pairs", "sweep_cost", "sweep_report")}
    assert {module for module in modules if module.count(".") > 1} <= own_file


def test_the_readme_prints_what_it_shows(ran, capsys):
    ran("README")
    assert [capsys.readouterr().out] == blocks("README", "text")


def test_the_readme_is_short_and_links_to_files_that_exist():
    assert len(TEXTS["README"].encode()) <= 5120
    links = re.findall(r"\]\(([^)]+)\)", TEXTS["README"])
    assert links and all((ROOT / link).exists() for link in links)


def test_activations_are_stored_streamed_and_traced_alike(ran, tmp_path):
    tiny.save_adapter(tmp_path / "my-adapter", data_dir() / "organism" / "aligned")
    names = ran("activations")
    model, texts = names["model"], names["texts"]
    assert names["labels"] == ["harmful"] * 100 + ["harmless"] * 100
    direct = capture(model, texts[:100], layers=[5]).values[0]
    torch.testing.assert_close(names["harmful"], direct, atol=1e-3, rtol=1e-3)
    bent, base, traced = (names[name].values for name in ("bent", "base", "traced"))
    assert (traced - base).abs().max() < 1e-4 * base.abs().max() < 0.1 * (bent - base).abs().max()
    values = capture(model, texts).values.double()
    torch.testing.assert_close(names["moments"].mean, values.mean(dim=1), atol=1e-4, rtol=1e-4)
    largest = torch.linalg.svdvals(values[5] - values[5].mean(dim=0))[:2].square() / (len(values[5]) - 1)
    torch.testing.assert_close(names["variances"][5], largest, atol=0, rtol=1e-3)


def test_the_maps_that_are_shown_are_what_they_say(ran):
    classes = zip(("harmful", "harmless"), gaussians.classes(n=30, m=25, d=40), strict=True)
    names = ran("transport", **dict(classes))
    first, whole, x = names["first"], names["whole"], names["harmful"]
    assert first.rho_ == pytest.approx(1) and whole.basis_.shape == (40, 40)
    direct = GaussianMap().fit(x, names["harmless"])
    assert gaussians.relative(names["streamed"].transform(x), direct.transform(x)) < 1e-9
    composed = whole.transform(first.inverse_transform(x))
    assert gaussians.relative(names["both"](x.float()).double(), composed) < 1e-5
    assert torch.equal(names["same"].transform(x), first.transform(x))
    assert names["null"].p_value.mean < 0.05 < names["gap"].mean


def test_the_sweep_that_is_shown_finds_what_it_says(ran, monkeypatch):
    monkeypatch.setenv("REPLIB_LIMIT", "4")
    names = ran("ablation")
    table, greedy = names["table"], names["greedy"]
    assert len(table) == 48 and table.compliance.notna().sum() == 6 and table.log_odds.notna().all()
    assert set(table.read) == {None, "last_prompt", 0} and greedy["pairs"] == 3
    assert {"harmless: compliance", "borderline: refusal"} <= set(names["damage"].metric)


def test_the_defence_that_is_shown_trains_and_comes_back(ran):
    names = ran("defences")
    assert names["as_trained"].scope is OFFICIAL and names["mixed"].scope != OFFICIAL
    assert names["again"].provenance()["adapter_hash"] == names["result"].model.provenance()["adapter_hash"]
    shown = re.search(r"`replib defend (sft` \(.*?\))", TEXTS["defences"], re.DOTALL)[1]
    assert all(f"{name}`" in shown for name in names["DEFENCES"] if name != "whp_retain")


def test_every_published_checkpoint_is_in_the_table():
    page = TEXTS["defences"]
    for known in PUBLISHED:
        assert known.id in page or (known.is_adapter and known.id.removesuffix("_LoRA") in page)
        assert known.method in page and known.paper in page


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_that_is_shown_is_one(line):
    words = line.partition(" #")[0].replace("...", "").split()[1:]
    app.meta.parse_args(words)
    common = app.meta.assemble_argument_collection()
    options = {name for argument in common for name in argument.names}
    rest = [w for i, w in enumerate(words) if w not in options and (not i or words[i - 1] not in options)]
    command, _, _ = app.parse_args(rest)
    assert command.__name__.startswith("run_")


def test_the_picture_of_the_layout_is_drawn_from_todays_imports():
    assert layout_picture.TARGET.read_text(encoding="utf-8") == layout_picture.picture(), (
        "draw it anew: python tools/layout_picture.py"
    )


def test_every_room_is_described_and_belongs_to_one_wing():
    rooms = sorted(room for floor in layout_picture.floors() for room in floor)
    assert rooms == sorted(room for _, rooms in layout_picture.WINGS.values() for room in rooms)
    assert all(f"| `{room}` |" in TEXTS["layout"] for room in rooms)


@pytest.mark.slow
def test_the_pages_build_without_a_warning_and_name_the_public_names(tmp_path):
    import subprocess

    import replib

    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    rooms = {room for floor in layout_picture.floors() for room in floor}
    assert not [name for name in set(replib.__all__) - rooms if f'.{name}"' not in reference]
