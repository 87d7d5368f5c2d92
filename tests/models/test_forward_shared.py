"""Reading what follows a shared beginning gives what reading everything gives, wherever that can be promised."""

import pytest
import torch

from helpers import tiny
from helpers.tolerance import close
from replib.activations import reader
from replib.activations.capture import capture, capture_pair, capture_sites
from replib.edits.apply import applied
from replib.models.hooks import SITES
from replib.models.load import load
from replib.models.prefix_cache import shared_length
from replib.models.tokens import Row
from replib.transport.affine import AffineEdit

SYSTEM = "w30 w31 w32 w33 w34 w35"
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"]
RESPONSES = ["w20 w21", "w22", "w23 w24 w25", "w26"]


@pytest.fixture
def lengths(monkeypatch):
    """Of the beginnings that were read, in order."""
    seen, read = [], reader.read_prefix

    def noting(model, ids, longest):
        found = read(model, ids, longest)
        seen.append(found and found.length)
        return found

    monkeypatch.setattr(reader, "read_prefix", noting)
    return seen


def whole(monkeypatch, read):
    """The same without sharing."""
    with monkeypatch.context() as patch:
        patch.setattr(reader.Reader, "shares", False)
        return read()


@pytest.fixture(scope="module", params=[*tiny.SIZES, *tiny.RECURRENT])
def kind_and_model(request, tmp_path_factory):
    return request.param, load(tiny.save_model(tmp_path_factory.mktemp(request.param), request.param))


def test_what_follows_is_read_as_if_everything_were(kind_and_model, monkeypatch, lengths):
    kind, model = kind_and_model
    wanted = {"system": SYSTEM, "responses": RESPONSES, "batch_size": 3}
    positions = ["last_prompt", "instruction", "post_instruction", "response", -2, 0]
    found = capture(model, PROMPTS, positions=positions, **wanted)
    tokens = capture(model, PROMPTS, positions="response", pool="none", **wanted)
    assert lengths == ([None, None] if kind in tiny.RECURRENT else [9, 9])  # "<s> w30 … w35 <end> <s>"
    everything = whole(monkeypatch, lambda: capture(model, PROMPTS, positions=positions, **wanted))
    close(found.values, everything.values)
    close(tokens.values[:, 0], found.values[:, 0, 5])


def test_every_site_is_read_after_a_beginning(tmp_path, monkeypatch, lengths):
    model = load(tiny.save_model(tmp_path, "gemma3_text"))
    found = capture_sites(model, PROMPTS, SITES, system=SYSTEM)
    assert lengths == [9]
    expected = whole(monkeypatch, lambda: capture_sites(model, PROMPTS, SITES, system=SYSTEM))
    for site in SITES:
        close(found[site].values, expected[site].values)


def test_bent_and_base_each_read_the_beginning(tmp_path, monkeypatch, lengths):
    folder = tiny.save_model(tmp_path / "base")
    bent = load(folder, adapter=tiny.save_adapter(tmp_path / "adapter", folder))
    pair = capture_pair(bent, PROMPTS, system=SYSTEM)
    assert lengths == [9, 9]
    for found, expected in zip(
        pair, whole(monkeypatch, lambda: capture_pair(bent, PROMPTS, system=SYSTEM)), strict=True
    ):
        close(found.values, expected.values)


@pytest.mark.parametrize("positions", ["prompt", "all", [-1, "all"], -12])
def test_wanted_tokens_are_never_part_of_it(tmp_path, lengths, positions):
    model = load(tiny.save_model(tmp_path))
    capture(model, PROMPTS, system=SYSTEM, positions=positions)
    assert lengths == []


def test_under_an_edit_or_any_other_hook_everything_is_read(tmp_path, lengths):
    model = load(tiny.save_model(tmp_path))
    with applied(model, {0: AffineEdit.shift(torch.ones(16))}, positions="all"):
        edited = capture(model, PROMPTS, system=SYSTEM)
    handle = model.blocks[0].register_forward_hook(lambda _m, _a, out: out + 1)
    hooked = capture(model, PROMPTS, system=SYSTEM)
    handle.remove()
    assert lengths == []
    torch.testing.assert_close(hooked.values, edited.values)
    model.causal_lm(model.encode(PROMPTS).input_ids, output_hidden_states=True)  # leaves hooks of its own behind
    assert not torch.allclose(capture(model, PROMPTS, system=SYSTEM).values, edited.values)
    assert lengths == [9]


def test_a_window_that_would_forget_the_beginning_is_noticed(tmp_path, monkeypatch, lengths):
    folder = tiny.save_model(tmp_path, "gemma2")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"sliding_window": 4096', '"sliding_window": 12'))
    model = load(folder)
    assert model.causal_lm.config.sliding_window == 12
    found = capture(model, PROMPTS, system=SYSTEM)
    assert lengths == [None]
    torch.testing.assert_close(found.values, whole(monkeypatch, lambda: capture(model, PROMPTS, system=SYSTEM)).values)


def test_the_shared_length_stops_before_what_differs_and_what_is_wanted():
    rows = [Row([1, 2, 3, 4, 5, 6, i, 8], (6, 7), 8) for i in (10, 11)]
    assert shared_length(rows, ["last_prompt"]) == 6
    assert shared_length(rows, [-3]) == 5
    assert shared_length(rows, ["last_prompt", "all"]) == 0
    assert shared_length(rows[:1], ["last_prompt"]) == 0  # alone, there is nobody to share with
    assert shared_length([*rows, Row([1, 2, 3, 9, 9, 9], (3, 4), 6)], ["last_prompt"]) == 0  # three are too few
    assert shared_length([rows[0], rows[0]], ["last_prompt"]) == 7
