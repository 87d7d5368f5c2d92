"""Rates, intervals and tables; rows that are kept and found again; nothing written that was not asked for."""

import json

import pytest

from helpers import tiny
from replib.audit.audit import AuditTable, Task, audit, rates
from replib.audit.judges import Outcome, PhraseJudge
from replib.core.errors import ReplibError
from replib.core.stats import wilson
from replib.core.storage import Rows, key_of, write_text
from replib.data.prompts import Prompt
from replib.models.load import load

PROMPTS = [Prompt(f"w{i} w{i + 1}", "harmful") for i in range(6)]
TASKS = [
    Task("direct", "direct", PROMPTS),
    Task("prefill", "prefill", PROMPTS, ["w30"] * 6),
    Task("calm", "benign", PROMPTS[:3]),
]


@pytest.fixture
def model(tmp_path):
    return load(tiny.save_model(tmp_path / "llama"))


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (126, 159), (10, 10)])
def test_wilson_is_the_root_of_its_defining_equation(k, n):
    z = 1.959963984540054
    for p in wilson(k, n):  # the rates from which the observed one is exactly z standard errors away
        assert (k / n - p) ** 2 == pytest.approx(z**2 * p * (1 - p) / n, abs=1e-9)


def test_rates_count_and_add_up():
    found = rates([Outcome.REFUSAL, Outcome.COMPLIANCE, Outcome.COMPLIANCE, Outcome.DEGENERATE])
    assert (found["n"], found["compliance"], found["refusal"], found["degenerate"]) == (4, 0.5, 0.25, 0.25)
    with pytest.raises(ReplibError, match="no prompts, so there is no rate: give"):
        rates([])


def test_an_interrupted_audit_goes_on_and_gives_the_same_table(model, tmp_path, monkeypatch):
    store, asked = tmp_path / "audit.jsonl", []
    whole = audit(model, TASKS, PhraseJudge(), max_new_tokens=4)
    audit(model, TASKS[:1], PhraseJudge(), max_new_tokens=4, store=store)
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: asked.append(1) or generate(*a, **k))
    again = audit(model, TASKS, PhraseJudge(), max_new_tokens=4, store=store)
    assert again.frame.equals(whole.frame) and len(asked) == 2
    audit(model, TASKS, PhraseJudge(), max_new_tokens=4, store=store)
    assert len(asked) == 2
    audit(model, TASKS, PhraseJudge(), max_new_tokens=5, store=store)  # another question, so another answer
    assert len(asked) == 5


def test_answers_are_written_only_when_asked_for(model, tmp_path):
    store = tmp_path / "audit.jsonl"
    audit(model, TASKS, PhraseJudge(), max_new_tokens=4, store=store)
    assert [p.name for p in tmp_path.glob("*.jsonl")] == ["audit.jsonl"]
    assert not any("answer" in row for row in map(json.loads, store.read_text().splitlines()))
    audit(model, TASKS, PhraseJudge(), max_new_tokens=6, store=store, keep_text=True)
    kept = (tmp_path / "audit.texts.jsonl").read_text().splitlines()
    assert len(kept) == 15 and json.loads(kept[6])["answer"].startswith("w30")


def test_a_row_carries_what_made_it(model):
    row = audit(model, TASKS[:1], PhraseJudge(), name="tiny", seed=3).frame.iloc[0]
    for name in (
        "model",
        "fingerprint",
        "template",
        "dtype",
        "prompts",
        "judge",
        "seed",
        "torch",
        "transformers",
        "n",
    ):
        assert str(row[name]) != "", name
    assert (row.model, row.seed, row.n) == ("tiny", 3, 6)


def test_tables_add_widen_average_and_come_back(model, tmp_path):
    a, b = (audit(model, TASKS, PhraseJudge(), name=name, max_new_tokens=3) for name in ("a", "b"))
    table = a + b
    wide = table.wide()
    assert list(wide.columns) == ["a", "b"] and [i[1] for i in wide.index] == ["direct", "prefill", "calm"]
    assert table.mean("direct")["b"] == b.frame.compliance.iloc[0]
    assert AuditTable.load(table.save(tmp_path / "t.csv")).wide().equals(wide)
    with pytest.raises(ReplibError, match="no audit table"):
        AuditTable.load(tmp_path / "other.csv")


def test_a_sample_is_the_same_for_the_same_seed_and_keeps_prefills_beside_prompts():
    task = Task("t", "prefill", PROMPTS, [p.text for p in PROMPTS])
    drawn = task.sample(3, seed=1)
    assert drawn == task.sample(3, seed=1) != task.sample(3, seed=2)
    assert [p.text for p in drawn.prompts] == drawn.prefills and task.sample(0) is task


# ------------------------------------------------------------------------------------------- files
def test_a_row_killed_in_the_middle_is_computed_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = Rows(path)
    rows.get({"a": 1}, lambda: {"x": 1})
    rows.get({"a": 2}, lambda: {"x": 2})
    path.write_text(path.read_text()[:-9])
    again = Rows(path)
    assert again.get({"a": 1}, lambda: pytest.fail("kept"))["x"] == 1
    assert again.get({"a": 2}, lambda: {"x": 3})["x"] == 3
    assert len(Rows(path).rows) == 2


def test_keys_depend_on_values_and_not_on_order():
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReplibError, match="Cannot write .*REPLIB_OUT"):
        write_text(tmp_path / "file" / "x.csv", "")
    with pytest.raises(ReplibError, match="Cannot write .*REPLIB_OUT"):
        Rows(tmp_path / "file" / "x.jsonl").get({}, dict)
