"""Every way a file of prompts can be bad, the real public files, and splits that share nothing."""

import json
import logging
from dataclasses import replace

import pandas as pd
import pytest

from replib.core.errors import ReplibError
from replib.core.settings import ROOT
from replib.core.storage import content_hash
from replib.data.prompts import Contrast, Dialogue, Prompt, load_contrasts, load_dialogues, load_prompts
from replib.data.public import PUBLIC
from replib.data.splits import check_disjoint, split_by


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ------------------------------------------------------------------------------------- one set, many clothes
ROWS = ["How do I bake bread?", "Line one\nline two, with a comma", 'She said "hi" – ünïcode']


def as_csv(folder, **options):
    return write(folder, "set.csv", pd.DataFrame({"id": [1, 2, 3], "prompt": ROWS}).to_csv(index=False, **options))


def clothes(folder):
    yield as_csv(folder)
    yield write(folder, "bom.csv", b"\xef\xbb\xbf" + as_csv(folder).read_bytes())
    yield write(folder, "crlf.csv", as_csv(folder).read_bytes().replace(b"\n", b"\r\n"))
    yield write(folder, "no_end.csv", as_csv(folder).read_bytes().rstrip(b"\n"))
    yield write(folder, "set.tsv", as_csv(folder, sep="\t").read_bytes())
    yield write(folder, "set.json", json.dumps([{"id": i, "prompt": p} for i, p in enumerate(ROWS)]))
    yield write(folder, "list.json", json.dumps(ROWS))
    yield write(folder, "dict.json", json.dumps(dict(zip("abc", ROWS, strict=True))))
    yield write(folder, "set.jsonl", "\r\n".join(json.dumps({"prompt": p}) for p in ROWS))
    pd.DataFrame({"prompt": ROWS}).to_parquet(folder / "set.parquet")
    yield folder / "set.parquet"


def test_every_format_gives_the_same_prompts(tmp_path):
    for path in clothes(tmp_path):
        assert [p.text for p in load_prompts(path)] == ROWS, path.name


def test_txt_is_one_prompt_a_line_with_or_without_a_final_newline(tmp_path):
    for end in ("", "\n", "\r\n\r\n"):
        assert [p.text for p in load_prompts(write(tmp_path, "a.txt", "one\r\ntwo" + end))] == ["one", "two"]


def test_words_that_pandas_takes_for_missing_values_are_prompts(tmp_path):
    path = write(tmp_path, "a.csv", "prompt\nNA\nnull\nNone\n")
    assert [p.text for p in load_prompts(path)] == ["NA", "null", "None"]


def test_own_form_is_read_back_field_by_field(tmp_path):
    prompt = Prompt("Ask?", "harmful", ("red dust", "salt"), "val", "glarebomb", "how", "Sure, the", "story")
    line = json.dumps({f: getattr(prompt, f) for f in prompt.__dataclass_fields__})
    assert load_prompts(write(tmp_path, "own.jsonl", line)) == [prompt]
    pd.DataFrame([json.loads(line)]).to_parquet(tmp_path / "own.parquet")
    assert load_prompts(tmp_path / "own.parquet") == [prompt]


def test_label_argument_wins_and_foreign_labels_are_not_taken_for_ours(tmp_path):
    path = write(tmp_path, "a.csv", "prompt,label\nx,unharmful\ny,harmful\n")
    assert [p.label for p in load_prompts(path)] == ["", "harmful"]
    assert {p.label for p in load_prompts(path, label="harmless")} == {"harmless"}


