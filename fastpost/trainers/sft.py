"""Supervised fine-tuning: rows -> packs -> hidden states -> one fused loss, the mean over all tokens of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastpost import Head, fused_loss, losses, metrics
from fastpost.data import check_columns, sft_examples
from fastpost.files import read_rows
from fastpost.models.saving import save_model
from fastpost.models.trunk import positions
from fastpost.packing import Example, pack
from fastpost.trainers import checkpoint
from fastpost.trainers.balance import hidden_and_balance
from fastpost.trainers.config import Sft
from fastpost.trainers.loop import (
    apply_gradients,
    autocast,
    bins,
    due,
    learning_rate,
    order,
    rows_to_see,
    seed_step,
    the_device,
)
from fastpost.trainers.metrics import Metrics, say
from fastpost.trainers.plots import plot_metrics
from fastpost.types import IGNORE
from fastpost.weights import Window, token_mean


def sft(config: Sft) -> None:
    """Trains config.model on config.dataset and leaves the result in config.output_dir."""
    checkpoint.check_output_dir(config)
    rows = {name: _rows(path) for name, path in (("train", config.dataset), ("eval", config.eval_dataset)) if path}
    start = checkpoint.start(config)
    model, optimizer = start.model, start.optimizer
    data = {name: _examples(name, part, start.tokenizer, positions(model), config) for name, part in rows.items()}
    examples, each = data["train"], config.rows_per_step
    stop = rows_to_see(config, len(examples), each)
    total = math.ceil(stop / each)

    output = Path(config.output_dir)
    checkpoint.set_later_aside(output, start.step)
    log = Metrics(output, "sft", start.step, total, start.num_tokens)
    for step in range(start.step, total):
        seed_step(config.seed, step)
        last = min((step + 1) * each, stop)
        window = [examples[i] for i in order(len(examples), config.seed, step * each, last)]
        values = backward(model, window, config)
        rate = learning_rate(config, step, total)
        values |= {"grad_norm": apply_gradients(model, optimizer, rate, config.max_grad_norm), "learning_rate": rate}
        log.add(values, sum(len(example.input_ids) for example in window))
        done = step + 1
        evaluated = "eval" in data and (due(step, done, config.eval_steps) or done == total)
        if evaluated:
            log.note(evaluate(model, data["eval"], config))
        if evaluated or due(step, done, config.logging_steps) or done == total:
            log.write(done, last / len(examples))
        if due(step, done, config.save_steps):
            checkpoint.save(config, start, done, log.num_tokens)
    log.close()
    save_model(model, start.tokenizer, output)
    plot_metrics(output)
    say(f"saved {config.output_dir}")


def _rows(path: str) -> Any:
    rows = read_rows(path)
    check_columns(rows, "sft", path)
    return rows


def _examples(name: str, rows: Any, tokenizer: Any, room: int | None, config: Sft) -> list[Example]:
    examples, counts = sft_examples(
        rows, tokenizer, config.max_length, config.completion_only_loss, config.assistant_only_loss
    )
    say(f"{name}: {counts}")
    longest, cap = max(len(example.input_ids) for example in examples), config.max_tokens_per_batch
    if room is not None and longest > room:
        raise ValueError(
            f"max_length {config.max_length} keeps a row of {longest} tokens; the model has {room} positions"
        )
    if cap is not None and longest > cap:
        raise ValueError(f"max_tokens_per_batch must hold the longest row, {longest} tokens, got {cap}")
    return examples


def backward(model: Any, window: Sequence[Example], config: Sft) -> dict[str, float]:
    """Adds the gradient of the mean loss over all predicted tokens of the window, and of a router's; returns means."""
    tokens = sum(len(example.input_ids) for example in window)
    whole = Window(sum(len(example.predicted) for example in window), len(window))
    seen = {}
    for rows in bins([len(example.input_ids) for example in window], config):
        packed = pack([window[i] for i in rows])
        packed = replace(packed, batch=replace(packed.batch, weight=token_mean(packed.batch, whole))).to(the_device())
        with autocast(config):
            hidden, balance, shown = hidden_and_balance(model, packed, tokens, config)
            loss, stats = fused_loss(
                losses.sft, hidden, Head.of(model), packed.batch, outputs=("entropy", "top1"), return_stats=True
            )
        if torch.is_grad_enabled():
            (loss + balance).backward()
        loss_of_tokens = metrics.mean(-stats.logp, packed.batch.target != IGNORE)
        seen = metrics.joined(seen, {"loss": loss_of_tokens}, metrics.sft(stats, packed.batch), shown)
    return metrics.floats(seen)


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example], config: Sft) -> dict[str, float]:
    """The same means over held-out rows, without gradients."""
    model.eval()
    values = backward(model, examples, config)
    model.train()
    return {f"eval_{name}": value for name, value in values.items()}
