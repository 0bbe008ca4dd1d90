"""Conversations and text -> tokens: the chat template, the EOS, and where the prompt ends.

The columns `tools` and `chat_template_kwargs` of a row go to the template.
"""

from __future__ import annotations

from typing import Any

from fastpost.files import Row

Messages = list[dict[str, Any]]


def ended(text: str, tokenizer: Any) -> str:
    """The text with an end that the model can learn."""
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no EOS token, so nothing would teach the model to stop: set eos_token")
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def render(
    tokenizer: Any, messages: Messages, row: Row, where: str, assistant_only: bool = False, open_turn: bool = False
) -> tuple[list[int], list[bool]]:
    """Messages through the chat template; open_turn: up to where the assistant is to speak, or to go on speaking."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where} is a conversation, but the tokenizer has no chat template")
    continued = open_turn and messages[-1]["role"] == "assistant"
    try:
        out = tokenizer.apply_chat_template(
            messages,
            tools=row.get("tools"),
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


def check_generation_mask(row: Row, tokenizer: Any) -> None:
    """assistant_only_loss needs a template that marks what the assistant says."""
    if not isinstance(row.get("messages", row.get("prompt")), list):
        raise ValueError("assistant_only_loss needs conversations (messages, or prompt and completion as messages)")
    if "generation" not in str(tokenizer.chat_template):
        raise ValueError(
            "assistant_only_loss needs a chat template that marks the assistant's words with {% generation %}"
        )
