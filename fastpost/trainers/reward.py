"""A reward model (Bradley-Terry, arXiv:2204.05862): the score at a sequence's last token, the better answer's higher.

The prompt is part of the sequence, and sequences lie in packs, so the last token of each is at cumsum(lengths) - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Unpack

import torch
from torch import Tensor

from fastpost import losses, metrics
from fastpost.data import Counts, Pair, reward_examples
from fastpost.files import Rows
from fastpost.models.scalar import own_scalar, scores
from fastpost.models.trunk import positions
from fastpost.packing import Packed, pack, placeholder
from fastpost.trainers.balance import hidden_and_balance
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Reward
from fastpost.trainers.examples import read_examples
from fastpost.trainers.given import Given, read_data
from fastpost.trainers.loop import autocast, bins, check_lengths, evaluating, the_device, without_dropout
from fastpost.trainers.options import check_config
from fastpost.trainers.pairs import lengths_of, tokens_of
from fastpost.trainers.run import Run
from fastpost.trainers.scored import judge
from fastpost.trainers.start import Start, start
from fastpost.trainers.world import ALONE, World
from fastpost.weights import Window, sequence_mean


def reward(config: Reward, **given: Unpack[Given]) -> Any:
    """Trains config.model with a scalar head on the pairs of config.dataset and leaves it in config.output_dir."""
    check_config(config, Reward)
    check_output_dir(config)
    rows = read_data(config, given, "reward")
    begun = start(config, given, judge)
    model = begun.model
    if config.disable_dropout:
        without_dropout(model)
    data, facts = read_examples(rows, "reward", begun.tokenizer, partial(_pairs, begun, config))
    with Run("reward", config, begun, len(data["train"]), data=facts) as run:
        for _ in run.steps():
            window = [data["train"][i] for i in run.take()]
            run.update(backward(model, window, config, run.world), tokens_of(window))
            if run.evaluates and "eval" in data:
                run.note(evaluate(model, data["eval"], config, run.world))
    return run.finish()


def _pairs(begun: Start, config: Reward, name: str, rows: Rows) -> tuple[list[Pair], Counts]:
    room = positions(begun.model)
    pairs, counts = reward_examples(rows, begun.tokenizer, config.max_length, positions=room, path=name)
    check_lengths(lengths_of(pairs), room, config, unit=2)
    return pairs, counts


def backward(model: Any, window: Sequence[Pair], config: Reward, world: World = ALONE) -> dict[str, float]:
    """Adds the gradient of the mean loss over all pairs of the window, and of a router's; returns means."""
    lengths = lengths_of(window)
    whole = Window(sum(lengths), 2 * len(window), world.size)
    seen = {}
    for rows in world.turns(world.share(bins(lengths, config, unit=2), lengths, unit=2)):
        packed = _packed([window[i // 2] for i in rows[::2]]).to(the_device())
        weight = sequence_mean(packed.batch, whole, "pair") * bool(rows)  # a placeholder has no place
        with autocast(config):
            work = partial(_losses, model, packed, weight, sum(lengths) / world.size, config)
            loss, balance, score, of_router = world.through(work)
        if torch.is_grad_enabled():
            (loss + balance).backward()
        score, of_rows = score[: len(rows)], packed.batch.lengths[: len(rows)].to(score.device)
        shown = metrics.reward(score) | metrics.length_bias(score, of_rows)
        seen = metrics.joined(seen, {"loss": metrics.total(loss / world.size)}, shown, of_router)
    return metrics.floats(metrics.over_ranks(seen))


def _losses(
    model: Any, packed: Packed, weight: Tensor, tokens: float, config: Reward
) -> tuple[Tensor, Tensor | float, Tensor, dict[str, metrics.Part]]:
    """What a pack adds to a step of so many tokens: its loss, and that of a router; and its scores, (S,)."""
    hidden, balance, of_router = hidden_and_balance(model, packed, tokens, config)
    with torch.autocast(hidden.device.type, enabled=False):
        ends = (packed.batch.lengths.cumsum(0) - 1).to(hidden.device)
        score = scores(own_scalar(model, "model"), hidden[0, ends])
        each = losses.bradley_terry(score, packed.batch, center_rewards_coefficient=config.center_rewards_coefficient)
        return (weight * each).sum(), balance, score, of_router


def _packed(pairs: Sequence[Pair]) -> Packed:
    """With the margins that the rows ask for."""
    packed = pack(list(chain.from_iterable(pair.examples for pair in pairs)) or placeholder(2))
    if all(pair.margin is None for pair in pairs):
        return packed
    margin = torch.tensor([pair.margin or 0.0 for pair in pairs])
    return replace(packed, batch=replace(packed.batch, margin=margin))


@torch.no_grad()
def evaluate(model: Any, pairs: Sequence[Pair], config: Reward, world: World = ALONE) -> dict[str, float]:
    """The same means over held-out pairs, without gradients."""
    with evaluating(model):
        values = backward(model, pairs, config, world)
    return {f"eval_{name}": value for name, value in values.items()}
