"""The card of a trained adapter: what it is, how it was made, and what validation found, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

USE = {
    False: """from replib.models import load

model = load({base!r}, adapter="<this folder>")  # an ordinary peft adapter: PeftModel.from_pretrained reads it too""",
    True: """from replib.models import load

model = load("<this folder>")  # an ordinary transformers model""",
}


def card(about: Mapping[str, Any], probes: pd.DataFrame) -> str:
    """Markdown with a header that the hub understands.

    Args:
        about: ``TrainResult.config`` with ``step``.
        probes: one row a probe.
    """
    full = about["train"]["full"]
    head = ["---", f"base_model: {about['model']}", f"library_name: {'transformers' if full else 'peft'}",
            f"tags: [replib, safety, {about['method']}]", "---"]  # fmt: skip
    tables = {
        "Hyper-parameters": _facts(about["objective"]),
        "Training": _facts(about["train"]),
        "Data, by hash": _facts(about["data"]),
        "Model and versions": _facts({k: v for k, v in about.items() if isinstance(v, str) and v and k != "method"}),
    }
    sections = [f"## {title}\n\n{table}\n" for title, table in tables.items()]
    use = f"```python\n{USE[full].format(base=about['model'])}\n```\n"
    return "\n".join([*head, f"# {about['model']} + {about['method']}\n", _opening(about, probes), use, *sections])


def _opening(about: Mapping[str, Any], probes: pd.DataFrame) -> str:
    text = f"Step {about['step']} of {about['train']['steps']}, seed {about['train']['seed']}. "
    if about.get("share", 1) < 1:
        text += f"{about['share']} of the change in weights is kept, as validation chose; the table is of all of it. "
    if probes.empty:
        return text + "No validation probe was run: the last step was kept.\n"
    text += "Rates on the validation prompts that chose the step, which flatters it; audit other prompts to report.\n\n"
    return text + markdown(probes[probes.step.isin([0, about["step"]])].round(3)) + "\n"


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.astype(str).values]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _facts(table: Mapping[str, Any]) -> str:
    return markdown(pd.DataFrame({"name": list(table), "value": [str(v) for v in table.values()]}))
