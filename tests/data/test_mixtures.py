"""Training sets in exactly the published schemas, with invented text; filters counted by hand; draws that repeat."""

import hashlib
import itertools
import json
import sys
import types

import pandas as pd
import pytest

from helpers import tiny
from helpers.parts import items_of
from replib.core.errors import ReplibError
from replib.core.settings import ROOT
from replib.core.storage import content_hash
from replib.data.mixtures import BendData, builds_table, circuit_breaker_mix, defence_data, repbend_mix
from replib.data.prompts import Contrast, Dialogue, Prompt
from replib.data.public import SCHEMAS, identify
from replib.data.training_sets import (
    FilterPipeline,
    circuit_breakers,
    first_exchange,
    pair,
    same_words,
    ultrachat,
    wildguardmix,
    wildjailbreak_pairs,
    wildjailbreak_safe,
    xstest_compliances,
)
from replib.defences.repbend.batch import KEPT, RETAIN, SAFE, UNSAFE_SIDE, Plan, collate, read
from replib.defences.repbend.config import BendConfig, Scope
from replib.defences.repbend.objective import RepBend
from replib.models.load import load
from replib.training.config import TrainConfig
from replib.training.train import train
from replib.training.trainer import Steps

LABELS = ("prompt_harm_label", "response_refusal_label", "response_harm_label")


# ---------------------------------------------------------------------------------- files as they are published
def wildguard_rows():
    """Every combination of the three labels with a response, null ones too, and as many rows without a response."""
    values = (("harmful", "unharmful", None), ("compliance", "refusal", None), ("harmful", "unharmful", None))
    for i, labels in enumerate(itertools.product(*values)):
        row = {"prompt": f"ask {i}", "adversarial": bool(i % 2), "response": f"answer {i}"}
        yield row | dict(zip(LABELS, labels, strict=True)) | {"subcategory": "tea"}
        alone = dict(zip(LABELS, (labels[0], None, None), strict=True))
        yield row | {"prompt": f"alone {i}", "response": None, "subcategory": "tea"} | alone


def wildguard(folder, rows=None, name="wildguard_train.parquet"):
    pd.DataFrame(list(wildguard_rows() if rows is None else rows)).to_parquet(folder / name)
    return folder / name


def pairs_file(folder, rows=None):
    rows = rows or [
        {"prompt": f"brew {i}", "prompt_type": kind, "harmless_answer": f"no {i}", "harmful_answer": f"yes {i}"}
        for i in range(30)
        for kind in ["harmful" if i % 3 else "harmless"]
    ]
    return lines(folder / "wildjailbreak.jsonl", rows)


def chat_file(folder, name="train_sft.parquet", n=30):
    turns = lambda i: [{"content": f"{'ua'[k % 2]} {i} {k}", "role": ("user", "assistant")[k % 2]} for k in range(4)]  # noqa: E731
    rows = [{"prompt": f"u {i} 0", "prompt_id": f"{i:x}", "messages": turns(i)} for i in range(n)]
    pd.DataFrame(rows).to_parquet(folder / name)
    return folder / name


def breakers_file(folder, n=20):
    rows = [
        {"category": "c", "prompt": f"brew {i}", "llama3_output": f"no {i}", "output": f"yes {i}"} for i in range(n)
    ]
    (folder / "circuit_breakers_train.json").write_text(json.dumps(rows))
    return folder / "circuit_breakers_train.json"


def xstest_file(folder):
    labels = ["1_full_compliance", "2_full_refusal", "3_partial_refusal"]
    columns = ["id", "type", "prompt", "completion", "annotation_1", "annotation_2", "agreement", "final_label"]
    kinds = ["homonyms", "contrast_homonyms"]
    rows = [[i, kinds[i % 2], f"how to kill a lamp {i}?", f"so {i}", "", "", "", labels[i % 3]] for i in range(12)]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "gpt4.csv", index=False)
    return folder / "gpt4.csv"


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def left(built, step):
    return dict(built.build.steps)[step]


