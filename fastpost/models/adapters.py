"""Adapters on the disk: adapter_config.json, which names the base, and adapter_model.safetensors, as peft writes them.

An adapter fits one base. peft loads what it can and warns of the rest; here it fits, or ValueError says what does not.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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


def load_adapter(
    model: Any, directory: str | PathLike[str], *, name: str = "default", trainable: bool = True
) -> PeftModel:
    """The model with the adapter of a directory on it, beside those that it has already."""
    from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    path = Path(directory).expanduser()
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"the adapter {str(directory)!r} has no {WEIGHTS}")
    config = PeftConfig.from_pretrained(str(path))
    config.inference_mode = not trainable
    _check_family(config.base_model_name_or_path, model, directory)
    mapping = getattr(model, "_checkpoint_conversion_mapping", None)  # of layers that transformers has renamed
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        _check_shapes({key: tuple(value.shape) for key, value in state.items()}, path)
        result = model.load_adapter(str(path), name, is_trainable=trainable, key_mapping=mapping or None)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"the adapter {str(directory)!r} does not fit {_name(model)}: {error}") from error
    lost = _lost(result.missing_keys, result.unexpected_keys)
    if lost:
        raise ValueError(f"the adapter {str(directory)!r} does not fit {_name(model)}: {lost}")
    return model


@contextmanager
def with_weights(model: PeftModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The active adapter with other weights for a while, as `peft.load_peft_weights` reads them; its own come back."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = {name: x.clone() for name, x in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    try:
        set_peft_model_state_dict(model, dict(weights))
        yield
    finally:
        set_peft_model_state_dict(model, own)


def _check_family(base: str | None, model: Any, directory: str | PathLike[str]) -> None:
    """Families have layers of one name; that the base is another directory may be a copy."""
    file = Path(base or "").expanduser() / "config.json"
    if not base or not file.is_file():
        return
    wanted, got = json.loads(file.read_text(encoding="utf-8")).get("model_type"), model.config.model_type
    if wanted and wanted.removesuffix("_text") != got.removesuffix("_text"):
        raise ValueError(
            f"the adapter {str(directory)!r} was made for a {wanted} ({base}), and {_name(model)} is a {got}"
        )


def _check_shapes(wanted: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """ValueError for the first tensor of another shape in the file."""
    from safetensors import safe_open

    with safe_open(path / WEIGHTS, "pt") as file:
        for key in sorted(set(file.keys()) & set(wanted)):
            got = tuple(file.get_slice(key).get_shape())
            if got != wanted[key]:
                raise ValueError(f"{key} has shape {got} in the file, and {wanted[key]} would fit")


def _lost(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What was in the model or in the file alone, in words; empty where nothing was."""
    only_in = {"the file": sorted(unexpected), "the model": sorted(missing)}
    return "; ".join(
        f"{keys[0]} and {len(keys) - 1} more are in {where} alone" for where, keys in only_in.items() if keys
    )


def _name(model: Any) -> str:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return f"{type(inner).__name__} of {inner.config._name_or_path or 'no directory'}"
