"""Prompts that fit edits and prompts that score them; edits of several blocks, fitted one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from replib.activations import capture
from replib.chat import ChatModel
from replib.edits import applied, bound
from replib.errors import ReplibError
from replib.methods import Method, SiteEdits, fit_edit, method_of
from replib.prompts import Prompt, content_hash
from replib.reader import check_layers
from replib.refusals import RefusalTokens, survivors


@dataclass(frozen=True)
class AblationData:
    """Prompts that fit an edit, and others that score it."""

    harmful: Sequence[str]
    """Source of the transport: fit split."""
    harmless: Sequence[str]
    """Its target: fit split."""
    scored: Sequence[Prompt]
    """Harmful prompts on which attack success is counted: val to choose, test to report."""
    neutral: Sequence[str]
    """Harmless prompts on which the first-token KL to the unedited model is measured."""

    def __post_init__(self) -> None:
        for name in ("harmful", "harmless", "scored", "neutral"):
            if not getattr(self, name):
                raise ReplibError(f"No {name} prompts: an ablation needs both classes to fit and prompts to score.")
        if shared := {p.text for p in self.scored} & set(self.harmful):
            raise ReplibError(
                f"{len(shared)} scored prompts were used to fit, for example {min(shared)!r}: split them."
            )

    def kept(self, model: ChatModel, tokens: RefusalTokens) -> AblationData:
        """The same, fitted only on harmful prompts that the model refuses and harmless ones that it answers.

        Raises ReplibError where too few are left.
        """
        left = survivors(model, self.harmful, self.harmless, tokens)
        return replace(self, harmful=left.harmful, harmless=left.harmless)

    def counts(self) -> dict[str, int]:
        """How many prompts a class fit the edit: fewer than were given, where some were filtered."""
        return {"n_harmful": len(self.harmful), "n_harmless": len(self.harmless)}

    def hashes(self) -> dict[str, str]:
        """What identifies the four lists in a table."""
        fit = content_hash([*self.harmful, "|", *self.harmless])
        return {"fit": fit, "scored": content_hash([*self.scored]), "neutral": content_hash([*self.neutral])}


def fit_edits(
    model: ChatModel,
    method: str | Method,
    data: AblationData,
    layers: Sequence[int],
    *,
    k: int = 2,
    positions: str | None = None,
) -> SiteEdits:
    """Edits at several blocks, each fitted with the earlier ones active: it meets what it will be applied to.

    ``positions``: where they will act, by default as in the method's source. A method that is not ``sequential`` is
    fitted at all blocks at once, on the unedited model.
    """
    method = method_of(method)
    edits: SiteEdits = {}
    for layer in sorted(check_layers(model, layers)):
        active = edits if method.sequential else {}
        with applied(model, active, positions=positions or method.positions) if active else nullcontext():
            harmful, harmless = (
                capture(model, x, site=method.site, layers=[layer], positions=method.read)[layer]
                for x in (data.harmful, data.harmless)
            )
        edits |= fit_edit(method, harmful, harmless, layer, k=k, depth=model.n_layers)
    return bound(model, edits)
