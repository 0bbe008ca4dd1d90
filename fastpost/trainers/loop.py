"""What training loops share: the order of rows, their packs, the learning rate, a step, and reproducible randomness.

Everything random is a function of (seed, step) or (seed, epoch), so a resumed run needs no saved generator to draw what
the uninterrupted one would have drawn.
"""

from __future__ import annotations

import functools
import math
import random
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastpost.models.sharded import whole
from fastpost.packing import plan
from fastpost.trainers.config import Loaded, Training


def the_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wants_bf16(config: Loaded) -> bool:
    """Whether forward passes compute in bfloat16: where asked for, or by default on a GPU that has it."""
    if config.bf16 is not None:
        return config.bf16
    return the_device().type == "cuda" and torch.cuda.is_bf16_supported()


def autocast(config: Loaded) -> torch.autocast:
    """The precision of forward passes."""
    return torch.autocast(the_device().type, torch.bfloat16, enabled=wants_bf16(config))


# ---- randomness and order ----


def seed_of(*parts: int | str) -> int:
    """A seed below 2^63 from several numbers or words; near ones give unrelated seeds."""
    return random.Random(" ".join(map(str, parts))).getrandbits(63)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Sets every generator of the process by (seed, step): for dropout, and for what a user's reward function draws.
    Processes draw apart."""
    import numpy

    mixed = seed_of(seed, step, *([rank] if rank else []))
    random.seed(mixed)
    numpy.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)


@functools.lru_cache(maxsize=2)
def permutation(rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def order(rows: int, seed: int, start: int, stop: int) -> list[int]:
    """Places start..stop of the endless row of epochs, each of them a permutation of all rows."""
    epochs = range(start // rows, -(-stop // rows))
    ahead = torch.cat([permutation(rows, seed, epoch) for epoch in epochs])
    return ahead[start - epochs.start * rows : stop - epochs.start * rows].tolist()


def last_row(config: Training, rows: int) -> float:
    """Where in the endless row of epochs of `rows` rows a run ends; nowhere, where max_steps says when."""
    return math.inf if config.max_steps > 0 else math.ceil(config.num_train_epochs * rows)


def rounds_left(config: Training, rows: int, each: int, iterations: int, step: int, taken: int) -> int:
    """How many rounds, of `each` rows and so many optimizer steps, come after `step` steps that took so many rows."""
    if config.max_steps > 0:
        return max(0, (config.max_steps - step) // iterations)
    return max(0, math.ceil((last_row(config, rows) - taken) / each))


def due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` (0: there is none) was reached between these numbers of steps."""
    return every > 0 and after // every > before // every


def bins(lengths: list[int], config: Training, unit: int = 1) -> list[list[int]]:
    """Which sequences of a step share a pack: as few packs as the cap on tokens allows, or microbatches of so many
    rows. A row is a unit of so many adjacent sequences: a pair is 2."""
    if config.max_tokens_per_batch is not None:
        return plan(lengths, config.max_tokens_per_batch, unit)
    size = config.per_device_train_batch_size * unit
    return [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]


def check_lengths(lengths: Sequence[int], room: int | None, config: Training, unit: int = 1) -> None:
    """ValueError for a sequence of more positions than the model has, or a row, of so many adjacent sequences, that
    fits in no pack."""
    longest, cap = max(lengths), config.max_tokens_per_batch
    if room is not None and longest > room:
        raise ValueError(f"max_length must be at most {room}, the positions of the model: a row has {longest} tokens")
    together = max(sum(lengths[i : i + unit]) for i in range(0, len(lengths), unit))
    if cap is not None and together > cap:
        what = "row" if unit == 1 else "pair"
        raise ValueError(f"max_tokens_per_batch must hold the longest {what}, {together} tokens, got {cap}")


# ---- a step ----


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def without_dropout(model: nn.Module) -> None:
    """Turns off the dropout of the model itself. That of its adapters, which was asked for by itself, stays."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        for field, value in vars(module).items():  # what is handed to a function in place of a module
            if field.endswith("dropout") and isinstance(value, float):
                setattr(module, field, 0.0)


def learning_rate(config: Training, step: int, total: int) -> float:
    """The rate of step 0, 1, ..., total - 1: a linear warmup, whose first step is not 0, then the schedule."""
    warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * total
    if step < warmup:
        return config.learning_rate * min(1.0, (step + 1) / warmup)
    done = (step - warmup) / max(1.0, total - warmup)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * left[config.lr_scheduler_type]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, as the model is when it samples."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def apply_gradients(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, rate: float, max_norm: float
) -> float:
    """One optimizer step on the gradients at hand, clipped; returns their norm before clipping."""
    norm = check_norm(float(whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))))
    set_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_norm(norm: float) -> float:
    """The norm of a gradient, if it is a number."""
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm}, and one such step would destroy the model: lower learning_rate, "
            "or resume from a checkpoint before the loss rose"
        )
    return norm


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step; some parameters have a multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("faster", 1.0)


def peak_memory_mb() -> float:
    """The most memory so far: of the GPU where there is one, else of the process. MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
