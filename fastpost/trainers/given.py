"""What a caller in Python hands to a verb in place of a path of its config, by the names of TRL's trainers.

model = sft(Sft(output_dir="runs/sft"), model=model, processing_class=tokenizer, train_dataset=rows)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from fastpost.data import Verb, check_columns
from fastpost.files import Rows, read_rows
from fastpost.trainers.config import Training


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


def read_data(config: Training, given: Given, verb: Verb) -> dict[str, Rows]:
    """The rows of "train" and, where there is one, "eval", their columns checked."""
    found = {}
    for name, path in (("train", config.dataset), ("eval", config.eval_dataset)):
        rows = given.get(f"{name}_dataset")
        if rows is None and path:
            rows = read_rows(path)
        if rows is not None:
            if not len(rows):
                raise ValueError(f"{name}_dataset has no rows")
            check_columns(rows, verb, path or f"{name}_dataset")
            found[name] = rows
    if "train" not in found:
        raise ValueError("dataset must be given: a path in the config, or rows as train_dataset")
    return found
