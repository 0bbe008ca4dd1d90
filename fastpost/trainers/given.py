"""What a caller in Python hands to a verb in place of a path of its config, by the names of TRL's trainers.

model = sft(Sft(output_dir="runs/sft"), model=model, processing_class=tokenizer, train_dataset=rows)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from torch import nn

from fastpost.data import Verb, check_columns
from fastpost.files import Rows, read_rows
from fastpost.trainers.config import Training
from fastpost.types import nearest


class Given(TypedDict, total=False):
    """The keyword arguments of a verb."""

    model: Any  # a causal LM of transformers, with or without an adapter; changed in place
    processing_class: Any  # its tokenizer
    train_dataset: Rows  # a list of dicts, or a datasets.Dataset
    eval_dataset: Rows


class GivenReference(Given, total=False):
    """Those of a verb that compares with a reference."""

    ref_model: Any  # a causal LM; default: the model as it was


class GivenTeacher(Given, total=False):
    """Those of a verb that learns from a teacher."""

    teacher_model: Any  # a causal LM of the same vocabulary, with or without an adapter


class GivenRewards(Given, total=False):
    """Those of a verb whose policy samples."""

    reward_funcs: Callable | list[Callable]  # of TRL's signature; beside those that the config names
    tools: list[Callable]  # that the policy may call; beside those that the config names


class GivenPreferences(GivenRewards, GivenReference, total=False):
    """Those of a verb that has its own completions compared."""

    prefer: Callable  # (prompts, firsts, seconds) -> how probably the first is the better, each; beside the rewards


# What a verb is given, where that is more than `Given`.
MORE: dict[Verb, type] = {"dpo": GivenReference, "kto": GivenReference, "distill": GivenTeacher}
MORE["online-dpo"] = GivenPreferences
MORE |= dict.fromkeys(("grpo", "rloo", "reinforce", "ppo"), GivenRewards)
MODELS = ("model", "ref_model", "teacher_model")


def read_data(config: Training, given: Given, verb: Verb) -> dict[str, Rows]:
    """The rows of "train" and, where there is one, "eval", their columns checked; and what else is given."""
    _check_given(given, verb)
    found = {}
    for name, path in (("train", config.dataset), ("eval", config.eval_dataset)):
        rows = given.get(f"{name}_dataset")
        if rows is None and path:
            rows = read_rows(path)
        if rows is not None:
            _check_rows(rows, f"{name}_dataset")
            check_columns(rows, verb, path or f"{name}_dataset")
            found[name] = rows
    if "train" not in found:
        raise ValueError("dataset must be given: a path in the config, or rows as train_dataset")
    if config.metric_for_best_model is not None and "eval" not in found:
        raise ValueError("metric_for_best_model is of an evaluation: give eval_dataset as well")
    return found


def _check_given(given: Given, verb: Verb) -> None:
    known = list(MORE.get(verb, Given).__annotations__)
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{verb} takes no {name!r}{nearest(name, known)}; it takes {', '.join(known)}")
        if name in MODELS and not isinstance(value, nn.Module | None):
            raise ValueError(f"{name} must be a model, got {value!r:.80}; a directory goes into the config, as {name}")
    if given.get("ref_model") is not None and given.get("ref_model") is given.get("model"):
        raise ValueError(
            "ref_model is the model itself, which trains: leave it out for the model as it was, or copy it"
        )


def _check_rows(rows: Any, name: str) -> None:
    a_list = isinstance(rows, Sequence) and not isinstance(rows, str)
    a_table = hasattr(rows, "column_names") and hasattr(rows, "__len__") and not isinstance(rows, Mapping)
    if not a_list and not a_table:
        raise ValueError(f"{name} must be a list of dicts or a datasets.Dataset, got {type(rows).__name__}")
    if not len(rows):
        raise ValueError(f"{name} has no rows")
    for i, row in enumerate(rows if a_list else ()):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}[{i}] must be a dict, got {row!r:.80}")
