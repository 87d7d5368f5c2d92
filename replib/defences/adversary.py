"""Random edits against refusal, fitted on the current model, for hardening.

ReFAT (arXiv 2409.20089) trains refusals while one difference in means is removed at every block, and fits it anew as
training proceeds. Here the method (closed-form Gaussian transport included), the block, the tokens, K and the strength
of each edit are drawn; that generalisation is our own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from replib.activations.capture import stream
from replib.core.errors import ReplibError, check_blocks, check_choice
from replib.data.prompts import Contrast, Dialogue
from replib.edits.apply import POSITIONS, Edited
from replib.edits.methods import READS, SiteEdits, fit_edit, method_of
from replib.models.chat_model import ChatModel

Choice = TypeVar("Choice")
_FORCED = tuple(p for p in POSITIONS if p != "decode")  # training reads answers and decodes none


@dataclass(frozen=True)
class EditDistribution:
    """Distribution of edits; every choice is uniform."""

    methods: tuple[str, ...] = ("pca_ot", "rfa", "actadd", "act")
    """Names of ``methods.METHODS`` that read one token."""
    layers: tuple[int, ...] = ()
    """Blocks; () takes all."""
    ks: tuple[int, ...] = (1, 2, 8, 16)
    """Principal components, for methods that have them."""
    reads: tuple[str, ...] = ("last_prompt",)
    """Tokens whose activations fit an edit: the last of the prompt, or the mean over a forced unsafe answer."""
    positions: tuple[str, ...] = ("last_prompt", "all_prompt", "response", "all")
    """Edited tokens."""
    strength: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest strength, within 0 and 1."""
    prompts: int = 48
    """Prompts a class that fit an edit, redrawn for each fit."""
    late: int = 1
    """Sampling weight of a block in the last third of the model, where few later blocks can repair an edit."""

    def __post_init__(self) -> None:
        for name in ("methods", "ks", "reads", "positions"):
            if not getattr(self, name):
                raise ReplibError(f"An adversary without {name} edits nothing; give one or more, or set edits=0.")
        for name, known in (("reads", READS), ("positions", _FORCED)):
            for one in getattr(self, name):
                check_choice(name, one, known)
        if other := [m for m in self.methods if method_of(m).read != "last_prompt"]:
            raise ReplibError(f"{other[0]} is fitted on means over whole prompts; take methods that read one token.")
        low, high = self.strength
        if not 0 <= low <= high <= 1:
            raise ReplibError(f"strength={self.strength}: give smallest and largest, both within 0 and 1.")
        if self.late < 1:
            raise ReplibError(f"late={self.late} must be 1 or more (1 = same sampling weight as other blocks).")
        if not 0 < min(self.ks) <= max(self.ks) < self.prompts:
            raise ReplibError(f"{self.prompts} prompts a class cannot fit K of {self.ks}: K is above 0 and below them.")

    def within(self, rows: int) -> EditDistribution:
        """Distribution for at most ``rows`` rows a class, with fewer components.

        Raises:
            ReplibError: the rows cannot fit one component.
        """
        if rows >= self.prompts:
            return self
        return replace(self, prompts=rows, ks=tuple(k for k in self.ks if k < rows) or (1,))

    def blocks(self, depth: int) -> list[int]:
        """Blocks to draw from in a model of ``depth`` blocks, with repetitions."""
        once = [*(self.layers or range(depth))]
        return once + (self.late - 1) * [i for i in once if 3 * i >= 2 * depth]

    def check(self, depth: int, harmful: Sequence[Contrast], harmless: Sequence[Dialogue]) -> None:
        """Raise ReplibError for blocks outside the model, or too few prompts to fit on."""
        check_blocks(self.layers, depth)
        for name, rows in (("harmful", harmful), ("harmless", harmless)):
            if len(rows) < self.prompts:
                raise ReplibError(f"{len(rows)} {name} prompts to fit edits on, but prompts={self.prompts}: "
                                  "give more, or fit on fewer.")  # fmt: skip


class SampledEdit(NamedTuple):
    """An edit and its tokens."""

    edits: SiteEdits
    positions: str
    name: str = "none"
    """Method, block, K, fitted tokens and strength as text."""

    @property
    def edited(self) -> Edited:
        """Argument of ``applied_each``."""
        return {self.positions: self.edits} if self.edits else {}


@dataclass
class Adversary:
    """Draws edits from a distribution with its own random generator; ``state`` resumes it."""

    arsenal: EditDistribution
    harmful: Sequence[Contrast]
    """Source class of the edits, with unsafe answers."""
    harmless: Sequence[Dialogue]
    """Target class of the edits."""
    seed: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator, repr=False)
    fitted: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    """Activations of both classes, ``[layers, prompts, reads, dim]`` each."""

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    def fit(self, chat: ChatModel) -> None:
        """Capture both classes under the current model."""
        n = self.arsenal.prompts
        harmful, harmless = self.sample(self.harmful, n), self.sample(self.harmless, n)
        answered = [(c.prompt, c.unsafe_response) for c in harmful], [(d.prompt, d.response) for d in harmless]
        self.fitted = self._read(chat, answered[0]), self._read(chat, answered[1])

    def _read(self, chat: ChatModel, rows: Sequence[tuple[str, str]]) -> Float[Tensor, "layers prompts reads dim"]:
        prompts, answers = zip(*rows, strict=True)
        forced = answers if "response" in self.arsenal.reads else None
        return torch.cat(list(stream(chat, prompts, responses=forced, positions=self.arsenal.reads)), dim=1)

    def draw(self, chat: ChatModel) -> SampledEdit:
        """Draw an edit, fitted on the activations of ``fit``.

        Raises:
            ReplibError: ``fit`` was not called.
        """
        if self.fitted is None:
            raise ReplibError("No activations to fit edits on: call fit(model) first.")
        a = self.arsenal
        method, positions = self.pick(a.methods), self.pick(a.positions)
        layer, k = self.pick(a.blocks(chat.n_layers)), self.pick(a.ks)
        read, strength = self.pick(a.reads), a.strength[0] + self.uniform() * (a.strength[1] - a.strength[0])
        source, target = (x[layer, :, a.reads.index(read)] for x in self.fitted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a small K may miss the difference in means
            edits = fit_edit(method, source, target, layer, k=k, depth=chat.n_layers)
        name = f"{method} at block {layer}, K {k}, read at {read}, strength {strength:.2f}"
        return SampledEdit({key: edit * strength for key, edit in edits.items()}, positions, name)

    def uniform(self) -> float:
        """Uniform sample from [0, 1)."""
        return torch.rand((), generator=self.generator).item()

    def pick(self, options: Sequence[Choice]) -> Choice:
        """Uniform choice among options."""
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def sample(self, rows: Sequence[Choice], n: int) -> list[Choice]:
        """Sample of ``n`` rows without replacement."""
        return [rows[i] for i in torch.randperm(len(rows), generator=self.generator)[:n].tolist()]

    def state(self) -> dict[str, Tensor]:
        """State of the generator, and the fitted activations."""
        kept = {} if self.fitted is None else dict(zip(("harmful", "harmless"), self.fitted, strict=True))
        return kept | {"generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of ``state``; an empty mapping restarts from the seed."""
        self.generator.manual_seed(self.seed)
        if "generator" in state:
            self.generator.set_state(state["generator"].cpu())
        self.fitted = (state["harmful"].cpu(), state["harmless"].cpu()) if "harmful" in state else None