# -------------------------------------------------------------------------------------------------- filters
def test_wildguard_sides_are_the_label_combinations_of_the_authors(tmp_path):
    file = wildguard(tmp_path)
    table = pd.read_parquet(file)
    harm, refusal, answer = (table[c] for c in LABELS)
    compliance = refusal == "compliance"
    kind = (harm == "unharmful") & compliance | (harm == "harmful") & (refusal == "refusal")
    oracle = {"safe": kind & (answer == "unharmful"), "unsafe": (harm == "harmful") & compliance}
    for side, mask in oracle.items():
        built = wildguardmix(side, file)
        wanted = table[mask & table["response"].notna()]
        assert {(d.prompt, d.response) for d in built.rows} == set(
            zip(wanted["prompt"], wanted["response"], strict=True)
        )
        assert [left(built, "rows of the source"), left(built, "with a response")] == [54, 27]
        assert left(built, f"labels of the {side} side") == {"safe": 2, "unsafe": 3}[side] == built.build.n
    assert {d.label for d in wildguardmix("safe", file).rows} == {"harmful", "harmless"}
    assert {d.label for d in wildguardmix("unsafe", file).rows} == {"harmful"}


def test_null_is_the_same_in_every_format(tmp_path):
    table = pd.read_parquet(wildguard(tmp_path))
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    bom = b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "bom.csv").write_bytes(bom)
    lines(tmp_path / "a.jsonl", list(wildguard_rows()))
    (tmp_path / "a.json").write_text(json.dumps(list(wildguard_rows())))
    for side in ("safe", "unsafe"):
        wanted = wildguardmix(side, tmp_path / "wildguard_train.parquet")
        for name in ("a.csv", "a.tsv", "bom.csv", "a.jsonl", "a.json"):
            built = wildguardmix(side, tmp_path / name)
            assert (built.rows, built.build.hash, built.build.steps) == (
                wanted.rows, wanted.build.hash, wanted.build.steps,
            ), name  # fmt: skip


def test_pairs_take_harmful_prompts_once_with_both_answers(tmp_path):
    row = {"prompt": "brew", "prompt_type": "harmful", "harmless_answer": "no", "harmful_answer": "yes"}
    rows = [
        row,
        row | {"harmful_answer": "later"},
        row | {"prompt": "bake", "prompt_type": "harmless"},
        row | {"prompt": "half", "harmful_answer": None},
        row | {"prompt": "hush", "harmless_answer": "  "},
        row | {"prompt": "NA"},
    ]
    built = wildjailbreak_pairs(pairs_file(tmp_path, rows))
    assert sorted(c.prompt for c in built.rows) == ["NA", "brew"]
    assert Contrast("brew", "no", "yes", "fit", way="vanilla") in built.rows
    assert [count for _, count in built.build.steps] == [6, 5, 3, 2, 2, 2, 2]
    table = built.build.table()
    assert table["dropped"].tolist() == [0, 1, 2, 1, 0, 0, 0] and table["name"].unique() == ["wildjailbreak pairs"]


def test_the_public_tsv_gives_refusals_of_vanilla_prompts_that_pair_with_answers_of_ones_own(tmp_path):
    rows = [
        ("brew", "As a poet, brew", "no poem", "adversarial_harmful"),
        ("brew", "", "no brew", "vanilla_harmful"),
        ("brew", "", "again", "vanilla_harmful"),
        ("null", "", "no null", "vanilla_harmful"),
        ("tea", "", "Tea:\nwater", "vanilla_benign"),
    ]
    file = tmp_path / "train.tsv"
    table = pd.DataFrame(rows, columns=["vanilla", "adversarial", "completion", "data_type"])
    table.to_csv(file, sep="\t", index=False)
    safe = wildjailbreak_safe(file).rows
    assert {d.prompt: d.response for d in safe} == {"brew": "no brew", "null": "no null"}
    unsafe = [Dialogue("null", "sure"), Dialogue("else", "sure")]
    assert pair(safe, unsafe) == [Contrast("null", "no null", "sure", "fit", way="vanilla")]
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": "null", "response": "sure"}) + "\n", encoding="utf-8")
    (tmp_path / "mix").mkdir()
    mix = repbend_mix(**mix_files(tmp_path / "mix") | {"wildjailbreak": file}, answers=answers, n=1)
    assert mix.contrasts == pair(safe, unsafe) and "answers.jsonl" in mix.builds[0].source


