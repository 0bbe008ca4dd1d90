"""Of verbs whose rows say what is right."""

from __future__ import annotations

from dataclasses import dataclass

from fastpost.trainers.config.groups import DATA
from fastpost.trainers.config.training import Training
from fastpost.trainers.options import option


@dataclass(frozen=True, kw_only=True)
class Sft(Training):
    """Supervised fine-tuning on text, messages, or prompt + completion."""

    max_length: int | None = option(1024, DATA, "tokens; longer rows are cut at the end", above=1)
    completion_only_loss: bool | None = option(
        None, DATA, "leave the prompt out of the loss; default: where rows have prompt and completion"
    )
    assistant_only_loss: bool = option(False, DATA, "of conversations only what the assistant says")
