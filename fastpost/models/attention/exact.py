"""Attention over a pack on any device, in any dtype: segments of like length are right-padded and attend together.

No real token comes after a padded one, so causal attention never lets one see it, and no mask of padding is needed.
Segments that continue others have their keys and values before their own; those are of one length in a group. Each pays
for its own length times what it sees, and at most half of a row is padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastpost.models.attention.layout import Layout
from fastpost.models.attention.scores import Scores, attend


@dataclass(frozen=True)
class Group:
    """n segments of like length, at most L tokens, which continue m segments of P tokens, or none."""

    index: Tensor  # (n, L) places in the pack; past a segment's end, that of its last token
    real: Tensor  # (n, L) bool: not past the end
    prefixes: Tensor  # (m, P) the places of what they continue, in their order
    copies: Sequence[int]  # m, how many of them continue each


def groups(layout: Layout) -> Iterator[Group]:
    """Every token of the pack once; of each row of `index` more than half is real."""
    bounds = layout.bounds.tolist()
    sizes = [b - a for a, b in pairwise(bounds)]
    continues = [-1] * len(sizes) if layout.continues is None else layout.continues.tolist()
    alike: dict[tuple[int, int], list[int]] = {}
    for s in sorted(range(len(sizes)), key=continues.__getitem__):
        before = sizes[continues[s]] if continues[s] >= 0 else 0
        if sizes[s]:
            alike.setdefault((before, sizes[s].bit_length()), []).append(s)
    for (before, _), segments in alike.items():
        start = layout.bounds[:-1][segments, None].long()
        length = layout.bounds.diff()[segments, None].long()
        step = torch.arange(max(sizes[s] for s in segments), device=start.device)
        copies = Counter(continues[s] for s in segments)
        prefixes = layout.bounds[[*copies], None].long() + torch.arange(before, device=start.device)
        yield Group(start + torch.minimum(step, length - 1), step < length, prefixes, [*copies.values()])


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
        prefixes = _within(group.prefixes, scores.window)
        q, k, v = (x[0][:, group.index].transpose(0, 1) for x in (query, key, value))  # (n, heads, L, d)
        if prefixes.shape[1]:
            k, v = (_behind(x[0][:, prefixes], group.copies, own) for x, own in ((key, k), (value, v)))
        mask = _mask(q.shape[2], k.shape[2], scores.window, query.device)
        outs.append(attend(module, q, k, v, mask, scores)[group.real])
        places.append(group.index[group.real])
    return torch.cat(outs).index_select(0, torch.cat(places).argsort())[None]


def _within(prefixes: Tensor, window: int | None) -> Tensor:  # (m, P) -> (m, at most window - 1)
    """Their ends, as much as the first token after them sees."""
    return prefixes if window is None else prefixes[:, max(0, prefixes.shape[1] - window + 1) :]


def _behind(prefixes: Tensor, copies: Sequence[int], own: Tensor) -> Tensor:
    # (heads, m, P, d), m, (n, heads, L, d) -> (n, heads, P + L, d)
    # Expanded, not indexed: then the gradients of the copies are added up in one order.
    before = [prefix.expand(n, -1, -1, -1) for prefix, n in zip(prefixes.unbind(1), copies, strict=True)]
    return torch.cat([torch.cat(before) if len(before) > 1 else before[0], own], 2)


def _mask(L: int, K: int, window: int | None, device: torch.device) -> Tensor | None:  # (1, 1, L, K) bool
    """Causal for the last L of K positions, no further back than the window; None where plain causal will do."""
    if K == L and (window is None or window >= L):
        return None
    back = torch.arange(K - L, K, device=device)[:, None] - torch.arange(K, device=device)
    return ((back >= 0) if window is None else (back >= 0) & (back < window))[None, None]
