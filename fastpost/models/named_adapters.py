"""Several adapters on one base, each by the name of its role: made, copied, read from PEFT's files and written to them.

The adapter of a judge lies in its files as PEFT saves one of a model for sequence classification: its scalar head is
`score` among modules_to_save.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastpost.models.scalar import head_tensors, scalar_of, split_scalar
from fastpost.models.switch import Switch
from fastpost.models.trunk import causal_lm

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # PiSSA, OLoRA and others subtract what they add from it
CLASSIFIERS = {"score", "classifier"}  # what PEFT names in modules_to_save of every sequence classifier
PREFIX = "base_model.model."  # of every name in PEFT's files
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def add(model: Any, name: str, config: PeftConfig) -> PeftModel:
    """The model with one adapter more, fresh; the others, and what of them is trained, stay as they are."""
    from peft import PeftModel, get_peft_model

    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    refuse_what_changes_the_base(config, name)
    try:
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=name)
        model.add_adapter(name, config)
    except ValueError as error:
        raise ValueError(f"{name}'s adapter does not fit {type(causal_lm(model)).__name__}: {error}") from error
    return model


def add_saved(model: Any, name: str, directory: Path, *, judges: bool) -> tuple[PeftModel, nn.Linear | None]:
    """The adapter of a directory, and with `judges` the scalar head beside it."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    where = f"{name}'s adapter in {directory}"
    if not (directory / WEIGHTS).is_file():
        raise ValueError(f"{where} has no {WEIGHTS}")
    config: Any = PeftConfig.from_pretrained(str(directory))
    head, tensors = split_scalar(load_file(directory / WEIGHTS))
    scalar = scalar_of(head, model, where) if judges else None
    _warn_of_other_base(config.base_model_name_or_path, model, where)
    config.modules_to_save = sorted(set(config.modules_to_save or ()) - CLASSIFIERS) or None
    model = add(model, name, config)
    _fill(model, name, tensors, where)
    return model, scalar


def add_copy(model: PeftModel, name: str, other: str) -> PeftModel:
    """The adapter `other` once more."""
    from peft import get_peft_model_state_dict

    model = add(model, name, model.peft_config[other])
    _fill(model, name, get_peft_model_state_dict(model, adapter_name=other), f"{name}'s copy of {other}'s adapter")
    return model


def refuse_what_changes_the_base(config: Any, name: str) -> None:
    """Other roles stand on it, and with every adapter off it is the reference."""
    init, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
    if init not in KEEPS_BASE:
        raise ValueError(
            f"{name}'s adapter has init_lora_weights={init!r}, which changes the base that all roles stand on: use one "
            f"of {KEEPS_BASE}"
        )
    if bias != "none":
        raise ValueError(
            f"{name}'s adapter has bias={bias!r}, which trains the base that all roles stand on: use 'none'"
        )
    if getattr(config, "layer_replication", None):
        raise ValueError(f"{name}'s adapter has layer_replication, which makes another model of the base: leave it out")


def _fill(model: PeftModel, name: str, tensors: Mapping[str, Tensor], where: str) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    base = type(causal_lm(model)).__name__
    for key, wanted in get_peft_model_state_dict(model, adapter_name=name).items():
        if key in tensors and tensors[key].shape != wanted.shape:
            raise ValueError(
                f"{where} is one of another base: {key} must be {tuple(wanted.shape)} for this {base}, got "
                f"{tuple(tensors[key].shape)}"
            )
    found = set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
    own = {id(p) for p in Switch.of(model).parameters(name)}
    absent = [key for key, p in model.named_parameters() if id(p) in own and key in set(found.missing_keys)]
    if absent or found.unexpected_keys:
        what = f"it has no {absent[0]}" if absent else f"this {base} has no {found.unexpected_keys[0]}"
        raise ValueError(f"{where} is one of another base: {what}")


def _warn_of_other_base(named: str | None, model: Any, where: str) -> None:
    """Two bases of one shape cannot be told apart by an adapter's tensors, and their names may differ for no reason."""
    base = getattr(model, "name_or_path", None)
    if named and base and Path(named).name != Path(base).name:
        warnings.warn(f"{where} was trained on {named}, and is used on {base}", stacklevel=2)


def save_adapter(model: PeftModel, adapter: str, scalar: nn.Linear | None, directory: Path) -> None:
    """PEFT's files, in a new directory."""
    from safetensors.torch import load_file, save_file

    scratch = directory.with_name(f"{directory.name}.tmp")
    model.save_pretrained(str(scratch), selected_adapters=[adapter])
    (scratch if adapter == "default" else scratch / adapter).replace(directory)
    shutil.rmtree(scratch, ignore_errors=True)
    if scalar is None:
        return
    weights, config = directory / WEIGHTS, directory / CONFIG
    save_file(load_file(weights) | head_tensors(scalar, PREFIX), weights, metadata={"format": "pt"})
    facts = json.loads(config.read_text(encoding="utf-8"))
    facts |= {"task_type": "SEQ_CLS", "modules_to_save": [*(facts["modules_to_save"] or ()), "score"]}
    config.write_text(json.dumps(facts, indent=2, sort_keys=True), encoding="utf-8")
