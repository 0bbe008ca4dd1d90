"""What a role is made from, and where it then stands: a model, one of its adapters or none, a scalar head or none."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from fastpost.models.adapters import CONFIG, is_adapter
from fastpost.models.loading import load_model
from fastpost.models.named_adapters import add, add_copy, add_saved, refuse_bare_base, refuse_what_changes_the_base
from fastpost.models.qlora import is_quantised
from fastpost.models.scalar import load_scalar, load_scored, new_scalar, own_scalar
from fastpost.models.trunk import causal_lm
from fastpost.models.vocabulary import check_words, has_tokenizer, read_tokenizer

if TYPE_CHECKING:
    from peft import PeftConfig

TRAINED = ("policy", "value")
JUDGES = ("value", "reward")  # those with a scalar head


@dataclass(frozen=True)
class Shared:
    """The adapter of the policy, whose hidden states a value may read instead of its own."""

    role: str = "policy"
    head: str | PathLike[str] | None = None  # a directory that `Roles.save` wrote for it; None: a new one


@dataclass(frozen=True)
class Copied:
    """A role as it is now, once more: its adapter and its scalar head, or its whole model where it has one."""

    role: str


Source: TypeAlias = "PeftConfig | str | PathLike[str] | nn.Module | Shared | Copied | None"


@dataclass(frozen=True, eq=False)
class Place:
    model: Any
    adapter: str | None
    scalar: nn.Linear | None = None


def cast(base: Any, given: Mapping[str, Source], tokenizer: Any) -> dict[str, Place]:
    """The place of every role, the policy's first; the adapters they need are put into the base."""
    refuse_bare_base(base)
    for name, source in given.items():
        _check_files(name, source, tokenizer)
    places = {"policy": _policy(base, given["policy"])}
    for name, source in given.items():
        if name not in places and source is not None:
            places[name] = _place(name, source, places)
    if "reference" not in places and places["policy"].adapter is not None:
        places["reference"] = replace(places["policy"], adapter=None)
    return places


def _policy(base: Any, source: Source) -> Place:
    from_files = isinstance(source, str | PathLike)
    if isinstance(source, nn.Module | Shared | Copied) or (from_files and not is_adapter(source)):
        raise ValueError(f"policy must be an adapter of the model, or None for the model itself, got {_shown(source)}")
    if from_files:
        return Place(add_saved(base, "policy", _directory("policy", source), judges=False)[0], "policy")
    if source is not None:
        return Place(add(base, "policy", source), "policy")
    if hasattr(base, "peft_config"):
        for adapter, config in base.peft_config.items():
            refuse_what_changes_the_base(config, adapter)
        return Place(base, base.active_adapter)
    _refuse_to_train_whole("policy", base)
    return Place(base, None)


def _place(name: str, source: Source, places: Mapping[str, Place]) -> Place:
    match source:
        case Shared():
            return _shared(name, source, places)
        case Copied():
            return _copied(name, source, places)
        case nn.Module():
            _refuse_one_trained_model_twice(name, source, places)
            return _apart(name, source)
        case str() | PathLike():
            return _of_files(name, _directory(name, source), places)
    assert source is not None
    return _fresh(name, source, places)


def _apart(name: str, model: Any) -> Place:
    """A model of its own."""
    refuse_bare_base(model)
    adapter = model.active_adapter if hasattr(model, "peft_config") else None
    if adapter is None and name in TRAINED:
        _refuse_to_train_whole(name, model)
    return Place(model, adapter, own_scalar(model, name) if name in JUDGES else None)


def _of_files(name: str, directory: Path, places: Mapping[str, Place]) -> Place:
    """An adapter of the policy's base, or a model of its own."""
    base, judges = places["policy"].model, name in JUDGES
    if not is_adapter(directory):
        model = load_scored(directory, name, fresh=name == "value") if judges else load_model(directory)[0]
        return _apart(name, model.to(causal_lm(base).device))
    _refuse_on_trained_base(name, places["policy"])
    return Place(base, name, add_saved(base, name, directory, judges=judges)[1])


