"""Chat template: rendering, splitting into instruction and frame, and tokenisation, for any model.

The template is rendered once around a mark; the text before and after the mark frames every instruction. A control
token spelled in an instruction, such as ``<|im_end|>``, is tokenised as ordinary text, never as the control token.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from replib.core.errors import ReplibError
from replib.models.tokens import Row

MARK = "\ue000"  # private-use character, placeholder of the instruction when a template is split
_TEMPLATE_CHUNK = 4096  # prompts per tokeniser call; the offsets of all prompts would fill the memory
NONE = "\0"  # occurs in no text
_SPARE = 0xF0000  # first private-use character that replaces a control token, so that no text spells it
# Fixed date for templates that print today's, so that activations do not depend on the day.
_DAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
_DATE = "{% macro strftime_now(form) %}{{ form" + "".join(f"|replace('{k}', '{v}')" for k, v in _DAY.items()) + " }}"
_FIXED_DATE = _DATE + "{% endmacro %}"


@dataclass(frozen=True)
class Turn:
    """Rendered prompt, split around its instruction."""

    before: str
    instruction: str
    after: str

    @property
    def text(self) -> str:
        """Whole rendered prompt."""
        return self.before + self.instruction + self.after


@dataclass(frozen=True)
class Template:
    """Tokenizer with its chat template ``source``; None for plain text."""

    tokenizer: PreTrainedTokenizerBase
    source: str | None

    def render(self, prompts: Sequence[str], system: str | None = None) -> list[str]:
        """Prompts rendered as one user turn each, up to the answer.

        Raises:
            ReplibError: the template rejects the turn, most often its system role.
        """
        if self.source is None:
            return [f"{system}\n\n{prompt}" if system else prompt for prompt in prompts]
        first = [{"role": "system", "content": system}] if system else []
        turns = [[*first, {"role": "user", "content": prompt}] for prompt in prompts]
        source = _FIXED_DATE + self.source if "strftime_now" in self.source else self.source
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=source, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            if not system:
                raise ReplibError(f"The chat template refuses the prompt: {error}. Pass another template.") from error
            self.render(prompts[:1])  # raises if the system prompt is not the cause
            raise ReplibError(
                f"The chat template refuses a system prompt: {error}. "
                "Put it into the instruction: system + '\\n\\n' + prompt."
            ) from error

    def turns(self, prompts: Sequence[str], system: str | None = None) -> list[Turn]:
        """Prompts rendered and split into instruction and surrounding template.

        Raises:
            ReplibError: an empty prompt, a prompt that holds the mark, a template that drops or rewrites a text.
        """
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ReplibError(f"A prompt is empty (number {i}): remove it or give it text.")
            if MARK in prompt:
                raise ReplibError(f"Prompt {i} holds the private-use character U+E000: remove it.")
        before, after = self._frame(system)
        texts = self.render(prompts, system)
        return [_apart(i, t, p, before, after) for i, (t, p) in enumerate(zip(texts, prompts, strict=True))]

    def _frame(self, system: str | None) -> tuple[str, str]:
        """Template text before and after the instruction (its last copy, if the template repeats it)."""
        text = self.render([MARK], system)[0]
        before, mark, after = text.rpartition(MARK)
        if not mark:
            raise ReplibError("The chat template does not write the user's text: pass template='plain', or another.")
        if system and system.strip() not in before + after:
            raise ReplibError("The chat template drops the system prompt: put it into the instruction.")
        return before, after

    def rows(self, prompts: Sequence[str], system: str | None = None) -> Iterator[Row]:
        """Token ids of each rendered prompt, with the borders of its instruction.

        Raises:
            ReplibError: as ``turns``; a text spells a control token that this tokenizer cannot read as ordinary text.
        """
        turns = self.turns(prompts, system)
        controls = self._controls(turns[0], system)
        read = self._read if self.tokenizer.is_fast else self._read_without_offsets
        for start in range(0, len(turns), _TEMPLATE_CHUNK):
            chunk = turns[start : start + _TEMPLATE_CHUNK]
            for i, (turn, row) in enumerate(zip(chunk, read(chunk, controls), strict=True), start):
                yield self._as_letters(i, turn, controls) if _token_texts(row, turn, controls) else row

    def _controls(self, turn: Turn, system: str | None) -> dict[int, str]:
        """Special tokens and added tokens of the template, by id; no instruction may produce them."""
        added = self.tokenizer.added_tokens_decoder.items()
        named = [t.content for _, t in added if t.special and t.content in (system or "")]
        if named:
            raise ReplibError(f"The system prompt spells the control token {named[0]!r}: remove it.")
        frame = turn.before + turn.after
        return {i: t.content for i, t in added if t.special or (self.source and t.content in frame)}

    def _ids(self, turns: Sequence[Turn], **options: Any) -> Any:
        """Encodings of whole turns; the tokenizer adds special tokens to plain text only, a template writes its own."""
        texts = [t.text for t in turns]
        return self.tokenizer(texts, add_special_tokens=self.source is None, return_attention_mask=False, **options)

    def _read(self, turns: Sequence[Turn], controls: dict[int, str], **options: Any) -> list[Row]:
        found = self._ids(turns, **options)
        # The encodings hold the offsets; return_offsets_mapping would copy them all.
        pairs = zip(found["input_ids"], found.encodings, turns, strict=True)
        return [self._row(ids, encoding.offsets, turn, controls) for ids, encoding, turn in pairs]

    def _row(self, ids: list[int], offsets: list[tuple[int, int]], turn: Turn, controls: dict[int, str]) -> Row:
        count = len(ids)
        while self.source is None and count > 1 and offsets[count - 1] == (0, 0):
            count -= 1  # an end-of-sequence token added by the tokenizer would end the answer at once
        first, last = len(turn.before), len(turn.before) + len(turn.instruction)
        start, stop = 0, count
        while start < count and offsets[start][1] <= first:
            start += 1
        while stop > start and offsets[stop - 1][0] >= last:
            stop -= 1
        if start < stop:  # a template token with lstrip/rstrip consumes whitespace of the instruction
            start += controls.get(ids[start], NONE) in turn.before[offsets[start][0] :]
            stop -= controls.get(ids[stop - 1], NONE) in turn.after[: max(0, offsets[stop - 1][1] - last)]
        return Row(ids[:count], (start, stop), count)

    def _read_without_offsets(self, turns: Sequence[Turn], controls: dict[int, str]) -> list[Row]:
        """Rows from tokenizers without offsets: tokens that the template alone gives belong to the template."""
        heads, tails = [Turn(t.before, "", "") for t in turns], [Turn("", "", t.after) for t in turns]
        found = [self._ids(part)["input_ids"] for part in (turns, heads, tails)]
        rows = []
        for turn, ids, head, tail in zip(turns, *found, strict=True):
            while self.source is None and len(ids) > 1 and ids[-1] in controls:
                ids.pop()
            start = len(os.path.commonprefix([ids, head]))
            after = len(os.path.commonprefix([ids[::-1], tail[::-1]])) if turn.after else 0
            rows.append(Row(ids, (start, max(start, len(ids) - after)), len(ids)))
        return rows

    def _as_letters(self, index: int, turn: Turn, controls: dict[int, str]) -> Row:
        """Row of a turn whose instruction spells a control token, tokenised as ordinary text."""
        row, plain = None, self.source is None
        if self.tokenizer.is_fast and turn.instruction not in turn.before:  # else the template holds the first copy
            row = self._read([turn], controls, split_special_tokens=True)[0] if plain else self._renamed(turn, controls)
        if row is None or (left := _token_texts(row, turn, controls)):
            names = ", ".join(map(repr, left if row else [t for t in controls.values() if t in turn.instruction]))
            raise ReplibError(
                f"Prompt {index} spells the control token {names}, which this tokenizer cannot read as letters: "
                "remove it from the prompt."
            )
        return row

    def _renamed(self, turn: Turn, controls: dict[int, str]) -> Row | None:
        copy, names, ids = _renaming(self.tokenizer, frozenset(controls.values()))
        if any(name in turn.instruction for name in names.values()):
            return None
        given = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        before, after = (given.sub(lambda m: names[m[0]], part) for part in (turn.before, turn.after))
        found = copy.encode((new := Turn(before, turn.instruction, after)).text, add_special_tokens=False)
        renamed = {i: names.get(text, text) for i, text in controls.items()}
        return self._row([ids.get(i, i) for i in found.ids], found.offsets, new, renamed)


def _token_texts(row: Row, turn: Turn, controls: dict[int, str]) -> list[str]:
    """Control tokens produced by the text of the instruction."""
    start, stop = row.instruction
    return [controls[i] for i in row.ids[start:stop] if i in controls and controls[i] in turn.instruction]


def _apart(index: int, text: str, prompt: str, before: str, after: str) -> Turn:
    for kept in (prompt, prompt.strip(), prompt.lstrip(), prompt.rstrip()):
        turn = Turn(before.replace(MARK, kept), kept, after)  # a template that repeats the text also holds it before
        if turn.text == text:
            return turn
    raise ReplibError(
        f"The chat template rewrites prompt {index}, so its tokens cannot be told from the template's: "
        f"it begins {prompt[:40]!r}. Change the prompt or the template."
    )


@lru_cache(maxsize=4)
def _renaming(
    tokenizer: PreTrainedTokenizerBase, controls: frozenset[str]
) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
    """Copy with control tokens renamed to private-use characters; the new names; original id of each new id."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {}
    for i, token in enumerate(state["added_tokens"]):
        if token["content"] in controls:
            names[token["content"]] = token["content"] = chr(_SPARE + i)
            token["normalized"] = False
    copy = Tokenizer.from_str(json.dumps(state))
    copy.no_padding()
    copy.no_truncation()
    renumbered = {text: copy.token_to_id(names.get(text, text)) for text in tokenizer.added_tokens_encoder}
    own = tokenizer.added_tokens_encoder
    return copy, names, {new: own[text] for text, new in renumbered.items() if new is not None}
