"""Adapters on the disk: adapter_config.json, which names the base, and adapter_model.safetensors, as peft writes them.

An adapter fits one base. peft loads what it can and warns of the rest; here it fits, or ValueError says what does not.
And it leaves the base as it is: embeddings that peft saved beside an adapter are not loaded into it, but compared.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpost.models.switch import Switch
from fastpost.models.trunk import causal_lm

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WRAPPED = re.compile(r"\.(?:base_layer|original_module|token_adapter)(?=\.)")  # what peft puts into names of the base


def is_adapter(path: str | PathLike[str]) -> bool:
    """Whether it is a directory with a PEFT adapter in it."""
    return (Path(path).expanduser() / CONFIG).is_file()


def base_of(directory: str | PathLike[str]) -> str:
    """The directory or the hub name of the model that an adapter was made for."""
    file = Path(directory).expanduser() / CONFIG
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not the JSON object that peft writes: {error}") from None
    if not base:
        raise ValueError(f"{file} names no base: write its directory as base_model_name_or_path")
    if is_adapter(base):
        raise ValueError(f"the adapter {directory} has the base {base!r}, which is an adapter itself: merge that first")
    return base


def read_adapter(directory: Path, where: str) -> tuple[Any, dict[str, Tensor]]:
    """peft's config and tensors of a directory."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    if not (directory / WEIGHTS).is_file():
        raise ValueError(f"{where} has no {WEIGHTS}")
    return PeftConfig.from_pretrained(str(directory)), load_file(directory / WEIGHTS)


def fill(model: PeftModel, name: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """Puts tensors, by the names that they have in a file, into an adapter of the model; they must be all of it."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    own = {id(p) for p in Switch.of(model).parameters(name)}
    try:
        tensors = _without_base(model, wanted, tensors)
        _check_shapes(wanted, tensors)
        found = set_peft_model_state_dict(model, tensors, adapter_name=name)
        missing = {key for key, p in model.named_parameters() if id(p) in own} & set(found.missing_keys)
        _check_names(missing, found.unexpected_keys)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{where} does not fit {name_of(model)}: {error}") from error


def load_adapter(model: Any, directory: str | PathLike[str]) -> PeftModel:
    """The model with the adapter of a directory on it, to be trained on."""
    from peft import get_peft_model

    where = f"the adapter {str(directory)!r}"
    config, tensors = read_adapter(Path(directory).expanduser(), where)
    config.inference_mode = False
    check_base(config.base_model_name_or_path, model, where)
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"{where} does not fit {name_of(model)}: {error}") from error
    fill(model, "default", tensors, where)
    return model


@contextmanager
def with_weights(model: PeftModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The active adapter with other weights for a while, as `peft.load_peft_weights` reads them; its own come back."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = {name: x.clone() for name, x in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    try:
        set_peft_model_state_dict(model, _without_base(model, own, weights))
        yield
    finally:
        set_peft_model_state_dict(model, own)


def check_base(base: str | None, model: Any, where: str) -> None:
    """ValueError for an adapter of another family, since families have layers of one name; a warning where the base
    lies elsewhere, which may be a copy: two bases of one shape cannot be told apart by an adapter's tensors."""
    config, name = causal_lm(model).config, causal_lm(model).name_or_path
    file = Path(base or "").expanduser() / "config.json"
    if base and file.is_file():
        wanted, got = json.loads(file.read_text(encoding="utf-8")).get("model_type"), config.model_type
        if wanted and wanted.removesuffix("_text") != got.removesuffix("_text"):
            raise ValueError(f"{where} was made for a {wanted} ({base}), and {name_of(model)} is a {got}")
    if base and name and not _may_be_same(Path(base).expanduser(), Path(name).expanduser()):
        warnings.warn(f"{where} was trained on {base}, and is used on {name}", stacklevel=2)


def _may_be_same(one: Path, other: Path) -> bool:
    """Of directories, whether they are; of a name on the hub, which a directory may be a copy of, by its last part."""
    if one.is_dir() and other.is_dir():
        return one.samefile(other)
    return one.name == other.name


def _without_base(model: Any, own: Collection[str], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are the adapter's. Those of the base, which peft writes where an adapter is on the embedding or
    the head, or the vocabulary was resized, must be what this base has: ValueError if not."""
    base = {WRAPPED.sub("", key): x for key, x in model.state_dict().items()}
    of_base = {key: base[bare] for key in given.keys() - own if (bare := WRAPPED.sub("", key)) in base}
    for key in sorted(of_base):
        _check_same_base(key, given[key], of_base[key])
    return {key: x for key, x in given.items() if key not in of_base}


def _check_same_base(key: str, theirs: Tensor, ours: Tensor) -> None:
    """As far as the narrower of their dtypes tells."""
    if theirs.shape != ours.shape:
        raise ValueError(
            f"{key} of its base has shape {tuple(theirs.shape)}, and here {tuple(ours.shape)}: the vocabulary was "
            "resized, or it is another base"
        )
    dtype = min(theirs.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)
    if not torch.equal(theirs.to(ours.device, dtype), ours.to(dtype)):
        raise ValueError(
            f"{key} of its base has other values here: load the base that it was trained on, or save it with "
            "save_embedding_layers=False"
        )


def _check_shapes(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    for key in sorted(given.keys() & wanted.keys()):
        got, right = tuple(given[key].shape), tuple(wanted[key].shape)
        if got != right:
            raise ValueError(f"{key} has shape {got} in the file, and {right} would fit")


def _check_names(missing: Collection[str], unexpected: Collection[str]) -> None:
    """ValueError for what was in the model or in the file alone."""
    only_in = {"the file": sorted(unexpected), "the model": sorted(missing)}
    lost = [f"{keys[0]} and {len(keys) - 1} more are in {where} alone" for where, keys in only_in.items() if keys]
    if lost:
        raise ValueError("; ".join(lost))


def name_of(model: Any) -> str:
    lm = causal_lm(model)
    return f"{type(lm).__name__} of {lm.name_or_path or 'no directory'}"
