"""Where each public prompt set keeps what. No set is shipped: ``data/<set>.md`` says where it lives."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Layout:
    """Where the rows of a set keep what."""

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


HARMFUL, HARMLESS = {"label": "harmful"}, {"label": "harmless"}
_HARMBENCH = Layout(("Behavior",), {"group": "SemanticCategory", "way": "FunctionalCategory"}, HARMFUL)
PUBLIC: dict[str, Layout] = {
    "advbench": Layout(("goal",), {"target": "target"}, HARMFUL),
    "harmbench": replace(_HARMBENCH, context="ContextString"),
    "harmbench_no_context": _HARMBENCH,
    "xstest": Layout(
        ("prompt",), {"group": "type"}, labels=(("type", "contrast_", "harmful"), ("type", "", "borderline"))
    ),
    "jailbreakbench": Layout(("Goal",), {"target": "Target", "group": "Category", "way": "Source"}, HARMFUL),
    "tdc2023": Layout(fixed=HARMFUL),
    "maliciousinstruct": Layout(fixed=HARMFUL),
    "strongreject": Layout(("forbidden_prompt",), {"group": "category", "way": "source"}, HARMFUL),
    "do_not_answer": Layout(("question", "prompt"), {"group": "types_of_harm", "way": "specific_harms"}, HARMFUL),
    "trustllm": Layout(("prompt",), {"wrapper": "label", "way": "source"}, HARMFUL),
    "wildjailbreak": Layout(
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
    "wildguardmix": Layout(
        ("prompt",),
        {"group": "subcategory"},
        labels=(("prompt_harm_label", "unharmful", "harmless"), ("prompt_harm_label", "harmful", "harmful")),
    ),
    "alpaca": Layout(("instruction",), fixed=HARMLESS, without="input"),
    "refusal_direction": Layout(
        ("instruction",),
        {"group": "category"},
        labels=(("", "harmful", "harmful"), ("", "harmless", "harmless")),
    ),
    "truthfulqa": Layout(("Question",), {"group": "Category", "way": "Type"}, HARMLESS),
}