def _fresh(name: str, config: PeftConfig, places: Mapping[str, Place]) -> Place:
    """An adapter that has learnt nothing yet."""
    if name not in TRAINED:
        raise ValueError(f"{name} is not trained, so a new adapter would say nothing: pass one that has learnt")
    _refuse_on_trained_base(name, places["policy"])
    base = places["policy"].model
    return Place(add(base, name, config), name, new_scalar(base))


def _shared(name: str, source: Shared, places: Mapping[str, Place]) -> Place:
    if name != "value" or source.role != "policy":
        raise ValueError(f"only the value can share, and only with the policy, got {name}={source}")
    base = places["policy"].model
    scalar = new_scalar(base) if source.head is None else load_scalar(_directory(name, source.head), base, name)
    return replace(places["policy"], scalar=scalar)


def _copied(name: str, source: Copied, places: Mapping[str, Place]) -> Place:
    if source.role not in places:
        raise ValueError(f"{name} is to be copied from {source.role!r}, and there are {', '.join(places)} before it")
    other, base, judges = places[source.role], places["policy"].model, name in JUDGES
    if other.model is base and other.adapter is not None:
        add_copy(base, name, other.adapter)
        scalar = copy.deepcopy(other.scalar) if other.scalar is not None else new_scalar(base)
        return Place(base, name, scalar if judges else None)
    if judges != (other.scalar is not None):
        raise ValueError(f"{name} cannot be copied from {source.role}: only one of them has a scalar head")
    if other.adapter is None and name in TRAINED:
        _refuse_to_train_whole(name, other.model)
    return Place(*copy.deepcopy((other.model, other.adapter, other.scalar)))


def _refuse_to_train_whole(name: str, model: nn.Module) -> None:
    if is_quantised(model):
        raise ValueError(
            f"{name} would train its model whole, which bitsandbytes has quantised and which therefore cannot be: pass "
            + ("policy=LoraConfig(...)" if name == "policy" else "LoraConfig(...), or a model with an adapter on it")
        )


def _refuse_one_trained_model_twice(name: str, model: nn.Module, places: Mapping[str, Place]) -> None:
    for other, place in places.items():
        if causal_lm(model) is causal_lm(place.model) and {name, other} & set(TRAINED):
            raise ValueError(
                f"{name} is the {other}'s own model, and one of the two trains: pass an adapter of it, another model, "
                f"or Copied({other!r})"
            )


def _refuse_on_trained_base(name: str, policy: Place) -> None:
    if policy.adapter is None:
        raise ValueError(
            f"{name} would stand on a base that the policy trains whole, and change with it: pass a model of its own, "
            "or policy=LoraConfig(...)"
        )


def _directory(name: str, source: str | PathLike[str]) -> Path:
    directory = Path(source).expanduser()
    if not directory.is_dir():
        raise ValueError(f"{name} {str(source)!r} is no directory; what is on a hub, load and pass")
    return directory


def _check_files(name: str, source: Source, tokenizer: Any) -> None:
    """What can be told while the base is still as it was."""
    if isinstance(source, Shared) and source.head is not None:
        _directory(name, source.head)
    if isinstance(source, str | PathLike):
        directory = _directory(name, source)
        if not is_adapter(directory) and not (directory / "config.json").is_file():
            raise ValueError(f"{name} {str(source)!r} has neither {CONFIG} nor config.json: no adapter, and no model")
        _check_tokenizer(name, directory, tokenizer)


def _check_tokenizer(name: str, directory: Path, tokenizer: Any) -> None:
    """Where the directory has one: it must know what the policy says."""
    if tokenizer is None or not has_tokenizer(directory):
        return
    try:
        own = read_tokenizer(directory.resolve(), local_files_only=True)
    except Exception as error:  # transformers and tokenizers each raise kinds of their own
        raise ValueError(f"{name}'s tokenizer in {directory} could not be loaded: {error}") from error
    check_words(own, tokenizer, f"{name}'s tokenizer in {directory}", "the policy's")


def _shown(source: Any) -> str:
    return repr(source) if isinstance(source, str | Shared | Copied) else type(source).__name__
