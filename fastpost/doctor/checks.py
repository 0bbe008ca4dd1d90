"""What is wrong with counts, with a chat template, with held-out rows: lines of text, none where all is well.

A problem is unsound where training would fail, or teach what nobody wants; else it is odd, and to be looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fastpost.data import Counts
from fastpost.data.chat import Messages, common_prefix, opening, render
from fastpost.data.counts import NOTES, noted
from fastpost.doctor.columns import key
from fastpost.files import Row, Rows

DROPPED = ("masked", "unaligned", "too_long", "identical")
SEEN = 64  # conversations that are enough to know a template


@dataclass(frozen=True)
class Problems:
    """What is wrong, in lines."""

    unsound: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()

    def __add__(self, other: Problems) -> Problems:
        return Problems(self.unsound + other.unsound, self.odd + other.odd)


def count_problems(counts: Counts) -> Problems:
    """What the counts of a verb say of training on them."""
    dropped = sum(getattr(counts, name) for name in DROPPED)
    unsound = []
    if dropped > counts.examples:
        unsound.append(
            f"most of the rows are dropped: only {counts.examples} {counts.unit} are left of {counts.rows} rows"
        )
    if counts.predicted and counts.without_eos == counts.examples:
        unsound.append(
            f"nothing teaches the model to stop: none of the {counts.examples} {counts.unit} has an EOS to predict"
        )
    if counts.empty == counts.examples:
        unsound.append("every answer is empty")
    if counts.overlong:
        unsound.append(
            f"{counts.overlong} of {counts.examples} {counts.unit} are {NOTES['overlong']}: lower max_length"
        )
    said = {"overlong"} | {name for name in ("without_eos", "empty") if getattr(counts, name) == counts.examples}
    odd = [f"{n} of {counts.rows} rows {NOTES[name]}" for name, n in noted(counts).items() if name not in said]
    return Problems(tuple(unsound), tuple(odd))


def label_problems(desirable: int, undesirable: int) -> Problems:
    """KTO pushes desirable completions and undesirable ones apart: it wants both."""
    if desirable and undesirable:
        return Problems()
    kind = "desirable" if desirable else "undesirable"
    return Problems(unsound=(f"every completion is {kind}: there is nothing to tell it from",))


# ---- tokenizers and their templates ----


def tokenizer_problems(tokenizer: Any) -> Problems:
    """What a tokenizer does to any text."""
    if tokenizer.eos_token_id is None:
        return Problems(unsound=("the tokenizer has no EOS token, so nothing would teach the model to stop",))
    if tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
        return Problems(unsound=("the tokenizer ends every text with EOS, prompts too: switch its add_eos_token off",))
    return Problems()


def template_problems(conversations: Rows, tokenizer: Any) -> Problems:
    """What a chat template does to conversations: rows of `messages`, of a prompt and an answer, or of a prompt."""
    if not len(conversations):
        return Problems()
    if not getattr(tokenizer, "chat_template", None):
        return Problems(unsound=("the rows are conversations, but the tokenizer has no chat template",))
    some = (conversations[i] for i in range(0, len(conversations), -(-len(conversations) // SEEN)))
    turns = [_Turn.of(row, tokenizer) for row in some]
    return _turn_problems([turn for turn in turns if turn is not None], tokenizer)


@dataclass(frozen=True)
class _Turn:
    """The last words of the assistant in a conversation: what is before them, and all of it, in tokens."""

    bare: list[int]
    opened: list[int]
    whole: list[int]

    @classmethod
    def of(cls, row: Row, tokenizer: Any) -> _Turn | None:
        """None where the assistant does not have the last word, or nobody spoke before it, or the template objects."""
        messages = _conversation(row)
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            return None
        try:
            begun = opening(tokenizer, messages[:-1], row, "a conversation")
            return cls(begun.bare, begun.opened, render(tokenizer, messages, row, "a conversation")[0])
        except ValueError:
            return None  # who reads the rows says so, and names the row


def _conversation(row: Row) -> Messages:
    """All that is said in a row."""
    parts = (
        [row.get("messages")] if "messages" in row else [row.get("prompt"), row.get("completion", row.get("chosen"))]
    )
    return [message for part in parts if isinstance(part, list) for message in part if isinstance(message, dict)]


def _turn_problems(turns: Sequence[_Turn], tokenizer: Any) -> Problems:
    unsound, odd = [], []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if any(bos is not None and turn.whole[:2] == [bos, bos] for turn in turns):
        unsound.append("the chat template writes two BOS tokens at the start of a conversation")
    if turns and not any(eos in turn.whole[len(turn.bare) :] for turn in turns):
        unsound.append(f"the chat template never writes the EOS, {tokenizer.eos_token!r}, after the assistant's words")
    rewritten = sum(turn.whole[: len(turn.bare)] != turn.bare for turn in turns)
    if rewritten:
        odd.append(
            f"the chat template rewrites the conversation when the assistant answers ({rewritten} of {len(turns)} "
            "looked at): the model is trained on other prompts than it will see"
        )
    extra = [turn.opened[common_prefix(turn.opened, turn.whole) :] for turn in turns]
    if not rewritten and any(extra):
        said = tokenizer.decode(max(extra, key=len))
        odd.append(
            f"the chat template opens the assistant's turn with {said!r}, which the conversations do not have there: "
            "the model is trained on other prompts than it will see"
        )
    return Problems(tuple(unsound), tuple(odd))


# ---- held-out rows ----


def prompt_of(row: Mapping[str, Any]) -> Any:
    """What a row asks: its prompt, or a conversation up to the last message; None for a text."""
    if "prompt" in row:
        return row["prompt"]
    messages = row.get("messages", row.get("chosen"))
    return messages[:-1] if isinstance(messages, list) else None


@dataclass(frozen=True)
class Overlap:
    """How much of held-out rows was there in training; an example is (row held out, row in training)."""

    rows: int
    held_out: int
    same_rows: int
    same_prompts: int
    example: tuple[int, int] | None

    @property
    def lines(self) -> list[str]:
        """What there is to say of it."""
        at = "" if self.example is None else f" (row {self.example[0]} here, row {self.example[1]} there)"
        counts = {"rows": self.same_rows}
        if self.same_prompts > self.same_rows:
            counts["prompts"] = self.same_prompts
        said = [f"{n} of {self.held_out} held-out {what} are in the training data" for what, n in counts.items() if n]
        return [line + at * (i == 0) for i, line in enumerate(said)]


def overlap(train: Rows, held_out: Rows) -> Overlap:
    """Held-out rows, and prompts, that training has word for word: an evaluation on them measures memory."""
    asked = [_keys(row) for row in held_out]
    wanted = set(chain.from_iterable(asked)) - {None}
    first: dict[str | None, int] = {}  # where training has it
    for i, row in enumerate(train):
        for name in _keys(row):
            if name in wanted:
                first.setdefault(name, i)
    rows, prompts = ([(i, first[names[k]]) for i, names in enumerate(asked) if names[k] in first] for k in (0, 1))
    example = next(iter(rows + prompts), None)
    return Overlap(len(train), len(held_out), len(rows), len(prompts), example)


def _keys(row: Row) -> tuple[str, str | None]:
    """Of the row, and of what it asks; one is never the other's, since a row is an object."""
    asked = prompt_of(row)
    return key(row), None if asked is None else key(asked)
