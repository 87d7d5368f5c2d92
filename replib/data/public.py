"""Public training sets as rows: from the Hugging Face hub or from files of yours with the same columns.

No set is shipped; ``data/<set>.md`` says where each lives, under which licence, and what its columns hold.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from replib.core.errors import ReplibError
from replib.data.files import READERS, read_table


@dataclass(frozen=True)
class PromptSetLayout:
    """Columns of a prompt set that fill the fields of a Prompt."""

    text: tuple[str, ...] = ("text",)
    """Names the text column goes by; the first one found is read. Lists and .txt files have ``text``."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Prompt field -> column; a column the file lacks leaves the field empty."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Prompt field -> the same value for every row."""
    labels: tuple[tuple[str, str, str], ...] = ()
    """(column, text in it, label): the first rule that fires; column ``""`` is the file's name."""
    context: str = ""
    """Column put before the text (HarmBench's contextual behaviours)."""
    without: str = ""
    """Rows that have something in this column are left out."""


HARMFUL_LABEL, HARMLESS = {"label": "harmful"}, {"label": "harmless"}
_HARMBENCH = PromptSetLayout(("Behavior",), {"group": "SemanticCategory", "way": "FunctionalCategory"}, HARMFUL_LABEL)
PUBLIC: dict[str, PromptSetLayout] = {
    "advbench": PromptSetLayout(("goal",), {"target": "target"}, HARMFUL_LABEL),
    "harmbench": replace(_HARMBENCH, context="ContextString"),
    "harmbench_no_context": _HARMBENCH,
    "xstest": PromptSetLayout(
        ("prompt",), {"group": "type"}, labels=(("type", "contrast_", "harmful"), ("type", "", "borderline"))
    ),
    "jailbreakbench": PromptSetLayout(
        ("Goal",), {"target": "Target", "group": "Category", "way": "Source"}, HARMFUL_LABEL
    ),
    "tdc2023": PromptSetLayout(fixed=HARMFUL_LABEL),
    "maliciousinstruct": PromptSetLayout(fixed=HARMFUL_LABEL),
    "strongreject": PromptSetLayout(("forbidden_prompt",), {"group": "category", "way": "source"}, HARMFUL_LABEL),
    "do_not_answer": PromptSetLayout(
        ("question", "prompt"), {"group": "types_of_harm", "way": "specific_harms"}, HARMFUL_LABEL
    ),
    "trustllm": PromptSetLayout(("prompt",), {"wrapper": "label", "way": "source"}, HARMFUL_LABEL),
    "wildjailbreak": PromptSetLayout(
        ("adversarial",),
        {"way": "data_type"},
        {"wrapper": "wildjailbreak"},
        labels=(
            ("data_type", "harmful", "harmful"),
            ("data_type", "benign", "borderline"),
            ("", "harmful", "harmful"),
            ("", "benign", "borderline"),
        ),
    ),
    "wildguardmix": PromptSetLayout(
        ("prompt",),
        {"group": "subcategory"},
        labels=(("prompt_harm_label", "unharmful", "harmless"), ("prompt_harm_label", "harmful", "harmful")),
    ),
    "alpaca": PromptSetLayout(("instruction",), fixed=HARMLESS, without="input"),
    "refusal_direction": PromptSetLayout(
        ("instruction",),
        {"group": "category"},
        labels=(("", "harmful", "harmful"), ("", "harmless", "harmless")),
    ),
    "truthfulqa": PromptSetLayout(("Question",), {"group": "Category", "way": "Type"}, HARMLESS),
}
RowSource = str | Path | Sequence[str | Path]
"""A file, a hub id (``owner/name``, or ``owner/name@revision`` to pin it), or several of them read as one."""
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_REFUSED = ("gated", "401", "403", "authenticat", "restricted")


