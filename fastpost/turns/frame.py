"""What the chat template puts between two turns of the policy, in tokens, after tokens that were sampled.

A conversation that is rendered anew is not the one that was sampled: templates drop old reasoning and write calls their
own way, and of all tokenisations of a text a tokenizer gives one. A policy trained on those tokens is trained on what
it never said. So tokens stay as they were sampled, and only what follows the turn is taken from the template:

  rendered with the answers   ... turn <end> answers <open>
  the tail                    behind its k-th token that ends a turn, of which it has k without the answers

The k-th is found whatever the template made of the turns before, since it makes one turn of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastpost.data.chat import Messages, render
from fastpost.files import Row

CALL = {"type": "function", "function": {"name": "tool", "arguments": {"argument": "value"}}}
ASKED: Messages = [{"role": "user", "content": "question"}]
CALLED: Messages = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
SAID: Messages = [{"role": "assistant", "content": "words"}]
TOLD: Messages = [{"role": "tool", "name": "tool", "content": "answer"}]


@dataclass(frozen=True)
class Frame:
    """A tokenizer's chat template, and the tokens with which the policy ends a turn."""

    tokenizer: Any
    ends: frozenset[int]
    schemas: list[Any]
    corrector: str = "tool"  # the role that answers a malformed call

    def rendered(self, messages: Messages, row: Row, open_turn: bool = False) -> list[int]:
        asked = {**row, "tools": self.schemas}
        return render(self.tokenizer, messages, asked, "a conversation of several turns", open_turn=open_turn)[0]

    def tail(
        self, before: Messages, answers: Messages, last: int, row: Row, context: Sequence[int] = ()
    ) -> tuple[list[int], bool]:
        """What follows a turn whose last token is `last`: its end, where it has none, the answers to it, the opening of
        the next one. And whether the template would have rendered `context`, all tokens before it, as they are."""
        turns = sum(token in self.ends for token in self.rendered(before, row))
        full = self.rendered([*before, *answers], row, open_turn=True)
        at = [i for i, token in enumerate(full) if token in self.ends]
        if not 0 < turns <= len(at):
            raise ValueError(
                "the chat template does not end a turn of the assistant with a token that ends a completion, "
                f"{sorted(self.ends)}: what a tool says would have no place behind it"
            )
        start = at[turns - 1] + (last in self.ends)
        return full[start:], full[: len(context)] == list(context)

    def checked(self, *, tools: bool, user: bool, marks: str = "") -> Frame:
        """Itself, if the template has a place for tools, or for a user, between turns; else ValueError. marks: the text
        that begins a call."""
        end = next(iter(self.ends), -1)
        if tools:
            written = self.tokenizer.decode(self.rendered([*ASKED, *CALLED], {}))
            if marks not in written:
                raise ValueError(
                    f"the chat template does not write a call of a tool as {marks}{{json}}, and the tokenizer has no "
                    "response_template that says how to read one: set tokenizer.response_template"
                )
            self._check_turn(CALLED)
            told, _ = self.tail([*ASKED, *CALLED], TOLD, end, {})
            if TOLD[0]["content"] not in self.tokenizer.decode(told):
                raise ValueError("the chat template does not show what a tool says, in messages of the role `tool`")
        if user:
            self._check_turn(SAID)
            self.tail([*ASKED, *SAID], ASKED, end, {})
        return replace(self, corrector=self._corrector()) if tools else self

    def _check_turn(self, turn: Messages) -> None:
        """It ends what it has opened."""
        count = lambda ids: sum(token in self.ends for token in ids)  # noqa: E731
        if count(self.rendered([*ASKED, *turn], {})) <= count(self.rendered(ASKED, {}, open_turn=True)):
            raise ValueError(
                f"the chat template does not end a turn of the assistant with one of the tokens {sorted(self.ends)}, "
                "which end a completion: add the one it writes to generation_config.eos_token_id"
            )

    def _corrector(self) -> str:
        """Some templates want a call before what a tool says, and a malformed one is none."""
        try:
            self.rendered([*ASKED, *SAID, *TOLD], {})
        except ValueError:
            return "user"
        return "tool"
