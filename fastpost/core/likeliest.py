"""The K likeliest tokens of every row, and their log-probabilities: how a teacher is stored, for `TopK`.

  log p_v = (z_v - max) - log sum e^(z - max)

The tiles of the logits are visited as for any statistic, and of each row only the best K so far are kept. G, and the
sorting; never (T, V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.core.door import open_door
from fastpost.core.gemm import exact_products
from fastpost.core.rows import MAX, SUM, new_state, shaped
from fastpost.core.sweep import Chunk, Sweep
from fastpost.types import IGNORE, Head


def _best(s: Sweep, chunk: Chunk, k: int) -> tuple[Tensor, Tensor]:  # (R, k) int64, (R, k)
    """Of a chunk, the likeliest first."""
    R, inverse = len(chunk.target), chunk.inverse_temperature
    state = new_state(R, s.device, s.wide)
    ids = torch.zeros(R, 0, dtype=torch.int64, device=s.device)
    best = torch.zeros(R, 0, dtype=s.wide, device=s.device)
    for block in s.columns():
        tile, _ = s.tiles(chunk, block)
        s.kernels.fold(state, tile, chunk.target, block.span.start, block.shape, inverse, frozenset())
        z = shaped(tile, block.shape, tile)
        z = z if inverse is None else z.mul_(inverse[:, None])
        found, at = z.topk(min(k, z.shape[1]))
        best, ids = torch.cat([best, found], 1), torch.cat([ids, at + block.span.start], 1)
        best, at = best.topk(min(k, best.shape[1]))
        ids = ids.gather(1, at)
    return ids, best - state[MAX, :, None] - state[SUM].log()[:, None]


@torch.no_grad()
def likeliest(
    hidden: Tensor,  # (T, D)
    head: Head,
    k: int,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (T, k) int64, (T, k) fp32
    """Ids and log-probabilities, natural, of the k likeliest tokens of softmax(logits / temperature), best first."""
    if head.shard is not None:
        raise ValueError("likeliest wants the whole head, got one rank's rows of it")
    if not 1 <= k <= head.vocabulary:
        raise ValueError(f"k must be from 1 to {head.vocabulary}, the vocabulary, got {k}")
    any_token = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    door = open_door(hidden, head, any_token, ("lse",), None, temperature, 0.5, IGNORE)
    with exact_products(hidden.device):
        s = Sweep(door.problem, door.operands, held=False)
        ids, logp = zip(*(_best(s, s.open(rows), k) for rows in s.chunks()), strict=True)
    return torch.cat(ids), torch.cat(logp)
