"""The teacher that is asked while the student learns: on the student's base, or a model of its own.

On the base of a student that is an adapter, it is another adapter there, which never trains, or the base as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastpost.core.likeliest import likeliest
from fastpost.models.adapters import base_of, is_adapter
from fastpost.models.loading import load_model
from fastpost.models.role import Role
from fastpost.models.roles import Roles
from fastpost.models.switch import Switch
from fastpost.models.trunk import causal_lm
from fastpost.models.vocabulary import check_words
from fastpost.packing import Example, pack
from fastpost.trainers.build import build, dtype_of
from fastpost.trainers.config import Distill
from fastpost.trainers.given import Given
from fastpost.trainers.loop import autocast, bins, the_device, wants_bf16
from fastpost.trainers.start import Parts
from fastpost.trainers.world import World


@dataclass(frozen=True)
class TaughtParts(Parts):
    """The student, and who teaches it."""

    teacher: Role = field(kw_only=True)


def taught(config: Any, given: Given, found: Path | None) -> TaughtParts:
    """A student, whole or an adapter, and its teacher."""
    other = given.get("teacher_model")
    if other is None and config.teacher_model is None:
        raise ValueError("teacher_model must be given: a directory in the config, or a model as `teacher_model`")
    model, tokenizer = build(config, given, found)
    model.to(the_device())
    if other is None and _is_base(config.teacher_model, model):
        roles = Roles.of(model, tokenizer=tokenizer)
        teacher = replace(roles.reference, name="teacher")
    else:
        roles = Roles.of(model, teacher=_source(config, other, model, tokenizer), tokenizer=tokenizer)
        teacher = roles.teacher
    trained = roles.trainable()["policy"]
    return TaughtParts(model, tokenizer, trained, partial(roles.save_role, "policy"), teacher=teacher)


def _source(config: Distill, other: Any, model: Any, tokenizer: Any) -> Any:
    """What `Roles.of` makes the teacher from."""
    if other is not None:
        if causal_lm(other) is causal_lm(model):
            raise ValueError("teacher_model is the model itself, which trains: pass another, or a copy")
        return other.to(the_device())
    path = config.teacher_model
    assert path is not None
    shares = is_adapter(path) and hasattr(model, "peft_config") and _is_base(base_of(path), model)
    return path if shares else load_teacher(config, tokenizer)


def _is_base(path: str, model: Any) -> bool:
    """Whether the adapter that trains stands on the model of this directory."""
    own = causal_lm(model).name_or_path
    return hasattr(model, "peft_config") and bool(own) and _absolute(path) == _absolute(own)


def _absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()


def load_teacher(config: Distill, tokenizer: Any) -> Any:
    """A model of its own, in the dtype that its hidden states are to have beside the student's."""
    path = config.teacher_model
    assert path is not None
    teacher, own = load_model(
        path,
        dtype="auto" if wants_bf16(config) else dtype_of(config),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    check_words(own, tokenizer, f"teacher_model {path!r}", f"the model {config.model!r}")
    return teacher.requires_grad_(False).to(the_device())


def alone(config: Distill, tokenizer: Any) -> Role:
    """The teacher without a student."""
    model = load_teacher(config, tokenizer)
    adapter = model.active_adapter if hasattr(model, "peft_config") else None
    return Role("teacher", Switch.of(model), adapter, trained=False)


def said(
    teacher: Role, examples: Sequence[Example], config: Distill, world: World
) -> list[tuple[Tensor, Tensor]]:  # (n, K) int64, (n, K)
    """Ids and log-probabilities of the likeliest tokens in each place where an example predicts one. Every process asks
    about some of the examples."""
    own = world.slice(examples)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for rows in bins([len(example.input_ids) for example in own], config):
        packed = pack([own[i] for i in rows]).to(the_device())
        counts = [len(own[i].predicted) for i in rows]
        with autocast(config):
            hidden = teacher.hidden(packed)[packed.batch.kept]
            both = likeliest(hidden, teacher.head(), config.teacher_top_k, temperature=config.temperature)
        found |= dict(zip(rows, zip(*(x.cpu().split(counts) for x in both), strict=True), strict=True))
    return world.gathered([found[i] for i in range(len(own))])
