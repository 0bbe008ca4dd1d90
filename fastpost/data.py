"""Rows -> token sequences: TRL's column formats, chat templates, and loud checks on the way.

A row is one of  prompt + completion | messages | text  (sft),  prompt + anything  (grpo). A prompt or completion is a
string or a list of {"role": ..., "content": ...}; the columns `tools` and `chat_template_kwargs` go to the template.
What is cut, dropped or odd is counted, and the counts are printed: silence about data is how runs fail.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from fastpost.files import Row, Rows
from fastpost.packing import Example
from fastpost.types import nearest

Messages = list[dict[str, Any]]
Verb = Literal["sft", "grpo"]

# Any one of these sets of columns will do; the first that is there is taken.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("prompt", "completion"), ("messages",), ("text",)),
    "grpo": (("prompt",),),
}


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a file; `str()` is the line that a trainer prints."""

    rows: int
    examples: int
    tokens: int
    predicted: int  # tokens with a loss
    truncated: int = 0  # kept, cut to max_length
    masked: int = 0  # dropped: no token left to predict
    unaligned: int = 0  # dropped: the template writes the prompt differently once there is a completion
    without_eos: int = 0  # kept, but nothing in it teaches the model to stop

    def __str__(self) -> str:
        notes = {
            "cut to max_length": self.truncated,
            "dropped with nothing left to predict": self.masked,
            "dropped because the chat template rewrites the prompt when a completion follows": self.unaligned,
            "without an EOS to predict": self.without_eos,
        }
        said = "".join(f"; {count} {note}" for note, count in notes.items() if count)
        share = f"{self.predicted} of {self.tokens} tokens predicted"
        return f"{self.rows} rows, {self.examples} examples, {share}{said}"


@dataclass(frozen=True)
class Prompt:
    """What is generated from, and what the reward functions are given beside it."""

    prompt: str | Messages
    input_ids: list[int]
    columns: Row  # every other column of the row


def check_columns(rows: Rows, verb: Verb, path: str | PathLike[str]) -> None:
    """ValueError unless every row has one of the formats that the verb takes, the same in all of them."""
    present = list(rows.column_names) if hasattr(rows, "column_names") else list(rows[0])
    if "images" in present or "image" in present:
        raise ValueError(f"{path}: images are not supported yet; drop the column to train on the text alone")
    wanted = _format(present, verb)
    if wanted is None:
        raise ValueError(f"{path}: {_missing(present, verb)}")
    kinds = {"text": ("text",), "messages": ("messages",)}
    found: str | None = None
    for i, row in enumerate(rows):
        for name in wanted:
            where = f"{path}, row {i}, column {name!r}"
            kind = _kind(row.get(name), where, kinds.get(name, ("text", "messages")))
            if kind != (found := found or kind):
                raise ValueError(f"{where} is {kind}, where the rows before have {found}")


def _format(present: list[str], verb: str) -> tuple[str, ...] | None:
    return next((names for names in FORMATS[verb] if all(name in present for name in names)), None)


def _missing(present: list[str], verb: str) -> str:
    """Which columns the verb takes, which there are, and which of them was probably meant."""
    takes = ", or ".join(" and ".join(repr(name) for name in names) for names in FORMATS[verb])
    known = [name for names in FORMATS[verb] for name in names]
    meant = [f"{name!r}{hint}" for name in present if name not in known and (hint := nearest(name, known))]
    return f"{verb} takes the columns {takes}; this file has {', '.join(map(repr, present))}" + "".join(
        f"; {hint}" for hint in meant
    )


def _kind(value: Any, where: str, allowed: tuple[str, ...]) -> str:
    """ "text" or "messages"; ValueError for anything else, and for what is not allowed."""
    if isinstance(value, str) and "text" in allowed:
        return "text"
    if not isinstance(value, list) or not value or "messages" not in allowed:
        expected = " or ".join({"text": "text", "messages": "a list of messages"}[kind] for kind in allowed)
        raise ValueError(f"{where} must be {expected}, got {'nothing' if value is None else repr(value)[:60]}")
    for message in value:
        if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
            raise ValueError(f'{where}: a message must be {{"role": ..., "content": ...}}, got {repr(message)[:80]}')
    return "messages"


