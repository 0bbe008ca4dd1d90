"""Which model a verb begins with, and in what precision it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastpost.trainers.config.groups import MODEL
from fastpost.trainers.options import option


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model of a directory."""

    model: str = option(
        "",
        MODEL,
        "directory (or hub name) of a Hugging Face causal LM and its tokenizer; or of an adapter",
        needed=True,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", MODEL, "of the weights; auto: bfloat16 for a frozen base on a GPU, float32 else (TRL: float32)"
    )
    bf16: bool | None = option(None, MODEL, "compute in bfloat16 (autocast); default: on a GPU that can")
    attn_implementation: str | None = option(None, MODEL, "a name that transformers knows; default: packed attention")
    trust_remote_code: bool = option(False, MODEL, "run code that comes with the model")
