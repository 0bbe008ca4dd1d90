"""Where the segments of a pack are and which of them continue another, as a tensor in the place of a mask.

A segment is a run of tokens at consecutive positions. Most are whole sequences; a prompt that several completions share
is a segment of its own, and each completion one that continues it. A token sees the segment that its own continues and
what comes before it in its own, itself included, as far back as a sliding window reaches.

transformers hands a four-dimensional mask through to every layer as it is, so int32 tells a layout from a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """N segments, end to end."""

    bounds: Tensor  # (N + 1,) int32: 0, n_1, n_1 + n_2, ..., T
    continues: Tensor | None = None  # (N,) int32, the segment that each continues, or -1; None: none continues any

    @staticmethod
    def of(lengths: Tensor, continues: Tensor | None = None) -> Layout:  # (N,), (N,)
        """Segments of these lengths."""
        ends = lengths.cumsum(0, dtype=torch.int32)
        return Layout(torch.cat([ends.new_zeros(1), ends]), None if continues is None else continues.to(torch.int32))

    @staticmethod
    def read(mask: Tensor | None) -> Layout | None:
        """The layout that a mask is in truth; None: it is a mask."""
        if mask is None or mask.dtype != torch.int32 or mask.ndim != 4:
            return None
        bounds, *rest = mask[0, 0]
        return Layout(bounds, rest[0][:-1] if rest else None)

    def as_mask(self) -> Tensor:  # (1, 1, 1 or 2, N + 1) int32
        rows = [self.bounds]
        if self.continues is not None:
            rows.append(torch.cat([self.continues, self.continues.new_full((1,), -1)]))
        return torch.stack(rows)[None, None]

    def to(self, device: torch.device) -> Layout:
        continues = None if self.continues is None else self.continues.to(device)
        return Layout(self.bounds.to(device), continues)


def visible(layout: Layout, tokens: int, window: int | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Whether token q sees token k, as a function of their places in the pack. What every way to attend computes."""
    place = torch.arange(tokens, device=layout.bounds.device)
    segment = torch.searchsorted(layout.bounds[1:], place, right=True)
    lengths, continues = layout.bounds.diff(), layout.continues
    if continues is None:
        continues = torch.full_like(lengths, -1)
    before = torch.where(continues < 0, 0, lengths[continues.clamp(min=0).long()])
    position = place + (before - layout.bounds[:-1])[segment]
    continued = continues[segment]

    def sees(q: Tensor, k: Tensor) -> Tensor:
        back = position[q] - position[k]
        near = back >= 0 if window is None else (back >= 0) & (back < window)
        return near & ((segment[q] == segment[k]) | (continued[q] == segment[k]))

    return sees