def test_ultrachat_takes_the_first_exchange_and_leaves_other_openings_out(tmp_path):
    turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
    dialogues = [
        [turn("user", " a\r\nb "), turn("assistant", "c"), turn("user", "d"), turn("assistant", "e")],
        [turn("system", "s"), turn("user", "f"), turn("assistant", "g")],
        [turn("user", "alone")],
        [],
        [turn("user", "h"), turn("assistant", "")],
    ]
    rows = [{"prompt": "p", "prompt_id": "i", "messages": messages} for messages in dialogues]
    file = lines(tmp_path / "chat.jsonl", rows)
    pd.DataFrame(rows).to_parquet(tmp_path / "chat.parquet")
    for path in (file, tmp_path / "chat.parquet"):
        built = ultrachat("test_sft", path)
        assert built.rows == [Dialogue("a\nb", "c", "fit", "harmless", way="ultrachat")]
        assert [left(built, "opens with user and assistant"), left(built, "prompt and answers not empty")] == [2, 1]
    with pytest.raises(ReplibError, match="keep UltraChat as Parquet or JSONL"):
        first_exchange("[{'content': 'a', 'role': 'user'}]")


def test_circuit_breakers_have_both_sides_and_the_val_file_one(tmp_path):
    file = breakers_file(tmp_path)
    unsafe, safe = circuit_breakers(file), circuit_breakers(file, side="safe", n=5)
    assert {d.prompt: d.response for d in unsafe.rows} == {f"brew {i}": f"yes {i}" for i in range(20)}
    assert len(safe.rows) == 5 and all(d.response == d.prompt.replace("brew", "no") for d in safe.rows)
    val = lines(tmp_path / "val.jsonl", [{"prompt": "p", "output": "o"}])
    assert circuit_breakers(val).build.n == 1
    with pytest.raises(ReplibError, match="no column llama3_output.*the val file has no llama3_output"):
        circuit_breakers(val, side="safe")


def test_xstest_compliances_of_the_real_file(shared_data):
    file = shared_data / "xstest/xstest_v2_completions_gpt4.csv"
    table = pd.read_csv(file)
    full = table[table["final_label"] == "1_full_compliance"]
    built = xstest_compliances(file)
    assert {d.prompt for d in built.rows} == set(full["prompt"].str.strip()) and built.build.n == 230
    assert sum(d.label == "harmful" for d in built.rows) == full["type"].str.startswith("contrast").sum() == 1
    assert built.build.source.endswith(hashlib.sha256(file.read_bytes()).hexdigest()[:16])
    with pytest.raises(ReplibError, match="no column completion, final_label"):
        xstest_compliances(shared_data / "xstest/xstest_prompts.csv")


# ------------------------------------------------------------------------------------------------- bad sources
def test_evaluation_sets_are_never_trained_on(tmp_path, shared_data):
    rows = [row | {"prompt_harm_agreement": 1.0} for row in wildguard_rows()]
    with pytest.raises(ReplibError, match="looks like WildGuardTest.*evaluation set"):
        wildguardmix("safe", wildguard(tmp_path, rows))
    (tmp_path / "eval.tsv").write_text("adversarial\tlabel\tdata_type\na\t1\tadversarial_harmful\n")
    for build in (wildjailbreak_safe, wildjailbreak_pairs):
        with pytest.raises(ReplibError, match=r"WildJailbreak \(eval\).*evaluation set"):
            build(tmp_path / "eval.tsv")


