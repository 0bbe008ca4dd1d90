"""Of verbs that train nothing, or that train by other verbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastpost.models.adapters import is_adapter
from fastpost.trainers.config.groups import MODEL, RUN
from fastpost.trainers.options import REQUIRED, option, read_fields


@dataclass(frozen=True, kw_only=True)
class Merge:
    """An adapter into its base: a model like any other, for those who load no adapters."""

    model: str = option(REQUIRED, MODEL, "directory of a PEFT adapter, which names its base")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", MODEL, "of the merged weights")
    load_in_4bit: bool = option(
        False, MODEL, "round the base to 4 bits first, as the adapter saw it in QLoRA; the result is not quantised"
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", MODEL, "normal floats or plain ones")
    use_bnb_nested_quant: bool = option(True, MODEL, "with quantised scales")
    trust_remote_code: bool = option(False, MODEL, "run code that comes with the model")
    output_dir: str = option(REQUIRED, RUN, "receives the merged model and its tokenizer")

    def __post_init__(self) -> None:
        read_fields(self)
        if not is_adapter(self.model):
            raise ValueError(f"model {self.model!r} is no directory of a PEFT adapter: it has no adapter_config.json")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """From nothing to a model that learned, on a CPU: SFT on a few worked sums, then GRPO on answers alone."""

    output_dir: str | None = option(None, RUN, "an empty or new directory for all files; default: a new one in runs/")
    seed: int = option(0, RUN, "of task, model and training", least=0)
    control: bool = option(True, RUN, "also spend GRPO's time on more SFT, to compare; not with --no-control")

    def __post_init__(self) -> None:
        read_fields(self)
