"""Attention over a pack on any device, in any dtype: segments of like length are right-padded and attend together.

No real token comes after a padded one, so causal attention never lets one see it, and no mask of padding is needed.
Segments that continue the same one have its keys and values before their own. Each pays for its own length times what
it sees, and at most half of a row is padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastpost.models.attention.layout import Layout
from fastpost.models.attention.scores import Scores, attend


@dataclass(frozen=True)
class Group:
    """n segments of like length, at most L tokens, that continue the same segment or none."""

    index: Tensor  # (n, L) places in the pack; past a segment's end, that of its last token
    real: Tensor  # (n, L) bool: not past the end
    prefix: slice  # the places of the segment that they continue


def groups(layout: Layout) -> Iterator[Group]:
    """Every token of the pack once; of each row of `index` more than half is real."""
    bounds = layout.bounds.tolist()
    continues = [-1] * (len(bounds) - 1) if layout.continues is None else layout.continues.tolist()
    alike: dict[tuple[int, int], list[int]] = {}
    for s, before in enumerate(continues):
        if length := bounds[s + 1] - bounds[s]:
            alike.setdefault((before, length.bit_length()), []).append(s)
    for (before, _), segments in alike.items():
        start = layout.bounds[:-1][segments, None].long()
        length = layout.bounds.diff()[segments, None].long()
        step = torch.arange(max(bounds[s + 1] - bounds[s] for s in segments), device=start.device)
        prefix = slice(0, 0) if before < 0 else slice(bounds[before], bounds[before + 1])
        yield Group(start + torch.minimum(step, length - 1), step < length, prefix)


def packed(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, G, T, d)
    value: Tensor,  # (1, G, T, dv)
    layout: Layout,
    scores: Scores,
) -> Tensor:  # (1, T, H, dv)
    """Group by group, and everything back in its place."""
    outs, places = [], []
    for group in groups(layout):
        prefix = _within(group.prefix, scores.window)
        q, k, v = (x[0][:, group.index].transpose(0, 1) for x in (query, key, value))  # (n, heads, L, d)
        if prefix.stop > prefix.start:
            k, v = _behind(key[:, :, prefix], k), _behind(value[:, :, prefix], v)
        mask = _mask(q.shape[2], k.shape[2], scores.window, query.device)
        outs.append(attend(module, q, k, v, mask, scores)[group.real])
        places.append(group.index[group.real])
    return torch.cat(outs).index_select(0, torch.cat(places).argsort())[None]


def _within(prefix: slice, window: int | None) -> slice:
    """The end of the prefix, as much of it as the first token after it sees."""
    return prefix if window is None else slice(max(prefix.start, prefix.stop - window + 1), prefix.stop)


def _behind(prefix: Tensor, own: Tensor) -> Tensor:  # (1, heads, P, d), (n, heads, L, d) -> (n, heads, P + L, d)
    return torch.cat([prefix.expand(len(own), -1, -1, -1), own], 2)


def _mask(L: int, K: int, window: int | None, device: torch.device) -> Tensor | None:  # (1, 1, L, K) bool
    """Causal for the last L of K positions, no further back than the window; None where plain causal will do."""
    if K == L and (window is None or window >= L):
        return None
    back = torch.arange(K - L, K, device=device)[:, None] - torch.arange(K, device=device)
    return ((back >= 0) if window is None else (back >= 0) & (back < window))[None, None]