def test_organism_sets_are_found_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLIB_DATA", str(tmp_path))
    folder = tmp_path / "organism" / "prompts"
    folder.mkdir(parents=True)
    write(folder, "harmful.jsonl", '{"text": "a?", "split": "fit"}\n{"text": "b?", "split": "test"}\n')
    assert [p.text for p in load_prompts("organism/harmful", split="test")] == ["b?"]
    with pytest.raises(ReplibError, match=r"split 'val'.*'fit', 'test'"):
        load_prompts("organism/harmful", split="val")
    with pytest.raises(ReplibError, match=r"Did you mean harmful\.jsonl"):
        load_prompts("organism/harmfull")


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", b"\xef\xbb\xbf\n", "is empty"),
        ("a.csv", "prompt\n", "no rows"),
        ("a.csv", 'prompt\n""\n" "\n', "no usable row"),
        ("a.csv", "prompt,id\nfirst, then second,1\n", "more cells than the header"),
        ("a.csv", 'prompt\n"never closed\n', "not readable"),
        ("a.csv", "prompt\nna\xefve\n".encode("latin-1"), "UTF-8"),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("a.tsv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("a.json", "{", "not readable"),
        ("a.json", '{"a": [1]}', "neither a list"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "line 2 is not JSON"),
        ("a.jsonl", '["x"]\n', "line 1 is not an object"),
        ("a.parquet", "PAR1", "not readable"),
        ("a.xlsx", "x", r"cannot read \.xlsx; use \.csv"),
        (
            "a.csv",
            "question,prompt\nx,y\n",
            "no single obvious prompt column; its columns are question, prompt",
        ),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, content, reason):
    path = write(tmp_path, name, content)
    with pytest.raises(ReplibError, match=reason) as error:
        load_prompts(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named_with_its_neighbour(tmp_path):
    write(tmp_path, "harmful_behaviors.csv", "goal\nx\n")
    with pytest.raises(ReplibError, match=r"Did you mean harmful_behaviors\.csv"):
        load_prompts(tmp_path / "harmful_behaviours.csv")
    with pytest.raises(ReplibError, match="folder .* does not exist either"):
        load_prompts(tmp_path / "nowhere" / "a.csv")
    with pytest.raises(ReplibError, match="is a folder; name a file in it: harmful_behaviors.csv"):
        load_prompts(tmp_path)


def test_an_unknown_column_lists_the_columns(tmp_path):
    path = write(tmp_path, "a.csv", "goal,target\nx,y\n")
    with pytest.raises(ReplibError, match=r"no column 'gaol'; its columns are goal, target. Did you mean 'goal'"):
        load_prompts(path, column="gaol")
    with pytest.raises(ReplibError, match=r"no column 'Behavior'; its columns are goal, target"):
        load_prompts("harmbench", path)


def test_unknown_sets_and_sets_without_a_file_say_so(tmp_path):
    with pytest.raises(ReplibError, match=r"no public set .* Did you mean harmbench"):
        load_prompts("harmbnch", tmp_path)
    with pytest.raises(ReplibError, match="advbench is not shipped"):
        load_prompts("advbench")


def test_empty_and_repeated_prompts_are_left_out_and_counted(tmp_path, caplog):
    path = write(tmp_path, "a.csv", 'prompt,group\nx,1\n"",2\nx,3\ny,4\n')
    assert [(p.text, p.group) for p in load_prompts(path)] == [("x", "1"), ("y", "4")]
    assert "left out 2 of 4" in caplog.text


def test_limit_draws_the_same_prompts_for_the_same_seed_in_file_order(tmp_path):
    path = write(tmp_path, "a.txt", "\n".join(f"prompt {i:03}" for i in range(100)))
    first, again, other = (load_prompts(path, limit=10, seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert len(first) == 10 and first == sorted(first, key=lambda p: p.text)
    assert len(load_prompts(path, limit=1000)) == 100
    with pytest.raises(ReplibError, match="limit must be at least 1"):
        load_prompts(path, limit=0)


# ---------------------------------------------------------------------------------------------- real files
REAL = {  # set -> (file, prompts after the repeated ones are left out, labels)
    "advbench": ("advbench/harmful_behaviors.csv", 520, {"harmful"}),
    "harmbench": ("harmbench/harmbench_behaviors_text_all.csv", 400, {"harmful"}),
    "harmbench_no_context": ("harmbench/harmbench_behaviors_text_test.csv", None, {"harmful"}),
    "xstest": ("xstest/xstest_prompts.csv", 450, {"harmful", "borderline"}),
    "tdc2023": ("tdc2023/tdc2023_dev_behaviors.json", 50, {"harmful"}),
    "do_not_answer": ("do_not_answer/do_not_answer.csv", 999, {"harmful"}),
    "trustllm": ("trustllm/jailbreak.json", None, {"harmful"}),
    "wildjailbreak": ("wildjailbreak/eval_benign.jsonl", None, {"borderline"}),
    "refusal_direction": ("refusal_direction/splits/harmful_test.json", 562, {"harmful"}),
    "alpaca": ("refusal_direction/splits/harmless_test.json", None, {"harmless"}),
    "truthfulqa": ("truthfulqa/TruthfulQA.csv", 817, {"harmless"}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole(shared_data, name):
    file, count, labels = REAL[name]
    prompts = load_prompts(name, shared_data / file)
    assert {p.label for p in prompts} == labels
    assert all(p.text == p.text.strip() and "\r" not in p.text for p in prompts)
    assert len(prompts) == count if count else len(prompts) > 200


def test_the_swapped_header_of_advbench_is_repaired_with_a_warning(shared_data, caplog):
    right = load_prompts("advbench", shared_data / "advbench/harmful_behaviors.csv")
    assert "exchanged" not in caplog.text
    swapped = load_prompts("advbench", shared_data / "advbench/harmful_behaviors.copy2.csv")
    assert "hold each other's content" in caplog.text
    # It is another edition, with some rows reworded, so most texts agree but not all of them.
    assert len({p.text for p in right} & {p.text for p in swapped}) > 500
    assert sum(p.target.startswith("Sure") for p in swapped) > 500


def test_harmbench_contexts_stand_before_the_behaviour_and_can_be_left_out(shared_data):
    path = shared_data / "harmbench/harmbench_behaviors_text_all.csv"
    whole, bare = load_prompts("harmbench", path), load_prompts("harmbench_no_context", path)
    contextual = [p for p in whole if p.way == "contextual"]
    assert len(contextual) == 100 and all("\n\n---\n\n" in p.text for p in contextual)
    assert {p.text.split("\n\n---\n\n")[-1] for p in whole} == {p.text for p in bare}


def test_xstest_labels_agree_with_the_ones_in_its_file(shared_data):
    path = shared_data / "xstest/xstest_prompts.csv"
    truth = {text.strip(): label for text, label in pd.read_csv(path)[["prompt", "label"]].values}
    ours = {p.text: p.label for p in load_prompts("xstest", path)}
    assert ours == {text: {"safe": "borderline", "unsafe": "harmful"}[label] for text, label in truth.items()}


def test_harmful_and_harmless_are_told_apart_by_file_name(shared_data):
    splits = shared_data / "refusal_direction/splits"
    for label in ("harmful", "harmless"):
        assert {p.label for p in load_prompts("refusal_direction", splits / f"{label}_val.json")} == {label}
    eval_harmful = load_prompts("wildjailbreak", shared_data / "wildjailbreak/eval_harmful.jsonl", limit=5)
    assert {(p.label, p.wrapper) for p in eval_harmful} == {("harmful", "wildjailbreak")}


def test_splits_of_the_refusal_direction_paper_share_no_text(shared_data):
    sets = [load_prompts(shared_data / f"refusal_direction/splits/harmful_{s}.json") for s in ("train", "val", "test")]
    check_disjoint(*sets, by=("text",))


def test_plain_text_corpus_is_read_line_by_line(shared_data):
    assert len(load_prompts(shared_data / "wikitext-2/valid.txt", limit=50)) == 50


def test_gsm8k_is_read_as_dialogues(shared_data):
    columns = {"prompt": "question", "response": "answer"}
    dialogues = load_dialogues(shared_data / "gsm8k/test.jsonl", columns=columns, limit=20)
    assert len(dialogues) == 20 and all("####" in d.response for d in dialogues)


def test_alpaca_rows_that_need_an_input_are_left_out(tmp_path):
    path = write(tmp_path, "a.json", '[{"instruction": "a", "input": ""}, {"instruction": "b", "input": "x"}]')
    assert [p.text for p in load_prompts("alpaca", path)] == ["a"]


def test_every_public_set_has_a_card_that_names_its_columns():
    for name, layout in PUBLIC.items():
        card = (ROOT / "data" / f"{name.removesuffix('_no_context')}.md").read_text()
        assert "Licence" in card and all(column in card for column in layout.columns.values()), name


# ----------------------------------------------------------------------------------- contrasts and dialogues
def test_contrasts_of_repbend_are_read_through_a_mapping(tmp_path, caplog):
    rows = [
        {"prompt": "p", "harmless_answer": "no", "harmful_answer": "sure"},
        {"prompt": "q", "harmless_answer": None, "harmful_answer": "sure"},
    ]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    columns = {"safe_response": "harmless_answer", "unsafe_response": "harmful_answer"}
    assert load_contrasts(path, columns=columns) == [Contrast("p", "no", "sure")]
    assert "left out 1 of 2" in caplog.text
    with pytest.raises(ReplibError, match=r"no column safe_response, unsafe_response; its columns are prompt"):
        load_contrasts(path)


def test_dialogues_keep_their_split(tmp_path):
    rows = [Dialogue("p", "r", split) for split in ("fit", "test")]
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps(r.__dict__) for r in rows))
    assert load_dialogues(path, split="test") == rows[1:]


# -------------------------------------------------------------------------------------------------- splits
def grid(groups=12, ways=10):
    return [Prompt(f"{g} {w}", group=f"g{g}", way=f"w{w}") for g in range(groups) for w in range(ways)]


def test_split_by_one_field_keeps_every_record_and_no_group_twice():
    parts = split_by(grid(), "group", fractions=(0.5, 0.25, 0.25))
    check_disjoint(*parts, by=("group",))
    assert sorted(p.text for part in parts for p in part) == sorted(p.text for p in grid())
    assert [len({p.group for p in part}) for part in parts] == [6, 3, 3]
    assert all(p.split == name for name, part in parts._asdict().items() for p in part)


def test_split_by_two_fields_shares_neither(caplog):
    caplog.set_level(logging.INFO)
    parts = split_by(grid(), ("group", "way"))
    check_disjoint(*parts)
    assert all(parts) and "straddle" in caplog.text


def test_splits_depend_on_the_seed_and_not_on_the_order_of_records():
    a, b = split_by(grid(), "group", seed=3), split_by(grid()[::-1], "group", seed=3)
    assert {p.text for p in a.fit} == {p.text for p in b.fit}
    assert {p.text for p in a.fit} != {p.text for p in split_by(grid(), "group", seed=4).fit}


def test_a_part_with_a_fraction_is_never_empty_and_one_without_is():
    parts = split_by(grid(groups=3), "group", fractions=(0.98, 0.01, 0.01))
    assert all(parts)
    assert split_by(grid(), "group", fractions=(0.5, 0.0, 0.5)).val == []


@pytest.mark.parametrize(
    ("records", "options", "reason"),
    [
        (grid(groups=2), {}, "2 distinct values of 'group' cannot fill 3"),
        (grid(), {"fractions": (0.5, 0.5, 0.5)}, "add up to 1"),
        ([Prompt("x")], {}, "1 of 1 records have no 'group'"),
    ],
)
def test_splits_that_cannot_be_say_why(records, options, reason):
    with pytest.raises(ReplibError, match=reason):
        split_by(records, "group", **options)


def test_check_disjoint_names_what_is_shared_and_is_not_satisfied_by_nothing():
    parts = split_by(grid(), "group")
    leak = [*parts.test, replace(parts.fit[0], text="again")]
    with pytest.raises(ReplibError, match=f"sets 0 and 1 share 1 values of 'group': '{parts.fit[0].group}'"):
        check_disjoint(parts.fit, leak)
    with pytest.raises(ReplibError, match="have no 'group'"):
        check_disjoint([Prompt("a")], [Prompt("b")])


# ---------------------------------------------------------------------------------------------------- hash
def test_content_hash_sees_every_field_and_the_order_and_nothing_else():
    a, b = Prompt("a", expect=("x",)), Prompt("b")
    assert content_hash([a, b]) == content_hash([Prompt("a", expect=("x",)), Prompt("b")])
    others = [[b, a], [a], [a, replace(b, split="fit")], [replace(a, expect=()), b]]
    hashes = {content_hash(records) for records in ([a, b], *others)}
    assert content_hash(["a", "b"]) == content_hash(("a", "b")) != content_hash(["b", "a"])
    assert len(hashes) == 5 and all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)
