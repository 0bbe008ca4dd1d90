"""Two processes sample what one does: each its own prompts by their keys, of replicas or of one sharded model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.rollout import Sampling, generate
from ranks import RANKS, two_processes

pytestmark = pytest.mark.slow

PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34], [40, 41], [50, 51, 52, 53]]
SAMPLING = Sampling(max_completion_length=12, seed=3)


def model() -> Any:
    """Ends are frequent, and so one rank is done before the other."""
    made = tiny.model()
    made.generation_config.eos_token_id = list(range(40))
    return made


def sampled(made: Any, prompts: range) -> list[list[int]]:
    found = generate(made, tiny.tokenizer(), [PROMPTS[i] for i in prompts], SAMPLING, num_generations=2, keys=prompts)
    return [completion.ids for completion in found]


def of_rank(rank: int, sharded: bool) -> list[list[int]]:
    from torch.distributed.fsdp import fully_shard

    made = model()
    if sharded:
        for layer in made.model.layers:
            fully_shard(layer)
        fully_shard(made)
    return sampled(made, range(rank, len(PROMPTS), RANKS))


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_sample_what_one_does(sharded: bool, tmp_path: Path):
    whole = sampled(model(), range(len(PROMPTS)))
    longest = [
        max(len(ids) for i in range(rank, 5, RANKS) for ids in whole[2 * i : 2 * i + 2]) for rank in range(RANKS)
    ]
    assert longest[0] != longest[1]
    parts = two_processes(functools.partial(of_rank, sharded=sharded), tmp_path)
    for i in range(len(PROMPTS)):
        at = 2 * (i // RANKS)
        assert parts[i % RANKS][at : at + 2] == whole[2 * i : 2 * i + 2]
