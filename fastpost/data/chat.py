"""Conversations and text -> tokens: the chat template, the EOS, and where the prompt ends.

The columns `tools` and `chat_template_kwargs` of a row go to the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpost.files import Row

Messages = list[dict[str, Any]]
RENDERED = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Opening:
    """A prompt in tokens: as it stands in a conversation that goes on, and up to where the model is to speak."""

    prompt: str | Messages
    bare: list[int]
    opened: list[int]
    implicit: bool = False  # no column of its own: two texts are alike so far, be it to the middle of a word


@dataclass(frozen=True)
class Continued:
    """A prompt and a completion; mask[i]: token i may carry a loss."""

    input_ids: list[int]
    mask: list[bool]
    start: int  # of the completion

    def completion_mask(self, start: int) -> list[bool]:
        """The mask without what is before `start`."""
        return [False] * start + self.mask[start:]


def rendered(columns: Mapping[str, Any]) -> Row:
    """Those columns of a row without which its conversation would be other tokens."""
    return {name: columns[name] for name in RENDERED if name in columns}


def ended(text: str, tokenizer: Any) -> str:
    """The text with an end that the model can learn."""
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no EOS token, so nothing would teach the model to stop: set eos_token")
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def inert(text: str, tokenizer: Any) -> str:
    """Text of somebody else without special tokens: it can end no turn, and speak as nobody. Removed until none is
    left, since what stands around one may be another's two halves."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    specials = [token for token in {*added, *tokenizer.all_special_tokens} if token]
    if not specials:
        return text
    one = re.compile("|".join(map(re.escape, specials)))
    while (cut := one.sub("", text)) != text:
        text = cut
    return text


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements the two begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def is_empty(answer: str | Messages) -> bool:
    """Whether nothing is said: no text but white space, nor a call of a tool, in the last message."""
    if isinstance(answer, str):
        return not answer.strip()
    content = answer[-1].get("content")
    return not answer[-1].get("tool_calls") and not (content.strip() if isinstance(content, str) else content)


def tools_of(row: Row, where: str) -> list[Any] | None:
    """The tools of a row, which a column of one type holds as JSON; an empty list is none."""
    tools = row.get("tools")
    try:
        return (json.loads(tools) if isinstance(tools, str) else tools) or None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, column 'tools' is text, but not JSON: {error}") from None


def render(
    tokenizer: Any, messages: Messages, row: Row, where: str, assistant_only: bool = False, open_turn: bool = False
) -> tuple[list[int], list[bool]]:
    """Messages through the chat template; open_turn: up to where the assistant is to speak, or to go on speaking."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where} is a conversation, but the tokenizer has no chat template")
    continued = open_turn and messages[-1]["role"] == "assistant"
    tools = tools_of(row, where)
    try:
        out = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=open_turn and not continued,
            continue_final_message=continued,
            return_assistant_tokens_mask=assistant_only,
            return_dict=True,
            **(row.get("chat_template_kwargs") or {}),
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(f"{where}: the chat template refused it: {error}") from error
    ids = list(out["input_ids"])
    return ids, [bool(kept) for kept in out["assistant_masks"]] if assistant_only else [True] * len(ids)


def opening(tokenizer: Any, prompt: str | Messages, row: Row, where: str, implicit: bool = False) -> Opening:
    """The tokens of a prompt."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        return Opening(prompt, ids, ids, implicit)
    bare, _ = render(tokenizer, prompt, row, where)
    opened, _ = render(tokenizer, prompt, row, where, open_turn=True)
    return Opening(prompt, bare, opened, implicit)


def continued(
    tokenizer: Any, begun: Opening, completion: Any, row: Row, where: str, assistant_only: bool = False
) -> Continued | None:
    """A prompt and what follows it; None if where that begins cannot be told."""
    if isinstance(begun.prompt, str):
        ids = tokenizer(ended(begun.prompt + completion, tokenizer)).input_ids
        start = common_prefix(ids, begun.bare)
        if start < len(begun.bare) and begun.implicit:
            return Continued(ids, [True] * len(ids), start)
        if start < len(begun.bare):
            # A token straddles the boundary: the model must see the prompt as it will when it generates.
            ids = begun.bare + tokenizer(ended(completion, tokenizer), add_special_tokens=False).input_ids
        return Continued(ids, [True] * len(ids), len(begun.bare))
    ids, mask = render(tokenizer, begun.prompt + completion, row, where, assistant_only)
    if ids[: len(begun.bare)] != begun.bare:
        return None
    return Continued(ids, mask, max(len(begun.bare), common_prefix(ids, begun.opened)))


def whole(tokenizer: Any, answer: str | Messages, row: Row, where: str, assistant_only: bool = False) -> Continued:
    """Text or a conversation that has no prompt of its own."""
    if isinstance(answer, str):
        ids = tokenizer(ended(answer, tokenizer)).input_ids
        return Continued(ids, [True] * len(ids), 0)
    return Continued(*render(tokenizer, answer, row, where, assistant_only), 0)


def check_generation_mask(row: Row, tokenizer: Any) -> None:
    """assistant_only_loss needs a template that marks what the assistant says."""
    if not isinstance(row.get("messages", row.get("prompt")), list):
        raise ValueError("assistant_only_loss needs conversations (messages, or prompt and completion as messages)")
    if not re.search(r"{%-?\s*generation\b", str(tokenizer.chat_template)):  # add_generation_prompt is another thing
        raise ValueError(
            "assistant_only_loss needs a chat template that marks the assistant's words with {% generation %}"
        )
