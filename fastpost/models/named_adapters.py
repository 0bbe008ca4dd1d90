"""Several adapters on one base, each by the name of its role: made, copied, read from PEFT's files and written to them.

The adapter of a judge lies in its files as PEFT saves one of a model for sequence classification: its scalar head is
`score` among modules_to_save.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastpost.models.adapters import CONFIG, WEIGHTS, check_base, fill, name_of, read_adapter
from fastpost.models.scalar import head_tensors, scalar_of, split_scalar
from fastpost.models.switch import Switch

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # PiSSA, OLoRA and others subtract what they add from it
CLASSIFIERS = {"score", "classifier"}  # what PEFT names in modules_to_save of every sequence classifier
PREFIX = "base_model.model."  # of every name in PEFT's files


def add(model: Any, name: str, config: PeftConfig) -> PeftModel:
    """The model with one adapter more, fresh; the others, and what of them is trained, stay as they are."""
    from peft import PeftModel, get_peft_model

    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    refuse_what_changes_the_base(config, name)
    try:
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=name)
        if name in model.peft_config:
            raise ValueError(f"there is an adapter {name!r} on it, which this one would replace: load the model afresh")
        _refuse_tokens_of_one(model.peft_config, name, config)
        model.add_adapter(name, config)
    except ValueError as error:
        raise ValueError(f"{name}'s adapter does not fit {name_of(model)}: {error}") from error
    return model


def add_saved(model: Any, name: str, directory: Path, *, judges: bool) -> tuple[PeftModel, nn.Linear | None]:
    """The adapter of a directory, and with `judges` the scalar head beside it."""
    where = f"{name}'s adapter in {directory}"
    config, tensors = read_adapter(directory, where)
    head, tensors = split_scalar(tensors)
    scalar = scalar_of(head, model, where) if judges else None
    check_base(config.base_model_name_or_path, model, where)
    config.modules_to_save = sorted(set(config.modules_to_save or ()) - CLASSIFIERS) or None
    model = add(model, name, config)
    fill(model, name, tensors, where)
    return model, scalar


def add_copy(model: PeftModel, name: str, other: str) -> PeftModel:
    """The adapter `other` once more."""
    from peft import get_peft_model_state_dict

    model = add(model, name, model.peft_config[other])
    tensors = get_peft_model_state_dict(model, adapter_name=other, save_embedding_layers=False)
    fill(model, name, tensors, f"{name}'s copy of {other}'s adapter")
    return model


def refuse_bare_base(model: Any) -> None:
    """Of a PEFT model that was made before, in place: PEFT would wrap it once more, and put new adapters over old."""
    if not Switch.of(model).layers:
        return
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{name_of(model)} has adapters already, of roles that were made before: pass the PEFT model that holds "
            "them, roles.policy.model, or load the model afresh"
        )


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


def _refuse_tokens_of_one(others: Mapping[str, Any], name: str, config: Any) -> None:
    """PEFT looks for an adapter's trained tokens in every embedding that has some of any adapter's."""
    trains = {key: bool(getattr(x, "trainable_token_indices", None)) for key, x in {**others, name: config}.items()}
    if len(set(trains.values())) > 1:
        some = ", ".join(key for key, tokens in trains.items() if tokens)
        raise ValueError(f"{some} has trainable_token_indices: all adapters on one base must have some, or none")


def save_adapter(model: PeftModel, adapter: str, scalar: nn.Linear | None, directory: Path) -> None:
    """PEFT's files, in a new directory."""
    from safetensors.torch import load_file, save_file

    scratch = directory.with_name(f"{directory.name}.tmp")
    model.save_pretrained(str(scratch), selected_adapters=[adapter], save_embedding_layers=False)  # none of the base's
    (scratch if adapter == "default" else scratch / adapter).replace(directory)
    shutil.rmtree(scratch, ignore_errors=True)
    if scalar is None:
        return
    weights, config = directory / WEIGHTS, directory / CONFIG
    save_file(load_file(weights) | head_tensors(scalar, PREFIX), weights, metadata={"format": "pt"})
    facts = json.loads(config.read_text(encoding="utf-8"))
    facts |= {"task_type": "SEQ_CLS", "modules_to_save": [*(facts["modules_to_save"] or ()), "score"]}
    config.write_text(json.dumps(facts, indent=2, sort_keys=True), encoding="utf-8")
