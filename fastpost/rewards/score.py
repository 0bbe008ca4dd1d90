"""Calling reward functions and checking what they return.

f(prompts, completions, completion_ids, **columns) -> one number or None a sample, plain or async, with TRL's extras
(`trainer_state`, `log_metric`, `log_extra`) for who asks for them. None says that the function does not apply to the
sample. A NaN is not a None: it is a bug in the function, and the sample that shows it is named.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import queue
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastpost.rewards.load import Reward
from fastpost.types import nearest

FAILURES = (Exception, SystemExit)  # code that a model wrote may call exit(), which would end the run without a word
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Scores:
    """S samples judged."""

    rewards: Tensor  # (S,) fp32, the weighted sum; NaN where no function of a weight applied
    by_function: dict[str, Tensor]  # (S,) each, NaN where the function did not apply
    metrics: dict[str, float]  # what the functions gave to log_metric, averaged
    extra: dict[str, list[Any]] = field(default_factory=dict)  # what they gave to log_extra

    @property
    def table(self) -> Tensor:  # (S, F)
        """A column a function, before the weights."""
        return torch.stack(list(self.by_function.values()), 1)


@dataclass(frozen=True)
class _Samples:
    """What the functions are called with; columns[name][i] belongs to sample i."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]

    def only(self, i: int) -> _Samples:
        columns = {name: values[i : i + 1] for name, values in self.columns.items()}
        one = slice(i, i + 1)
        return _Samples(self.prompts[one], self.completions[one], self.completion_ids[one], columns)

    def show(self, i: int) -> str:
        """For a message."""
        return f"sample {i} (prompt {_short(self.prompts[i])}, completion {_short(self.completions[i])})"


def _check(
    functions: Sequence[Reward],
    weights: Sequence[float],
    S: int,
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> None:
    names = [reward.name for reward in functions]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"reward functions must be one or more, of different names, got {names}")
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights must hold a number for each of {names}, got {len(weights)}")
    given = {"prompts": S, "completions": len(completions), "completion_ids": len(completion_ids)}
    given |= {name: len(values) for name, values in columns.items()}
    for name, length in given.items():
        if length != S:
            raise ValueError(f"{name} must hold one entry a sample, got {length} for {S} samples")
    taken = {"prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"} & columns.keys()
    if taken:
        raise ValueError(
            f"the column {sorted(taken)[0]!r} has a name that reward functions are given something else by"
        )


