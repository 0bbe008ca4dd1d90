"""Scalar heads, a value's or a reward's: one number for each hidden state, v = h w^T + b, in fp32 or wider.

On disk they are what AutoModelForSequenceClassification with num_labels=1 calls `score`, under PEFT's prefix where they
lie beside an adapter. So a reward model that was trained elsewhere loads, and what is saved here loads there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpost.models import attention
from fastpost.models.loading import attend_packed, check_complete
from fastpost.models.probe import check_packing
from fastpost.models.qlora import keep_differentiable
from fastpost.models.trunk import causal_lm

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

FILE = "score.safetensors"
SCORE = re.compile(r"(?:^|\.)score\.(?:modules_to_save\.(?:\w+\.)?)?(weight|bias)$")


def width(model: nn.Module) -> int:
    """D."""
    return causal_lm(model).config.get_text_config().hidden_size


def new_scalar(model: nn.Module) -> nn.Linear:
    """A head for this trunk that says 0 of everything: what it has not learnt adds nothing to an advantage."""
    scalar = nn.Linear(width(model), 1, bias=False, device=causal_lm(model).device, dtype=torch.float32)
    nn.init.zeros_(scalar.weight)
    return scalar


def split_scalar(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the tensors of a file, those of the scalar head by their bare names, and the rest."""
    found = {name: match.group(1) for name in tensors if (match := SCORE.search(name))}
    return {bare: tensors[name] for name, bare in found.items()}, {n: x for n, x in tensors.items() if n not in found}


def scalar_of(tensors: Mapping[str, Tensor], model: nn.Module, where: str) -> nn.Linear:
    """A head of these tensors, `weight` and perhaps `bias`, in fp32, where the model is."""
    if "weight" not in tensors:
        raise ValueError(f"{where} has no scalar head: score.weight (1, {width(model)}) is not in it")
    check_scalar(tensors["weight"], model, where)
    scalar = new_scalar(model)
    scalar.weight.data.copy_(tensors["weight"])
    if "bias" in tensors:
        scalar.bias = nn.Parameter(tensors["bias"].to(scalar.weight))
    return scalar


def load_scalar(directory: Path, model: nn.Module, where: str) -> nn.Linear:
    """The head that `save_scalar` wrote, which belongs to no adapter of its own."""
    from safetensors.torch import load_file

    if not (directory / FILE).is_file():
        raise ValueError(f"{where}'s head {str(directory)!r} has no {FILE}")
    return scalar_of(split_scalar(load_file(directory / FILE))[0], model, f"{where}'s head in {directory}")


def save_scalar(scalar: nn.Linear, directory: Path) -> None:
    """A head alone."""
    from safetensors.torch import save_file

    directory.mkdir()
    save_file(head_tensors(scalar), directory / FILE, metadata={"format": "pt"})


def check_scalar(weight: Tensor, model: nn.Module, where: str) -> None:
    if weight.shape != (1, width(model)):
        raise ValueError(
            f"{where} has a scalar head of another width: score.weight must be {(1, width(model))} for hidden states "
            f"of {type(causal_lm(model)).__name__}, got {tuple(weight.shape)}"
        )


def scores(scalar: nn.Linear, hidden: Tensor) -> Tensor:  # (..., D) -> (...)
    """Autocast would round to bf16 what advantages are differences of."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    bias = None if scalar.bias is None else scalar.bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(dtype), scalar.weight.to(dtype), bias)[..., 0]


def head_tensors(scalar: nn.Linear, prefix: str = "") -> dict[str, Tensor]:
    """What of a head goes into a file."""
    return {f"{prefix}score.{bare}": x.detach().cpu().contiguous() for bare, x in scalar.state_dict().items()}


def own_scalar(model: nn.Module, where: str) -> nn.Linear:
    """The head of a model for sequence classification, as it is in there."""
    found: Any = getattr(causal_lm(model), "score", None)
    if hasattr(found, "modules_to_save"):
        found = found.modules_to_save[found.active_adapters[0]]
    if not isinstance(found, nn.Linear):
        raise ValueError(
            f"{where} must have a scalar head, a linear layer called score, as AutoModelForSequenceClassification with "
            f"num_labels=1 has it; {type(causal_lm(model)).__name__} has {type(found).__name__}"
        )
    check_scalar(found.weight, model, where)
    return found


@contextmanager
def _unreported() -> Iterator[None]:
    """Without transformers' table of missing weights, of which `load_scored` says what there is to say."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_scored(
    directory: str | PathLike[str],
    where: str,
    *,
    fresh: bool,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The trunk and the scalar head of a directory; `fresh`: where there is no head, as in a causal LM, a new one."""
    from transformers import AutoModelForSequenceClassification

    attention.register()
    quantised = {} if quantization_config is None else {"quantization_config": quantization_config}
    with _unreported():
        model, report = AutoModelForSequenceClassification.from_pretrained(
            directory,
            output_loading_info=True,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            local_files_only=Path(directory).is_dir(),
            **quantised,  # None would undo what a checkpoint has
        )
    missing = set(report["missing_keys"])
    check_complete(missing - {"score.weight"}, where)
    if "score.weight" in missing:  # transformers made one up
        if not fresh:
            raise ValueError(f"{where} has no scalar head: score.weight (1, {width(model)}) is not in it")
        model.config.num_labels = model.num_labels = 1
        model.score = new_scalar(model)
    own_scalar(model, where)
    keep_differentiable(model)
    if attn_implementation is None:
        attend_packed(model)
    check_packing(model.eval())
    return model
