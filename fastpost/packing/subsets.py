"""Some sequences of a pack, as a pack: how what is known of all samples of a step gets into its microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastpost.packing.examples import Packed, pack, placeholder
from fastpost.types import PER_TOKEN, Batch
from fastpost.types.batch import PER_SEQUENCE


def positions_of(lengths: Tensor, rows: Sequence[int]) -> Tensor:  # (S,) -> (N,)
    """Where these sequences lie in a pack of such lengths."""
    ends = lengths.cumsum(0).tolist()
    sizes = lengths.tolist()
    return torch.cat([torch.arange(ends[row] - sizes[row], ends[row]) for row in rows])


def subset(packed: Packed, rows: Sequence[int]) -> Packed:
    """These sequences of a pack on the host, in this order. The weight, which belongs to a normalisation of the whole,
    is not carried, and neither is what belongs to pairs."""
    batch, S = packed.batch, packed.batch.lengths.numel()
    wrong = [row for row in rows if not 0 <= row < S]
    if not len(rows) or wrong:
        raise ValueError(f"rows must be one or more of the pack's {S} sequences, got {wrong or 'none'}")
    at, of = positions_of(batch.lengths, rows), torch.as_tensor(rows)
    found = {name: value[at] for name in PER_TOKEN if (value := getattr(batch, name)) is not None}
    found |= {name: value[of] for name in PER_SEQUENCE if (value := getattr(batch, name)) is not None}
    lengths, target = batch.lengths[of], batch.target[at]
    kept = (target != -100).nonzero()[:, 0]
    counts = torch.stack([(part != -100).sum() for part in target.split(lengths.tolist())])
    chosen = Batch(target, lengths, kl=batch.kl, kept=kept, kept_lengths=counts, **found)
    return Packed(packed.input_ids[:, at], packed.position_ids[:, at], chosen, int(lengths.max()))


def stand_in(packed: Packed) -> Packed:
    """A placeholder of which is known what is known of this pack's sequences: for a rank that has none of them."""
    blank, batch = pack(placeholder()), packed.batch
    names = (*PER_TOKEN, *PER_SEQUENCE)
    known = {name: value.new_zeros(1) for name in names if (value := getattr(batch, name)) is not None}
    return with_known(blank, **known, **({} if batch.kl is None else {"kl": batch.kl}))


def with_known(packed: Packed, **known: Tensor) -> Packed:
    """The pack, of whose sequences this is known as well: further fields of its batch."""
    return replace(packed, batch=replace(packed.batch, **known))
