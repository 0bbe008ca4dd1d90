"""Supervised fine-tuning: rows -> packs -> hidden states -> one fused loss, the mean over all tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from fastpost import Head, Stats, fused_loss, losses, metrics
from fastpost.data import Counts, sft_examples
from fastpost.files import Rows
from fastpost.metrics import Part
from fastpost.models.trunk import positions
from fastpost.packing import Example, Packed, pack, placeholder
from fastpost.trainers.balance import hidden_and_balance
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Sft
from fastpost.trainers.examples import read_examples
from fastpost.trainers.given import Given, read_data
from fastpost.trainers.loop import autocast, bins, check_lengths, evaluating, the_device
from fastpost.trainers.options import check_config
from fastpost.trainers.run import Run
from fastpost.trainers.start import Start, start
from fastpost.trainers.world import ALONE, World
from fastpost.types import IGNORE
from fastpost.weights import Window, token_mean


def sft(config: Sft, **given: Unpack[Given]) -> Any:
    """Trains config.model on config.dataset and leaves the result in config.output_dir; returns the model."""
    check_config(config, Sft)
    check_output_dir(config)
    rows = read_data(config, given, "sft")
    begun = start(config, given)
    model = begun.model
    data, facts = read_examples(rows, "sft", begun.tokenizer, partial(_examples, begun, config))
    with Run("sft", config, begun, len(data["train"]), data=facts) as run:
        for _ in run.steps():
            window = [data["train"][i] for i in run.take()]
            run.update(backward(model, window, config, run.world), sum(len(example.input_ids) for example in window))
            if run.evaluates and "eval" in data:
                run.note(evaluate(model, data["eval"], config, run.world))
    return run.finish()


def _examples(begun: Start, config: Sft, name: str, rows: Rows) -> tuple[list[Example], Counts]:
    examples, counts = sft_examples(
        rows, begun.tokenizer, config.max_length, config.completion_only_loss, config.assistant_only_loss, path=name
    )
    check_lengths([len(example.input_ids) for example in examples], positions(begun.model), config)
    return examples, counts


def backward(model: Any, window: Sequence[Example], config: Sft, world: World = ALONE) -> dict[str, float]:
    """Adds the gradient of the mean loss over all predicted tokens of the window, and of a router's; returns means."""
    lengths = [len(example.input_ids) for example in window]
    whole = Window(sum(len(example.predicted) for example in window), len(window), world.size)
    seen = {}
    for rows in world.turns(world.share(bins(lengths, config), lengths)):
        packed = pack([window[i] for i in rows] or placeholder())
        packed = replace(packed, batch=replace(packed.batch, weight=token_mean(packed.batch, whole))).to(the_device())
        with autocast(config):
            loss, stats, shown = world.through(partial(_loss, model, packed, sum(lengths) / world.size, config))
        if torch.is_grad_enabled():
            loss.backward()
        loss_of_tokens = metrics.mean(-stats.logp, packed.batch.target != IGNORE)
        seen = metrics.joined(seen, {"loss": loss_of_tokens}, metrics.sft(stats, packed.batch), shown)
    return metrics.floats(metrics.over_ranks(seen))


def _loss(model: Any, packed: Packed, tokens: float, config: Sft) -> tuple[Tensor, Stats, dict[str, Part]]:
    """What a pack adds to the loss of a step of so many tokens."""
    hidden, balance, shown = hidden_and_balance(model, packed, tokens, config)
    loss, stats = fused_loss(
        losses.sft, hidden, Head.of(model), packed.batch, outputs=("entropy", "top1"), return_stats=True
    )
    return loss + balance, stats, shown


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example], config: Sft, world: World = ALONE) -> dict[str, float]:
    """The same means over held-out rows, without gradients."""
    with evaluating(model):
        values = backward(model, examples, config, world)
    return {f"eval_{name}": value for name, value in values.items()}
