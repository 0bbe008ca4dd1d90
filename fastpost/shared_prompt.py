"""A pack in which the sequences of a unit (a group's completions, a pair) have their common prefix once.

G completions of R tokens behind a prompt of P: P + G R tokens go through the trunk in place of G (P + R). Positions of
a completion go on from P, so its tokens and the prompt's are computed as if the prompt stood before each, and the
gradients of the G copies of the prompt add up in the one.

  segments  the prefix of a unit, then what is left of each of its sequences; a sequence is a prefix and its own rest
  rows      what the head sees: the hidden state behind each predicted token. That of the last prompt token, which
            predicts the first of every completion, is there G times
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from fastpost.packing import Packed
from fastpost.types import Batch


@dataclass(frozen=True)
class SharedPack:
    """N segments end to end, T tokens: what the trunk reads, and the R rows that the loss reads."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64
    lengths: Tensor  # (N,) int64 on the host, tokens of each segment
    continues: Tensor  # (N,) int64 on the host, the segment that each continues, or -1
    copies: Tensor  # (T,) int64, how many sequences have the token
    rows: Tensor  # (R,) int64, the token whose hidden state predicts batch.target
    ends: Tensor  # (S,) int64, the last token of each sequence
    batch: Batch  # of the sequences' R predicted tokens alone
    longest: int  # positions of the longest sequence
    num_tokens: int  # of all sequences, the prefix of each counted

    def to(self, device: torch.device | str) -> SharedPack:
        """The same pack on the device, but for what is read on the host."""
        names = ("input_ids", "position_ids", "copies", "rows", "ends", "batch")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


AnyPack: TypeAlias = Packed | SharedPack


@dataclass(frozen=True)
class _Segment:
    """A slice of the plain pack that is kept."""

    start: int
    stop: int
    copies: int = 1
    continues: int = -1


def _common(sequences: Sequence[Tensor]) -> int:
    """How many tokens all of them begin with; of one alone, none."""
    shortest = min(len(sequence) for sequence in sequences) if len(sequences) > 1 else 0
    same = torch.stack([sequence[:shortest] for sequence in sequences])
    return int((same == same[0]).all(0).cumprod(0).sum())


def _of_unit(edges: Sequence[int], common: int, index: int) -> list[_Segment]:
    """What is kept of the sequences that these edges are around; `index` is that of their first segment."""
    prefix = [_Segment(edges[0], edges[0] + common, copies=len(edges) - 1)] if common else []
    rests = [(a + common, b) for a, b in pairwise(edges) if b > a + common]
    return prefix + [_Segment(a, b, continues=index if common else -1) for a, b in rests]


def _sizes(units: int | Sequence[int], S: int) -> list[int]:
    """How many sequences each unit has."""
    sizes = [units] * (S // max(units, 1)) if isinstance(units, int) else list(units)
    if sum(sizes) != S or min(sizes) < 1:
        raise ValueError(f"units must be the sizes, each positive, of groups of the pack's {S} sequences, got {units}")
    return sizes


def _once(ids: Tensor, ends: Sequence[int], sizes: Sequence[int]) -> tuple[list[_Segment], Tensor]:
    """What is kept of a plain pack, and for each of its tokens the place there of the copy that is."""
    segments: list[_Segment] = []
    origin = torch.arange(len(ids))
    first = 0
    for size in sizes:
        edges = ends[first : first + size + 1]
        common = _common([ids[a:b] for a, b in pairwise(edges)])
        for start in edges[:-1]:
            origin[start : start + common] = torch.arange(edges[0], edges[0] + common)
        segments += _of_unit(edges, common, len(segments))
        first += size
    return segments, origin


def share_prompts(packed: Packed, units: int | Sequence[int]) -> SharedPack:
    """The pack with the common prefix of each unit once; a unit is that many adjacent sequences, one size or many."""
    ids, batch = packed.input_ids[0], packed.batch
    if batch.kept is None or batch.weight is not None:
        raise ValueError("share_prompts takes a pack as fastpost.packing.pack returns it, before it has a weight")
    sizes = _sizes(units, batch.lengths.numel())
    segments, origin = _once(ids, [0, *accumulate(batch.lengths.tolist())], sizes)
    source = torch.cat([torch.arange(segment.start, segment.stop) for segment in segments])
    place = torch.zeros_like(ids).index_copy(0, source, torch.arange(len(source)))
    lengths = torch.tensor([segment.stop - segment.start for segment in segments])
    predicted = batch.at(batch.kept)
    return SharedPack(
        ids[None, source],
        packed.position_ids[:, source],
        lengths,
        torch.tensor([segment.continues for segment in segments]),
        torch.tensor([segment.copies for segment in segments]).repeat_interleave(lengths),
        place[origin[batch.kept]],
        place[origin[batch.lengths.cumsum(0) - 1]],
        replace(predicted, kept=torch.arange(len(batch.kept)), kept_lengths=predicted.lengths),
        packed.longest,
        packed.num_tokens,
    )