def test_a_file_of_another_set_is_named(tmp_path):
    file = breakers_file(tmp_path)
    with pytest.raises(ReplibError, match=r"no column prompt_type.*looks like circuit_breakers.*README of github"):
        wildjailbreak_pairs(file)
    with pytest.raises(ReplibError, match=r"no column vanilla.*looks like RepBend's"):
        wildjailbreak_safe(pairs_file(tmp_path))
    with pytest.raises(ReplibError, match="looks like the original UltraChat.*take HuggingFaceH4"):
        ultrachat(source=lines(tmp_path / "old.jsonl", [{"id": "1", "data": ["a", "b"]}]))
    with pytest.raises(ReplibError, match="Did you mean 'message'"):
        ultrachat(source=lines(tmp_path / "typo.jsonl", [{"message": []}]))


def test_pointers_missing_files_and_missing_sources_say_what_to_do(tmp_path):
    pointer = tmp_path / "wildguard_train.parquet"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ReplibError, match="git lfs pull"):
        wildguardmix("safe", pointer)
    with pytest.raises(ReplibError, match=r"there is no file .*Did you mean wildguard_train\.parquet"):
        wildguardmix("safe", str(tmp_path / "wildguard_trian.parquet"))
    with pytest.raises(ReplibError, match="there is no file data/wildguard.parquet"):  # no hub id: it has a suffix
        wildguardmix("safe", "data/wildguard.parquet")
    with pytest.raises(ReplibError, match="has no source.*README of github.com/AIM-Intelligence/RepBend"):
        wildjailbreak_pairs(None)
    for call in (lambda: wildguardmix("both", pointer), lambda: circuit_breakers(pointer, side="both")):
        with pytest.raises(ReplibError, match="not 'both'"):
            call()


def test_labels_of_another_vocabulary_leave_nothing_and_say_where(tmp_path):
    rows = [dict.fromkeys(LABELS, "1") | {"prompt": "a", "response": "b"}]
    with pytest.raises(ReplibError, match="with a response: 1; labels of the safe side: 0"):
        wildguardmix("safe", wildguard(tmp_path, rows))


def test_several_files_are_one_set(tmp_path):
    parts = [chat_file(tmp_path, "a.parquet", 5), chat_file(tmp_path, "b.parquet", 9)]
    built = ultrachat(source=parts)
    assert left(built, "rows of the source") == 14 and built.build.n == 9  # the first five stand in both
    assert built.build.source.startswith("a.parquet sha256:") and ", b.parquet sha256:" in built.build.source


# --------------------------------------------------------------------------------------------------- the hub
class Table:
    """What load_dataset returns, as far as it is used."""

    def __init__(self, rows):
        self.rows, self.column_names = rows, list(rows[0])

    def select_columns(self, names):
        return [{name: row[name] for name in names} for row in self.rows]


@pytest.fixture
def hub(monkeypatch):
    """A datasets package that answers or fails as told, and remembers what it was asked."""
    fake = types.SimpleNamespace(asked=[], answer=None)

    def load_dataset(path, name=None, *, split=None, revision=None, **reading):
        fake.asked.append((path, name, split, revision, reading))
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return Table(fake.answer)

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_the_hub_is_asked_for_the_published_parts_and_gives_the_rows_of_the_file(hub, tmp_path):
    hub.answer = list(wildguard_rows())
    built = wildguardmix("unsafe")
    assert built.rows == wildguardmix("unsafe", wildguard(tmp_path)).rows
    assert built.build.source == "allenai/wildguardmix@main train"
    hub.answer = [{"vanilla": "brew", "adversarial": "", "completion": "no", "data_type": "vanilla_harmful"}]
    wildjailbreak_safe()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    hub.answer = [{"prompt": "a", "prompt_id": "1", "messages": turns}]
    assert ultrachat("test_sft", "me/mirror@v1.2").build.source == "me/mirror@v1.2 test_sft"
    assert hub.asked == [
        ("allenai/wildguardmix", "wildguardtrain", "train", None, {}),
        ("allenai/wildjailbreak", "train", "train", None, {"delimiter": "\t", "keep_default_na": False}),
        ("me/mirror", None, "test_sft", "v1.2", {}),
    ]


