"""What a sweep may be made of, and what is refused before it is paid for."""

import pytest

from helpers import tiny
from replib.ablation.fit import AblationData, Cell, cells_of, checked, grid, possible_ks, window
from replib.ablation.sweep import Sweeper
from replib.audit.judges import PhraseJudge
from replib.core.errors import ReplibError
from replib.data.prompts import Prompt
from replib.edits.methods import METHODS
from replib.figures.sweeps import edit_name
from replib.models.load import load

DATA = AblationData([f"w{i}" for i in range(8)], [f"w{i}" for i in range(8, 14)], [Prompt("w39")], ["w38"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


def test_a_grid_is_every_combination_with_k_where_there_is_one():
    cells = grid(["pca_ot", "rfa"], [0, 2], ks=(1, 4), strengths=(0.5, 1.0), positions=("all", None), reads=(None, 0))
    assert len(cells) == len(set(cells)) == 2 * 2 * (2 * 2 * 2 + 2)  # the source of rfa edits all as well
    assert {cell.k for cell in cells if cell.method == "rfa"} == {0}
    assert {cell.positions for cell in cells if cell.method == "pca_ot"} == {"all", "last_prompt"}
    assert grid("rfa", [1]) == [Cell("rfa", (1,), 0, METHODS["rfa"].positions)]


def test_a_cell_reads_where_it_says_or_where_its_source_does():
    assert Cell("mean_act", (1,), 0, "all").how.read == METHODS["mean_act"].read
    assert Cell("mean_act", (1,), 0, "all", read=2).how.read == 2


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (Cell("pca", (0,), 1, "all"), "Unknown method 'pca'"),
        (Cell("rfa", (0,), 0, "last"), "Unknown edit positions 'last'"),
        (Cell("rfa", (0,), 0, "all", read="first"), "Unknown position 'first'"),
        (Cell("rfa", (3,), 0, "all"), "Layer 3 is not in"),
        (Cell("rfa", (0, 1), 0, "all"), "rfa acts at every block"),
        (Cell("rfa", (0,), 2, "all"), "rfa has no K"),
        (Cell("pca_ot", (0,), 0, "all"), "K = 0 of pca_ot: .* fit 1 to 5 axes"),
        (Cell("pca_ot", (0,), 6, "all"), "K = 6 of pca_ot"),
        (Cell("rfa", (0,), 0, "all", 1.5), r"Strength 1.5 is outside \[0, 1\]"),
        (Cell("rfa", (0,), 0, "all", -0.1), "Strength -0.1 is outside"),
        (Cell("rfa", (0,), 0, "all", float("nan")), "Strength nan is outside"),
    ],
)
def test_what_has_no_meaning_is_refused(model, cell, message):
    with pytest.raises(ReplibError, match=message):
        checked([Cell("rfa", (0,), 0, "all"), cell], model, DATA)


def test_strengths_beyond_the_target_are_to_be_asked_for(model):
    beyond = Cell("rfa", (0,), 0, "all", 1.5)
    assert checked([beyond], model, DATA, extrapolate=True) == [beyond]
    with pytest.raises(ReplibError, match="Strength inf"):
        checked([beyond._replace(strength=float("inf"))], model, DATA, extrapolate=True)


def test_layers_count_from_below_and_k_from_the_prompts(model):
    (cell,) = checked([Cell("pca_ot", (-1, 0), 1, "all")], model, DATA)
    assert cell.layers == (0, 2)
    ks = possible_ks(model, DATA)
    assert ks == [1, 2, 4] and checked(grid("pca_ot", [0], ks=ks), model, DATA)


def test_cells_come_back_from_a_table(model):
    cells = [Cell("rfa", (1,), 0, "all", 0.5, -2), Cell("pca_ot", (0,), 4, "last_prompt")]
    assert cells_of(Sweeper(model, DATA, PhraseJudge()).table(cells)) == cells


@pytest.mark.parametrize("depth", range(1, 100))
def test_the_window_holds_the_blocks_between_40_and_60_per_cent_and_no_other(depth):
    inside = [i for i in range(depth) if 4 * depth <= 10 * i <= 6 * depth]
    assert window(depth) == ((inside[0], inside[-1]) if inside else None)


def test_the_window_of_published_depths():
    assert [window(depth) for depth in (28, 32, 40, 64)] == [(12, 16), (13, 19), (16, 24), (26, 38)]


def test_figures_name_what_differs_from_the_source():
    assert edit_name("pca_ot", "last_prompt") == "PCA-OT, last prompt"
    assert edit_name("rfa", "all", 0.5, "last_prompt") == "RFA, all, strength 0.5, fitted at last prompt"
    assert edit_name("rfa", "all", 1.0, 0) == "RFA, all, fitted at 0"