@dataclass(frozen=True)
class TrainingSetSchema:
    """Columns of a training set, and the place where its owners keep it."""

    title: str
    columns: tuple[str, ...]
    """Columns that must be there; together they also tell the set from the others."""
    home: str
    """Where the data lives, as a sentence."""
    hub: str = ""
    config: str | None = None
    split: str = "train"
    reading: Mapping[str, Any] = field(default_factory=dict)
    """How its files on the hub are read, where the usual way would lose empty cells."""
    never: str = ""
    """Why no builder takes it."""


_LABELS = ("prompt_harm_label", "response_refusal_label", "response_harm_label")
_EVALUATION = "it is an evaluation set, and what is trained on cannot be reported"
SCHEMAS: Mapping[str, TrainingSetSchema] = MappingProxyType({
    "wildguardmix": TrainingSetSchema(
        "WildGuardMix (wildguardtrain)", ("prompt", "response", *_LABELS),
        "It is gated on the hub: allenai/wildguardmix, train/wildguard_train.parquet.",
        "allenai/wildguardmix", "wildguardtrain",
    ),
    "wildguardtest": TrainingSetSchema(
        "WildGuardTest", ("prompt", "response", *_LABELS, "prompt_harm_agreement"), "", never=_EVALUATION,
    ),
    "wildjailbreak": TrainingSetSchema(
        "WildJailbreak (train)", ("vanilla", "adversarial", "completion", "data_type"),
        "It is gated on the hub: allenai/wildjailbreak, train/train.tsv.",
        "allenai/wildjailbreak", "train", reading={"delimiter": "\t", "keep_default_na": False},
    ),
    "wildjailbreak_eval": TrainingSetSchema(
        "WildJailbreak (eval)", ("adversarial", "data_type"), "", never=_EVALUATION,
    ),
    "wildjailbreak_pairs": TrainingSetSchema(
        "RepBend's wildjailbreak.jsonl", ("prompt", "prompt_type", "harmless_answer", "harmful_answer"),
        "Its authors link it from the README of github.com/AIM-Intelligence/RepBend; give the path of your copy.",
    ),
    "ultrachat": TrainingSetSchema(
        "UltraChat-200k", ("messages",), "It is on the hub: HuggingFaceH4/ultrachat_200k.",
        "HuggingFaceH4/ultrachat_200k", split="train_sft",
    ),
    "ultrachat_original": TrainingSetSchema(
        "the original UltraChat", ("id", "data"), "",
        never="its dialogues are not the filtered 200k that the papers train on; take HuggingFaceH4/ultrachat_200k",
    ),
    "circuit_breakers": TrainingSetSchema(
        "circuit_breakers_train.json", ("prompt", "output"),
        "It is in data/ of github.com/GraySwanAI/circuit-breakers; give the path of your copy.",
    ),
    "circuit_breaker_refusals": TrainingSetSchema(
        "circuit_breakers_train.json", ("prompt", "output", "llama3_output"),
        "It is in data/ of github.com/GraySwanAI/circuit-breakers (the val file has no llama3_output).",
    ),
    "xstest_completions": TrainingSetSchema(
        "XSTest's completions of GPT-4", ("prompt", "type", "completion", "final_label"),
        "It is model_completions/xstest_v2_completions_gpt4.csv of github.com/paul-rottger/xstest.",
    ),
})  # fmt: skip


def read_rows(key: str, source: RowSource | None, *, split: str = "") -> tuple[str, Iterator[dict[str, Any]]]:
    """Return the name of the source for records, and its rows with the columns of ``SCHEMAS[key]`` alone.

    A file is called by its name and the first 16 hex digits of its SHA-256, a hub set by id, revision and split.

    Raises:
        ReplibError: no source, a file that is missing or unreadable or a Git-LFS pointer, columns of another
            set, an evaluation set, a gated set without access, or ``datasets`` is not installed.
    """
    schema = SCHEMAS[key]
    if source is None or not source:
        raise ReplibError(f"{schema.title} has no source. {schema.home}")
    several = [source] if isinstance(source, str | Path) else source
    parts = [_part(schema, one, split) for one in several]
    names, rows = zip(*parts, strict=True)
    return ", ".join(names), (row for part in rows for row in part)


