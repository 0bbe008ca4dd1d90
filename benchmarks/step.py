"""What every contestant of end_to_end.py is given: a model, the rows of one optimizer step, and how a step ends.

Lengths of prompts and of completions are log-normal and cut at `longest`, drawn anew for each method from `seed`. A
prompt is there once in a row of SFT, twice in a pair of DPO, `group` times in a group of GRPO.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

METHODS = ("sft", "dpo", "grpo")
PAD, EOS, FIRST_WORD = 0, 1, 2
BETA = 0.1  # of DPO
MAX_NORM = 1.0


@dataclass(frozen=True)
class Shape:
    hidden: int = 512  # D
    layers: int = 6
    vocab: int = 32_000  # V
    rows: int = 16  # of a step
    group: int = 8  # completions of a prompt, in GRPO
    prompt: int = 32  # tokens, the median
    completion: int = 64  # tokens, the median
    spread: float = 0.8  # standard deviation of a length's logarithm
    longest: int = 512  # prompt, and completion
    max_tokens: int = 2048  # of a pack
    batch: int = 8  # rows of a padded microbatch
    seed: int = 0
    dtype: str = "bfloat16"  # of products, by autocast; weights, gradients and AdamW's moments are in float32


@dataclass(frozen=True)
class Row:
    prompt: list[int]
    completion: list[int]  # ends with EOS
    reward: float = 0.0

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.completion


def alike(method: str, shape: Shape) -> int:
    """Adjacent rows with the same prompt."""
    return {"sft": 1, "dpo": 2, "grpo": shape.group}[method]


def given(method: str, shape: Shape) -> list[Row]:
    """The rows of a step; of a pair the chosen one is first."""
    size, draw = alike(method, shape), torch.Generator().manual_seed(shape.seed)
    if shape.rows % size:
        raise ValueError(f"rows must be a multiple of {size} for {method}, got {shape.rows}")

    def words(median: int) -> list[int]:
        drawn = median * torch.empty(()).log_normal_(0, shape.spread, generator=draw)
        length = int(drawn.round().clamp(1, shape.longest))
        return torch.randint(FIRST_WORD, shape.vocab, (length,), generator=draw).tolist()

    prompts = [words(shape.prompt) for _ in range(shape.rows // size)]
    rewards = torch.rand(shape.rows, generator=draw).tolist()
    asked = itertools.chain.from_iterable([prompt] * size for prompt in prompts)
    return [Row(prompt, [*words(shape.completion), EOS], r) for prompt, r in zip(asked, rewards, strict=True)]


def tokens(rows: Sequence[Row]) -> int:
    """Prompts and completions, no padding; a prompt counts in every row that has it."""
    return sum(len(row.ids) for row in rows)


def completion_tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.completion) for row in rows)


def model(shape: Shape, attention: str, *, reference: bool = False) -> Any:
    """A random Llama, the same in every process; the reference of DPO has other layers, so that no ratio is 1."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=8 * shape.hidden // 3 // 64 * 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=max(1, shape.hidden // 128),
        max_position_embeddings=4 * shape.longest,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    torch.manual_seed(shape.seed + reference)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return made.eval().requires_grad_(False) if reference else made.train()


def autocast(shape: Shape) -> contextlib.AbstractContextManager[object]:
    if shape.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", getattr(torch, shape.dtype))


@dataclass(frozen=True)
class Trainee:
    """One who takes steps: from lists of token ids to updated weights."""

    model: nn.Module
    accumulate: Callable[[], Tensor]  # forward and backward over the rows; parts that add up to the loss, detached
    positions: int  # that the trunk sees, padding included
    optimizer: torch.optim.Optimizer

    def update(self) -> None:
        """The end of a step, the same for all."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.accumulate()
        self.update()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def adamw(trained: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