def sft_examples(
    rows: Rows,
    tokenizer: Any,
    max_length: int | None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> tuple[list[Example], Counts]:
    """One Example a row. completion_only_loss None: where there is a prompt, its tokens carry no loss."""
    first = rows[0]
    if completion_only_loss and "prompt" not in first:
        raise ValueError(
            "completion_only_loss needs the columns 'prompt' and 'completion'; messages have assistant_only_loss"
        )
    if assistant_only_loss:
        _check_generation_mask(first, tokenizer)
    counter: Counter[str] = Counter()
    examples = []
    for i, row in enumerate(rows):
        counter["rows"] += 1
        sequence = _sequence(row, tokenizer, completion_only_loss is not False, assistant_only_loss, f"row {i}")
        if sequence is None:
            counter["unaligned"] += 1
            continue
        ids, mask = sequence
        kept = ids[:max_length], mask[:max_length]
        if not any(kept[1][1:]):
            counter["masked"] += 1
            continue
        counter["truncated"] += len(kept[0]) < len(ids)
        predicted = [token for token, wanted in zip(kept[0][1:], kept[1][1:], strict=True) if wanted]
        counter["without_eos"] += tokenizer.eos_token_id not in predicted
        counter["tokens"] += len(kept[0])
        counter["predicted"] += len(predicted)
        examples.append(Example(*kept))
    names = ("rows", "tokens", "predicted", "truncated", "masked", "unaligned", "without_eos")
    counts = Counts(examples=len(examples), **{name: counter[name] for name in names})
    if not examples:
        raise ValueError(f"no row is left to train on: {counts}" + ("" if max_length is None else f" ({max_length})"))
    return examples, counts


def _sequence(
    row: Row, tokenizer: Any, completion_only: bool, assistant_only: bool, where: str
) -> tuple[list[int], list[bool]] | None:
    """Token ids and loss mask of a row; None if where its completion begins cannot be told."""
    if "prompt" not in row or "completion" not in row:
        if "messages" in row:
            return _chat(tokenizer, row["messages"], row, where, assistant_only)
        ids = tokenizer(_ended(row["text"], tokenizer)).input_ids
        return ids, [True] * len(ids)
    if isinstance(row["prompt"], str):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = tokenizer(_ended(row["prompt"] + row["completion"], tokenizer)).input_ids
        if ids[: len(prompt)] != prompt:
            # A token straddles the boundary: the model must see the prompt as it will when it generates.
            ids = prompt + tokenizer(_ended(row["completion"], tokenizer), add_special_tokens=False).input_ids
        start = len(prompt)
        mask = [True] * len(ids)
    else:
        ids, mask = _chat(tokenizer, row["prompt"] + row["completion"], row, where, assistant_only)
        bare, _ = _chat(tokenizer, row["prompt"], row, where)
        opened, _ = _chat(tokenizer, row["prompt"], row, where, open_turn=True)
        if ids[: len(bare)] != bare:
            return None
        start = max(len(bare), _common_prefix(ids, opened))
    if completion_only:
        mask = [False] * start + mask[start:]
    return ids, mask


def _ended(text: str, tokenizer: Any) -> str:
    """The text with an end that the model can learn."""
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no EOS token, so nothing would teach the model to stop: set eos_token")
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _chat(
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


def _check_generation_mask(row: Row, tokenizer: Any) -> None:
    """assistant_only_loss needs a template that marks what the assistant says."""
    if not isinstance(row.get("messages", row.get("prompt")), list):
        raise ValueError("assistant_only_loss needs conversations (messages, or prompt and completion as messages)")
    if "generation" not in str(tokenizer.chat_template):
        raise ValueError(
            "assistant_only_loss needs a chat template that marks the assistant's words with {% generation %}"
        )


def prompts(rows: Rows, tokenizer: Any, max_prompt_length: int | None) -> list[Prompt]:
    """One Prompt a row; a prompt longer than max_prompt_length is left out: len(rows) - len(prompts) of them."""
    found = []
    for i, row in enumerate(rows):
        prompt = row["prompt"]
        if isinstance(prompt, str):
            ids = tokenizer(prompt).input_ids
        else:
            ids, _ = _chat(tokenizer, prompt, row, f"row {i}", open_turn=True)
        if not ids:
            raise ValueError(f"row {i}: the prompt {prompt!r} has no tokens, so there is nothing to generate from")
        if max_prompt_length is None or len(ids) <= max_prompt_length:
            found.append(Prompt(prompt, ids, {name: value for name, value in row.items() if name != "prompt"}))
    if not found:
        raise ValueError(f"every prompt is longer than max_prompt_length, {max_prompt_length} tokens")
    return found