def _arguments(reward: Reward, samples: _Samples, offered: Mapping[str, Any]) -> dict[str, Any]:
    """What the function asks for by name, or everything if it takes **anything."""
    everything = {
        "prompts": samples.prompts,
        "completions": samples.completions,
        "completion_ids": samples.completion_ids,
        **offered,
        **samples.columns,
    }
    parameters = inspect.signature(reward.function).parameters.values()
    for p in parameters:
        required = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if required and p.name not in everything:
            raise ValueError(
                f"reward function {reward.name!r} needs the column {p.name!r}, "
                f"the dataset has {sorted(samples.columns)}{nearest(p.name, list(samples.columns))}"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return everything
    return {p.name: everything[p.name] for p in parameters if p.name in everything}


class _Late(Exception):
    """It hangs."""


def _within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """What the call gives, if it gives it in time. One that hangs is left behind in a thread that ends with us."""
    if seconds is None:
        return call()
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = done.get(timeout=seconds)
    except queue.Empty:
        raise _Late from None
    if error is not None:
        raise error
    return value


def _late(names: Sequence[str], seconds: float | None, samples: _Samples) -> ValueError:
    return ValueError(
        f"reward function {' or '.join(map(repr, names))} took more than {seconds:g} seconds for "
        f"{len(samples.prompts)} samples, the first of them {samples.show(0)}: raise reward_timeout, or see what it "
        "waits for"
    )


def _returned(
    functions: Sequence[Reward], samples: _Samples, offered: Mapping[str, Any], timeout: float | None
) -> list[Any]:
    """What each function gives; the async ones are awaited together."""
    values: list[Any] = []
    for reward in functions:
        call = partial(reward.function, **_arguments(reward, samples, offered))
        try:
            values.append(_within(timeout, call))
        except _Late:
            raise _late([reward.name], timeout, samples) from None
        except FAILURES as error:
            raise _blamed(reward, error, samples, offered) from error
    waiting = [i for i, value in enumerate(values) if inspect.isawaitable(value)]
    try:
        awaited = _within(timeout, partial(_awaited, [values[i] for i in waiting]))
    except _Late:
        raise _late([functions[i].name for i in waiting], timeout, samples) from None
    for i, value in zip(waiting, awaited, strict=True):
        if isinstance(value, BaseException):
            raise _blamed(functions[i], value, samples, offered) from value
        values[i] = value
    return values


def _awaited(pending: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results and exceptions, from a thread of its own: the caller may be inside an event loop already."""
    if not pending:
        return []

    async def together() -> list[Any]:
        return await asyncio.gather(*pending, return_exceptions=True)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(together())).result()


def _blamed(reward: Reward, error: BaseException, samples: _Samples, offered: Mapping[str, Any]) -> ValueError:
    """The error of a function, with the first sample that makes it fail on its own."""
    quiet = dict(offered) | {"log_metric": lambda *_: None, "log_extra": lambda *_: None}

    def fails(i: int) -> bool:
        try:
            value = reward.function(**_arguments(reward, samples.only(i), quiet))
        except FAILURES:
            return True
        return inspect.isawaitable(value) and isinstance(_awaited([value])[0], BaseException)

    culprit = next((i for i in range(len(samples.prompts)) if fails(i)), None)
    where = "for the batch, but for no sample alone" if culprit is None else f"for {samples.show(culprit)}"
    return ValueError(f"reward function {reward.name!r} raised {type(error).__name__}: {error}, {where}")


def _numbers(reward: Reward, values: Any, samples: _Samples) -> Tensor:  # (S,) fp32
    """None becomes NaN; anything else that is not a finite number is an error that shows the sample."""
    S, given = len(samples.prompts), _as_list(values)
    if given is None or len(given) != S:
        got = _short(values) if given is None else f"{len(given)}"
        raise ValueError(f"reward function {reward.name!r} must return a list of {S} rewards, one a sample, got {got}")
    numbers = []
    for i, value in enumerate(given):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"reward function {reward.name!r} returned {_short(value)}, no number, for {samples.show(i)}"
            ) from None
        if value is not None and not abs(number) <= LARGEST:
            beyond = ", more than fp32 holds," if math.isfinite(number) else ""
            raise ValueError(f"reward function {reward.name!r} returned {number}{beyond} for {samples.show(i)}")
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float32)


def _as_list(values: Any) -> Sequence[Any] | None:
    """The same, where they are one after another: a list, a tuple, a tensor or an array of one dimension or more."""
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return values
    return values if getattr(values, "ndim", 0) else None


def _short(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 12]}...{text[-9:]}"


def score(
    functions: Sequence[Reward],
    weights: Sequence[float] | None,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    *,
    step: int = 0,
    timeout: float | None = None,
) -> Scores:
    """Rewards of S samples: the sum of weight * reward over the functions that apply; weights None: all 1. One of
    weight 0 beside others only measures: a sample to which it alone applies has no reward. `timeout`: seconds that a
    function may take; None: as long as it likes."""
    weights = [1.0] * len(functions) if weights is None else weights
    _check(functions, weights, len(prompts), completions, completion_ids, columns)
    samples = _Samples(prompts, completions, completion_ids, columns)
    logged: dict[str, list[float]] = {}
    extra: dict[str, list[Any]] = {}
    offered = {
        "trainer_state": SimpleNamespace(global_step=step),
        "log_metric": lambda name, value: logged.setdefault(name, []).append(float(value)),
        "log_extra": lambda name, values: extra.__setitem__(name, list(values)),
    }
    returned = _returned(functions, samples, offered, timeout)
    by_function = {
        reward.name: _numbers(reward, values, samples) for reward, values in zip(functions, returned, strict=True)
    }
    table = torch.stack([values * weight for values, weight in zip(by_function.values(), weights, strict=True)])
    judging = [i for i, weight in enumerate(weights) if weight] or list(range(len(weights)))
    rewards = torch.where(table[judging].isnan().all(0), torch.nan, table.nansum(0))  # (functions, S) -> (S,)
    return Scores(rewards, by_function, {name: sum(v) / len(v) for name, v in logged.items()}, extra)