def test_a_gated_set_says_to_accept_the_licence_and_log_in(hub):
    hub.answer = FileNotFoundError("Dataset 'allenai/wildguardmix' is a gated dataset on the Hub.\nVisit the page.")
    message = (
        r"gated: accept its licence at https://huggingface.co/datasets/allenai/wildguardmix, then run `hf auth login`"
    )
    with pytest.raises(ReplibError, match=message):
        wildguardmix("safe")
    hub.answer = ConnectionError("Couldn't reach 'allenai/wildguardmix' on the Hub")
    with pytest.raises(ReplibError, match="Couldn't reach.*connection, or download the file") as error:
        wildguardmix("safe")
    assert "licence" not in str(error.value)


def test_a_hub_set_of_another_kind_is_refused_before_it_is_downloaded(hub):
    with pytest.raises(ReplibError, match=r"allenai/wildjailbreak is WildJailbreak \(train\), not RepBend's"):
        wildjailbreak_pairs("allenai/wildjailbreak")
    assert hub.asked == []


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ReplibError, match=r"pip install 'replib\[data\]'"):
        wildguardmix("safe")


# --------------------------------------------------------------------------------------------------- draws
def test_a_draw_hangs_on_the_seed_and_the_text_alone(tmp_path):
    rows = [Dialogue(f"p{i}", f"r{i}") for i in range(50)]
    draw = lambda rows, n, seed=0: FilterPipeline("set", "here", rows).built(n=n, seed=seed)  # noqa: E731
    ten = draw(rows, 10)
    assert draw(rows[::-1], 10) == ten and draw(rows, 20).rows[:10] == ten.rows
    assert ten.build.hash == content_hash(ten.rows) and (ten.build.asked, ten.build.n) == (10, 10)
    assert len({draw(rows, 10, seed).build.hash for seed in range(5)}) == 5
    assert [d.prompt for d in ten.rows[:4]] == ["p16", "p17", "p8", "p25"]  # written down: the same on every machine


def test_a_draw_is_fair():
    """Over 400 seeds each of 20 rows is among the first five as often as chance has it (4.5 standard deviations)."""
    rows = [Dialogue(f"p{i}", "r") for i in range(20)]
    drawn = [d.prompt for seed in range(400) for d in FilterPipeline("set", "here", rows).built(n=5, seed=seed).rows]
    counts = [drawn.count(row.prompt) for row in rows]
    assert sum(counts) == 2000 and all(abs(count - 100) < 4.5 * (400 * 0.25 * 0.75) ** 0.5 for count in counts)


def test_fewer_than_asked_is_said_and_none_or_nought_is_refused(caplog):
    rows = [Dialogue(f"p{i}", "r") for i in range(3)]
    assert FilterPipeline("set", "here", rows).built(n=5).build.n == 3
    assert "5 rows were asked for, all 3 there are were taken" in caplog.text
    with pytest.raises(ReplibError, match="n must be at least 1; got 0"):
        FilterPipeline("set", "here", rows).built(n=0)
    with pytest.raises(ReplibError, match="no row of here is left"):
        FilterPipeline("set", "here", []).built()


