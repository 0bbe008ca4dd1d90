"""Reward functions by name: a built-in, a function in a user's file, a directory of a reward model, a judge's file.

A built-in with settings is written as a call, `repetition_penalty_reward(ngram_size=4)`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastpost.rewards.builtin import BUILTIN
from fastpost.rewards.settings import called, configured
from fastpost.types import nearest


@dataclass(frozen=True)
class Reward:
    """A reward function and the name it has in the metrics."""

    name: str
    function: Callable[..., Any]


def _module(file: Path, what: str) -> Any:
    """A user's file, run as a module of its own."""
    if not file.is_file():
        near = [other.name for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ValueError(f"{what}: the file {str(file)!r} does not exist{nearest(file.name, near)}")
    found = importlib.util.spec_from_file_location(file.stem, file)
    if found is None or found.loader is None:
        raise ValueError(f"{what}: {str(file)!r} is not a Python file")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{what}: {file} could not be imported: {type(error).__name__}: {error}") from error
    return module


def user_function(spec: str, kind: str) -> Callable[..., Any]:
    """`file.py:function`; `kind` says in messages what it is: a reward, a tool."""
    what, (path, colon, name) = f"{kind} {spec!r}", spec.rpartition(":")
    if not colon:
        raise ValueError(f"{what} must be file.py:function")
    module = _module(Path(path).expanduser(), what)
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{what}: {path} has no function {name!r}{nearest(name, functions)}")
    return function


def given_reward(function: Callable[..., Any]) -> Reward:
    """A function that a caller in Python has at hand, by its own name."""
    if isinstance(function, nn.Module):
        kind = type(function).__name__
        raise ValueError(f"reward_funcs must hold functions, got a {kind}: its directory goes into the config")
    if not callable(function):
        raise ValueError(
            f"reward_funcs must hold functions, got {function!r:.80}; a name goes into the config's reward"
        )
    return Reward(getattr(function, "__name__", type(function).__name__), function)


def _model(directory: Path, way: str | None = None) -> Reward:
    """What a reward model says, by the name of its directory; of one that scores steps, one number of all."""
    from fastpost.models.reward_model import step_separator
    from fastpost.rewards.model import reward_model
    from fastpost.rewards.steps import step_rewards

    name = directory.resolve().name
    if way is not None:
        return Reward(f"{name}_{way}", step_rewards(directory, way))
    return Reward(name, reward_model(directory) if step_separator(directory) is None else step_rewards(directory))


def _judge(file: Path) -> Reward:
    """What a judge says, by the name of its file."""
    from fastpost.judging.load import load_judge

    return Reward(file.stem, load_judge(file))


def _builtin(spec: str, name: str, settings: dict[str, Any]) -> Reward:
    """One that comes with fastpost."""
    if name not in BUILTIN:
        hint = nearest(name, list(BUILTIN))
        names = ", ".join(BUILTIN)
        raise ValueError(
            f"reward {spec!r} is no built-in ({names}) and no directory, file.py:function or judge.yaml{hint}"
        )
    return Reward(name, configured(spec, BUILTIN[name], settings))


def load_reward(spec: str, *, of_steps: bool = False) -> Reward:
    """A built-in name, `file.py:function`, a directory or `directory:way`, or a YAML file. `of_steps`: it may give a
    number to every step."""
    if Path(spec).expanduser().is_dir():
        return _model(Path(spec).expanduser())
    if Path(spec).suffix in (".yaml", ".yml"):
        return _judge(Path(spec).expanduser())
    if (call := called(spec)) is not None:
        return _builtin(spec, *call)
    path, colon, name = spec.rpartition(":")
    if colon and Path(path).expanduser().is_dir():
        if name == "dense" and not of_steps:
            raise ValueError(
                f"reward {spec!r} gives a number to every step, by which ppo and grpo learn; here one of a whole "
                f"completion is wanted: {path}, {path}:product or {path}:last"
            )
        return _model(Path(path).expanduser(), name)
    if not colon:
        if spec.endswith(".py"):
            raise ValueError(f"reward {spec!r} names a file but no function in it: write {spec}:function")
        return _builtin(spec, spec, {})
    return Reward(name, user_function(spec, "reward"))


def told_apart(rewards: Sequence[Reward]) -> list[Reward]:
    """Of one name, each with its place among all behind it, as their weights are ordered: score.1, score.3."""
    names = [reward.name for reward in rewards]
    return [
        replace(reward, name=f"{reward.name}.{i}") if names.count(reward.name) > 1 else reward
        for i, reward in enumerate(rewards, 1)
    ]


def load_rewards(specs: Sequence[str]) -> list[Reward]:
    """Each by its own name."""
    return told_apart([load_reward(spec) for spec in specs])