def _part(schema: TrainingSetSchema, source: str | Path, split: str) -> tuple[str, Iterator[dict[str, Any]]]:
    """One file or one set of the hub."""
    found = _HUB_ID.fullmatch(str(source))
    if isinstance(source, Path) or not found or Path(source).exists() or Path(source).suffix.lower() in READERS:
        return _from_file(schema, Path(source))
    return _from_hub(schema, found[1], found[2], split or schema.split)


def _from_file(schema: TrainingSetSchema, path: Path) -> tuple[str, Iterator[dict[str, Any]]]:
    table = read_table(path)
    _check_columns(schema, list(table.columns), str(path))
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    return f"{path.name} sha256:{digest}", _only(schema, table.to_dict("records"))


def _from_hub(
    schema: TrainingSetSchema, name: str, revision: str | None, split: str
) -> tuple[str, Iterator[dict[str, Any]]]:
    if other := next((s for s in SCHEMAS.values() if s.hub == name != schema.hub), None):
        raise ReplibError(f"{name} is {other.title}, not {schema.title}. {schema.home}")
    own = {"name": schema.config, **schema.reading} if name == schema.hub else {}
    datasets = _datasets()
    try:
        table = datasets.load_dataset(name, split=split, revision=revision, **own)
    except Exception as error:  # of datasets, of the hub and of the network, other ones in every version
        raise _unreachable(name, split, error) from error
    _check_columns(schema, list(table.column_names), f"{name} ({split})")
    return f"{name}@{revision or 'main'} {split}", _only(schema, table.select_columns(list(schema.columns)))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ReplibError(
            "sets of the hub are read with the datasets package: pip install 'replib[data]', "
            "or download the file and give its path."
        ) from error
    return datasets


def _unreachable(name: str, split: str, error: Exception) -> ReplibError:
    said = str(error).strip().partition("\n")[0].rstrip(".") + "."
    if any(word in f"{type(error).__name__} {error}".lower() for word in _REFUSED):
        return ReplibError(
            f"the hub refuses {name}: {said} If the id is right, the set is gated: accept its licence at "
            f"https://huggingface.co/datasets/{name}, then run `hf auth login` or set HF_TOKEN."
        )
    return ReplibError(
        f"cannot read split {split!r} of {name} from the hub: {said} Check the id, the split and the connection, "
        "or download the file and give its path."
    )


def _only(schema: TrainingSetSchema, rows: Iterable[Mapping[Any, Any]]) -> Iterator[dict[str, Any]]:
    return ({column: row[column] for column in schema.columns} for row in rows)


def _check_columns(schema: TrainingSetSchema, names: Sequence[str], where: str) -> None:
    """Raise unless the columns are those of the set, and of no set that must not be trained on."""
    found = identify(names)
    if found is not None and found.never:
        raise ReplibError(f"{where} looks like {found.title}, which is not taken for {schema.title}: {found.never}.")
    absent = [column for column in schema.columns if column not in names]
    if not absent:
        return
    near = difflib.get_close_matches(absent[0], names, n=1)
    guess = f"Did you mean {near[0]!r}? Rename it. " if near else ""
    hint = f"It looks like {found.title}. " if found is not None else guess
    raise ReplibError(
        f"{where} has no column {', '.join(absent)} of {schema.title}; its columns are {', '.join(names)}. "
        f"{hint}{schema.home}"
    )


def identify(names: Sequence[str]) -> TrainingSetSchema | None:
    """The known set with the most columns among those whose columns are all there."""
    held = [schema for schema in SCHEMAS.values() if set(schema.columns) <= set(names)]
    return max(held, key=lambda schema: len(schema.columns), default=None)