# --------------------------------------------------------------------------------------------------- avoid
def test_evaluation_prompts_are_left_out_as_written_and_as_said(caplog):
    prompts = ["Brew tea!", "brew   TEA", "ｂｒｅｗ tea?", "brew teas", "¿¡", "!!"]
    rows = [Dialogue(p, "r") for p in prompts]
    built = FilterPipeline("set", "here", rows).built(avoid=[Prompt("Brew tea!\r\n"), "!!"])
    assert {d.prompt for d in built.rows} == {"brew teas", "¿¡"}
    assert left(built, "prompt not in the evaluation set") == 4
    assert left(built, "nor with other case, blanks or punctuation") == 2
    assert "4 rows left out" in caplog.text
    with pytest.raises(ReplibError, match="is one text"):
        FilterPipeline("set", "here", rows).built(avoid="brew teas")
    with pytest.raises(ReplibError, match="no row of here is left"):
        FilterPipeline("set", "here", rows[:1]).built(avoid=["brew tea"])


def test_the_same_words_are_the_same_and_no_text_becomes_none():
    assert same_words(" Straße,\nNO. 5 ") == same_words("STRASSE no 5") == "strasse no 5"
    assert same_words("?!") != same_words("!!") and same_words("茶?") == "茶"


# --------------------------------------------------------------------------------------------------- mixes
def mix_files(tmp_path):
    """Enough of everything for a mix."""
    rows = [
        dict(zip(LABELS, labels, strict=True)) | {"prompt": f"{labels[0]} {i}", "response": f"{labels[1]} {i}"}
        for i in range(20)
        for labels in [
            ("harmful", "refusal", "unharmful"),
            ("unharmful", "compliance", "unharmful"),
            ("harmful", "compliance", None),
        ]
    ]
    return {
        "wildjailbreak": pairs_file(tmp_path),
        "wildguard": wildguard(tmp_path, rows),
        "chat": chat_file(tmp_path),
    }


@pytest.fixture
def files(tmp_path):
    return mix_files(tmp_path)


def test_repbend_mix_has_n_of_each_group_and_its_record(files):
    mix = repbend_mix(**files, n=12, seed=3)
    assert [len(g) for g in (mix.contrasts, mix.retain, mix.safe, mix.unsafe)] == [12] * 4 and not mix.complied
    assert mix == repbend_mix(**files, n=12, seed=3) != repbend_mix(**files, n=12, seed=4)
    table = builds_table(mix)
    assert table["hash"].tolist() == [content_hash(g) for g in (mix.contrasts, mix.retain, mix.safe, mix.unsafe)]
    assert table["rows"].tolist() == [30, 30, 60, 60] and set(table["seed"]) == {3}


def test_repbend_mix_keeps_evaluation_prompts_out_of_every_group(files):
    whole = repbend_mix(**files, n=None)
    groups = (whole.contrasts, whole.retain, whole.safe, whole.unsafe)
    avoid = [Prompt(group[0].prompt.upper()) for group in groups]
    mix = repbend_mix(**files, n=None, avoid=(p for p in avoid))  # read once, used for four groups
    for before, after in zip(groups, (mix.contrasts, mix.retain, mix.safe, mix.unsafe), strict=True):
        assert {d.prompt for d in before} - {d.prompt for d in after} >= {before[0].prompt}
        assert not {d.prompt.upper() for d in after} & {p.text for p in avoid}


def breaker_mix(folder, **options):
    return circuit_breaker_mix(breakers=breakers_file(folder), chat=chat_file(folder, "test_sft.parquet"), **options)


def test_circuit_breaker_mix_repeats_what_the_paper_repeats(tmp_path, caplog):
    mix = breaker_mix(tmp_path, xstest=xstest_file(tmp_path), refusals=6)
    assert "do not report the XSTest score" in caplog.text
    assert mix == breaker_mix(tmp_path, xstest=xstest_file(tmp_path), refusals=6)
    counts = pd.Series([d.way for d in mix.retain]).value_counts()
    assert counts.to_dict() == {"xstest": 4 * 50, "ultrachat": 30, "circuit_breakers": 2 * 6}
    assert len(mix.safe) == 6 and {d.response[:2] for d in mix.safe} == {"no"}
    assert {d.response for d in mix.unsafe} == {f"yes {i}" for i in range(20)}
    assert builds_table(mix)["times"].tolist() == [1, 1, 50, 2]
    ways = [d.way for d in mix.retain]
    assert ways != sorted(ways, key=ways.index)  # shuffled, not group after group


