"""A process reward model (arXiv:2305.20050, arXiv:2211.14275): the probability that a step is right, where it ends.

  loss = mean over steps of -y log s(v) - (1 - y) log s(-v),   v = h w^T at the step's last token

A label y is 0 or 1, or between them where it is an estimate (arXiv:2312.08935). The head is scalar, as that of a reward
model, and is saved so: one label of AutoModelForSequenceClassification, and, with a logit at every token, of
AutoModelForTokenClassification. Beside the weights prm.json has the separator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from fastpost import Batch, losses, metrics
from fastpost.data import Counts, Stepped, step_examples
from fastpost.files import Rows
from fastpost.models.reward_model import PRM
from fastpost.models.scalar import own_scalar, scores
from fastpost.models.trunk import positions
from fastpost.packing import Example, Packed, pack, placeholder
from fastpost.trainers.balance import hidden_and_balance
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Prm, Training
from fastpost.trainers.examples import read_examples
from fastpost.trainers.given import Given, read_data
from fastpost.trainers.loop import autocast, bins, check_lengths, evaluating, the_device, without_dropout
from fastpost.trainers.options import check_config
from fastpost.trainers.run import Run
from fastpost.trainers.scored import judge
from fastpost.trainers.start import Parts, Start, start
from fastpost.trainers.world import ALONE, World


def prm(config: Prm, **given: Unpack[Given]) -> Any:
    """Trains config.model with a scalar head on the steps of config.dataset and leaves it in config.output_dir."""
    check_config(config, Prm)
    check_output_dir(config)
    rows = read_data(config, given, "prm")
    begun = start(config, given, partial(_judge, config.step_separator))
    model = begun.model
    if config.disable_dropout:
        without_dropout(model)
    data, facts = read_examples(rows, "prm", begun.tokenizer, partial(_solutions, begun, config))
    with Run("prm", config, begun, len(data["train"]), data=facts) as run:
        for _ in run.steps():
            window = [data["train"][i] for i in run.take()]
            tokens = sum(len(one.input_ids) for one in window)
            run.update(backward(model, window, config, run.world), tokens)
            if run.evaluates and "eval" in data:
                run.note(evaluate(model, data["eval"], config, run.world))
    return run.finish()


def _judge(separator: str, config: Training, given: Given, found: Path | None) -> Parts:
    """A model that scores, which knows what ends a step."""
    parts = judge(config, given, found)
    return replace(parts, save=partial(_save, parts.save, separator))


def _save(save: Callable[[Path], None], separator: str, directory: Path) -> None:
    save(directory)
    (directory / PRM).write_text(json.dumps({"step_separator": separator}) + "\n")


def _solutions(begun: Start, config: Prm, name: str, rows: Rows) -> tuple[list[Stepped], Counts]:
    room = positions(begun.model)
    limits = {"last_only": config.train_on_last_step_only, "positions": room, "path": name}
    found, counts = step_examples(rows, begun.tokenizer, config.max_length, config.step_separator, **limits)
    check_lengths([len(one.input_ids) for one in found], room, config)
    return found, counts


def backward(model: Any, window: Sequence[Stepped], config: Prm, world: World = ALONE) -> dict[str, float]:
    """Adds the gradient of the mean loss over all steps of the window, and of a router's; returns means."""
    lengths = [len(one.input_ids) for one in window]
    count, seen = sum(len(one.ends) for one in window), {}
    for rows in world.turns(world.share(bins(lengths, config), lengths)):
        mine = [window[i] for i in rows]
        packed, ends, labels = _packed(mine)
        with autocast(config):
            work = partial(_losses, model, packed, ends, labels, sum(lengths) / world.size, config)
            each, balance, said, of_router = world.through(work)
        loss = each.sum() * (bool(mine) * world.size / count)  # a placeholder has no place
        if torch.is_grad_enabled():
            (loss + balance).backward()
        n = sum(len(one.ends) for one in mine)
        shown = {"loss": metrics.total(loss / world.size)} | metrics.steps(said[:n], labels[:n])
        seen = metrics.joined(seen, shown, of_router)
    return metrics.floats(metrics.over_ranks(seen))


def _losses(
    model: Any, packed: Packed, ends: Tensor, labels: Tensor, tokens: float, config: Prm
) -> tuple[Tensor, Tensor | float, Tensor, dict[str, metrics.Part]]:
    """Of the steps of a pack, in a window of so many tokens: their losses, (N,), and that of a router; their scores."""
    hidden, balance, of_router = hidden_and_balance(model, packed, tokens, config)
    said = scores(own_scalar(model, "model"), hidden[0, ends])
    return _cross_entropy(said, labels), balance, said, of_router


def _cross_entropy(said: Tensor, labels: Tensor) -> Tensor:  # (N,), (N,) -> (N,)
    """A label between 0 and 1 is that share of a right step and the rest of a wrong one."""
    lengths = torch.tensor([len(said)])
    right, wrong = (
        losses.prm(said, Batch(torch.full_like(said, label, dtype=torch.int64), lengths)) for label in (1, 0)
    )
    return labels * right + (1 - labels) * wrong


def _packed(window: Sequence[Stepped]) -> tuple[Packed, Tensor, Tensor]:
    """The solutions; where their steps end in the pack, (N,); their labels, (N,)."""
    examples = [Example(one.input_ids, [False] * len(one.input_ids)) for one in window] or placeholder()
    starts = accumulate((len(one.input_ids) for one in window), initial=0)
    ends = [first + end for first, one in zip(starts, window, strict=False) for end in one.ends] or [0]
    labels = torch.tensor([label for one in window for label in one.labels] or [0.0])
    device = the_device()
    return pack(examples).to(device), torch.tensor(ends, device=device), labels.to(device)


@torch.no_grad()
def evaluate(model: Any, rows: Sequence[Stepped], config: Prm, world: World = ALONE) -> dict[str, float]:
    """The same means over held-out solutions, without gradients."""
    with evaluating(model):
        values = backward(model, rows, config, world)
    return {f"eval_{name}": value for name, value in values.items()}
