"""A fused model on two processes, wrapped by DDP or FSDP: the gradient is that of one process with the whole batch.

The ranks have unequal numbers of labels, or the second has none. `num_items_in_batch` is what Trainer passes: the count
over all ranks; the loss is multiplied by the number of ranks, because DDP and FSDP average.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import tiny
from fastpost.integrations.transformers import fuse_head
from ranks import RANKS, two_processes

pytestmark = pytest.mark.slow

WRAPPERS = ("ddp", "ddp first", "fsdp", "fsdp first")
SHARES = ("few", "none")  # of the labels, for the second rank
Gradients = dict[str, Tensor]


def model() -> Any:
    return tiny.model(tie_word_embeddings=True).double()


def batch(share: str) -> dict[str, Tensor]:
    """Two sequences for each rank."""
    ids = torch.randint(5, 97, (2 * RANKS, 8), generator=torch.Generator().manual_seed(0))
    prompts = torch.tensor([[2], [4], [6 if share == "few" else 8], [7 if share == "few" else 8]])
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(8) < prompts, -100)}


def wrapped(lm: Any, wrapper: str) -> Any:
    if wrapper == "ddp":
        return DistributedDataParallel(lm)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for layer in lm.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(lm, mesh=mesh)


def on_rank(rank: int) -> dict[tuple[str, str], Gradients]:
    return {case: one(rank, *case) for case in itertools.product(WRAPPERS, SHARES)}


def one(rank: int, wrapper: str, share: str) -> Gradients:
    lm, inputs = model(), batch(share)
    if not wrapper.endswith(" first"):
        fuse_head(lm)
    parallel = wrapped(lm, wrapper.removesuffix(" first"))
    if wrapper.endswith(" first"):
        fuse_head(parallel)
    items = (inputs["labels"][:, 1:] != -100).sum()
    out = parallel(**{name: x[2 * rank : 2 * rank + 2] for name, x in inputs.items()}, num_items_in_batch=items)
    assert out.logits is None
    (out.loss * RANKS).backward()
    full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731
    return {name: full(p.grad) for name, p in lm.named_parameters()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Gradients]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return two_processes(on_rank, folder)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_gradient_is_that_of_one_process(found, wrapper, share):
    truth, inputs = model(), batch(share)
    logits = truth(inputs["input_ids"]).logits[:, :-1]  # the loss of transformers is rounded to fp32
    cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten()).backward()
    first, second = (ranks[wrapper, share] for ranks in found)
    for name, parameter in truth.named_parameters():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter.grad, msg=name)