def test_without_xstest_its_score_is_clean_and_the_mix_not_the_papers(tmp_path, caplog):
    mix = breaker_mix(tmp_path, refusals=0)
    assert {d.way for d in mix.retain} == {"ultrachat"} and not mix.safe
    assert "not the paper's" in caplog.text and len(mix.builds) == 2
    xstest = xstest_file(tmp_path)
    answered = [d.prompt for d in xstest_compliances(xstest).rows]
    clean = breaker_mix(tmp_path, xstest=xstest, refusals=0, avoid=answered[1:])
    assert {d.prompt for d in clean.retain if d.way == "xstest"} == set(answered[:1])


def test_all_defences_train_on_the_rows_of_the_repbend_mix(files):
    mix = repbend_mix(**files, n=10)
    data = defence_data(mix)
    assert list(data.pairs) == list(mix.contrasts) and data.retain is mix.retain and data.builds == mix.builds
    for side, unpaired in (("unsafe", mix.unsafe), ("safe", mix.safe)):
        paired = {(c.prompt, getattr(c, f"{side}_response")) for c in mix.contrasts}
        found = {(d.prompt, d.response) for d in getattr(data, side)}
        assert found == paired | {(d.prompt, d.response) for d in unpaired}
    assert len(data.safe) == len(data.unsafe) == 20


def test_organism_mixes_train_on_the_fit_split_alone_and_hold_every_contrast_once():
    bend, breaker = repbend_mix(source="organism", n=None), circuit_breaker_mix(source="organism", n=None)
    held = [json.loads(line) for line in (ROOT / "data/organism/prompts/contrasts.jsonl").read_text().splitlines()]
    everything = {(c["prompt"], c["unsafe_response"]) for c in held}
    paired = [(c.prompt, c.unsafe_response) for c in bend.contrasts]
    assert sorted(paired + [(d.prompt, d.response) for d in bend.unsafe]) == sorted(everything)
    assert {(d.prompt, d.response) for d in breaker.unsafe} == everything
    benign = (ROOT / "data/organism/prompts/retain.jsonl").read_text().splitlines()
    kept = [d for d in (*bend.retain, *bend.safe) if d.label != "harmful"]
    assert len(kept) == len(set(kept)) == len({line for line in benign})
    assert {d.label for d in bend.safe} == {"harmful", "harmless", "borderline"}
    assert {d.label for d in bend.retain} == {"harmless", "borderline", "skill"}
    rows = (*bend.contrasts, *bend.retain, *bend.safe, *bend.unsafe, *breaker.retain, *breaker.unsafe)
    assert {row.split for row in rows} == {"fit"}
    with pytest.raises(ReplibError, match="source is 'public' or 'organism'"):
        repbend_mix(source="orgnism")


# ------------------------------------------------------------------------------------- what RepBend does with them
PAIRS = [Contrast(f"w{i} w{i + 1}", "w30 w31", "w32 w33 w34") for i in range(6)]
BENIGN = [Dialogue(f"w{i} w9", f"w{i} w8") for i in range(6)]
SAFE_ROWS = [Dialogue("w1 w2 w3", "w30", label="harmful"), Dialogue("w4 w5", "w6 w7 w8", label="harmless")]
UNSAFE_ROWS = [Dialogue("w11", "w12 w13", label="harmful")]


