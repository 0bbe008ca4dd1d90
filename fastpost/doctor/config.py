"""What `fastpost doctor` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastpost.data import Verb
from fastpost.trainers.config import DATA, MODEL, RUN
from fastpost.trainers.options import REQUIRED, option, read_fields


def _first_word(group: str, text: str) -> Any:
    """A field that needs no flag: the word after the verb."""
    return field(default=REQUIRED, metadata={**option(REQUIRED, group, text).metadata, "positional": True})


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What a data set is, which verbs can use it, and whether training would be sound: exit code 0, else 1."""

    dataset: str = _first_word(DATA, ".jsonl, .json or .parquet file, or a directory saved by datasets")
    eval_dataset: str | None = option(None, DATA, "the same, held out: may not be in the other one")
    max_length: int | None = option(1024, DATA, "tokens of a sequence, as the verbs have it", above=1)
    max_prompt_length: int | None = option(None, DATA, "tokens of a prompt that is generated from", above=0)
    completion_only_loss: bool | None = option(None, DATA, "as fastpost sft has it")
    assistant_only_loss: bool = option(False, DATA, "as fastpost sft has it")

    model: str | None = option(
        None, MODEL, "directory (or hub name) of a model or adapter: its tokenizer is used; default: what needs none"
    )
    trust_remote_code: bool = option(False, MODEL, "run code that comes with the model")

    verb: Literal["any", Verb] = option("any", RUN, "the one that is asked about")
    samples: int = option(2, RUN, "rows to show for each way of reading them", least=0)
    json: bool = option(False, RUN, "print JSON in place of text")

    def __post_init__(self) -> None:
        read_fields(self)