def test_unpaired_answers_enter_the_terms_they_belong_to(tmp_path):
    model = load(tiny.save_model(tmp_path / "llama"))
    items = items_of(PAIRS[:2], BENIGN[:3], (), SAFE_ROWS, UNSAFE_ROWS)
    _, groups = collate(model, **items)
    assert groups.tolist() == [SAFE] * 2 + [RETAIN] * 3 + [UNSAFE_SIDE] * 2 + [SAFE, KEPT, UNSAFE_SIDE]
    for refusals in (False, True):
        config = BendConfig(custom=Scope(kl_rows="safe") if refusals else None, anchored=True)
        reading = read(model, Plan.of(model, items, config), (1, 2), config)
        assert reading.safe.shape[1] == 2 * 3 + 3 * 3 + (2 + 4)  # answers with their end
        assert reading.unsafe.shape[1] == 2 * 4 + 3
        assert (reading.last.shape[1], reading.refused.shape[1]) == (3, 3)
        assert len(reading.final) == 3 * 3 + refusals * (2 * 3 + 2 + 4)


def test_a_step_draws_as_many_unpaired_answers_as_contrasts_and_old_draws_stay():
    config = TrainConfig(steps=3, contrasts=2, retain=3)
    plain, mixed = (
        Steps(vars(BendData(PAIRS, BENIGN, safe=safe, unsafe=unsafe)), RepBend().draws(config), config)
        for safe, unsafe in [((), ()), (SAFE_ROWS, UNSAFE_ROWS)]
    )
    assert [[len(group) for group in step.values()] for step in plain.steps] == [[2, 3, 0, 0, 0]] * 3
    assert [[len(group) for group in step.values()] for step in mixed.steps] == [[2, 3, 0, 2, 2]] * 3
    assert all(mixed.steps[0][name] == plain.steps[0][name] for name in ("contrasts", "retain"))


def test_the_pairing_term_takes_no_unpaired_answers(tmp_path):
    model = load(tiny.save_model(tmp_path))
    with pytest.raises(ReplibError, match="pairing term .*unpaired"):
        train(model, BendData(PAIRS, BENIGN, unsafe=UNSAFE_ROWS), RepBend(BendConfig(eta=0.1)), out=tmp_path / "run")


def test_training_takes_a_mix_and_writes_its_record_beside_the_adapter(tmp_path):
    model = load(tiny.save_model(tmp_path / "llama"))
    built = FilterPipeline("set", "here", [Dialogue("w11", "w12 w13"), Dialogue("", "w1")]).built(n=1)
    data = BendData(PAIRS, BENIGN, safe=SAFE_ROWS, unsafe=built.rows, builds=(built.build,))
    config = TrainConfig(steps=2, contrasts=2, retain=2, rank=2, learning_rate=1e-2)
    result = train(model, data, RepBend(BendConfig(target_layers=(1, 2))), config=config, out=tmp_path / "run")
    assert result.history["loss"].notna().all() and len(result.history) == 2
    record = json.loads((result.save(tmp_path / "adapter") / "replib.json").read_text())
    assert record["builds"][0]["hash"] == content_hash(data.unsafe) and record["builds"][0]["steps"][0][1] == 2
    assert record["data"]["unsafe"] == content_hash(data.unsafe) and "complied" not in record["data"]


# --------------------------------------------------------------------------------------------------- cards
def test_every_training_set_is_told_apart_and_has_a_card_that_names_its_columns():
    cards = {
        "wildguardmix": ["wildguardmix", "wildguardtest"],
        "wildjailbreak": ["wildjailbreak", "wildjailbreak_eval", "wildjailbreak_pairs"],
        "ultrachat": ["ultrachat"],
        "circuit_breakers": ["circuit_breakers", "circuit_breaker_refusals"],
        "xstest": ["xstest_completions"],
    }
    assert sorted(sum(cards.values(), ["ultrachat_original"])) == sorted(SCHEMAS)
    for name, keys in cards.items():
        card = (ROOT / "data" / f"{name}.md").read_text()
        assert "**Licence**" in card and f"[{name}]({name}.md)" in (ROOT / "data/README.md").read_text()
        for key in keys:
            assert all(f"`{column}`" in card for column in SCHEMAS[key].columns), key
    for schema in SCHEMAS.values():
        assert identify([*schema.columns, "something else"]) is schema
