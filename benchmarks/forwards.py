"""Statistics of all T rows without a gradient: by products and folds, as `token_stats` finds them, and by the
tile-fused forward, which the library does not call before it wins here. A trial for each variant with a launch of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from cases import Inputs
from harness import plain_product
from measurement import Measurement, Setup
from torch import Tensor
from trial import Trial, verdict
from truth import BLOCK_ELEMENTS, statistics

import fastpost as fp
from fastpost.core import rows as row_math
from fastpost.types import OUTPUTS

UNFUSED, FUSED = "products and folds", "tile-fused"
# Of the plain launch: rows, columns, depth, warps and stages beside those of its table; each compiles without a spill.
PRODUCTS = {
    "sm_80": ((128, 128, 32, 8, 4),),
    "sm_90": ((128, 128, 64, 8, 4), (128, 256, 64, 8, 3)),
    "sm_100": ((128, 128, 64, 8, 3),),
}


class Given(NamedTuple):
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    hidden_q: Tensor  # (T, D), the reference's
    weight_q: Tensor  # (V, D)
    target: Tensor  # (T,)

    def cut(self, rows: int, dtype: torch.dtype) -> Given:
        """The first rows, in another dtype."""
        hidden, weight, hidden_q, weight_q = (
            x.detach().to(dtype) for x in (self.hidden[:rows], self.weight, self.hidden_q[:rows], self.weight_q)
        )
        return Given(hidden, weight, hidden_q, weight_q, self.target[:rows])


@dataclass(frozen=True)
class Variant:
    name: str  # of an entry of `launch.FORWARD`
    outputs: tuple[str, ...] = ("logp", "entropy")
    softcap: float | None = None
    dense: bool = False  # with the reference beside it
    share: int = 1  # of the rows, one in as many


VARIANTS = (
    Variant("plain"),
    Variant("one", softcap=30.0),
    Variant("two", ("logp", "entropy", "reverse_kl"), dense=True),
    Variant("fp32", share=8),
)


def by_token_stats(v: Variant, x: Given) -> Tensor:  # (outputs, T)
    q = (x.hidden_q, fp.Head(x.weight_q)) if v.dense else None
    head = fp.Head(x.weight, softcap=v.softcap)
    return stacked(v, fp.token_stats(x.hidden, head, x.target, outputs=v.outputs, reference=q))


def stacked(v: Variant, stats: fp.Stats) -> Tensor:  # (outputs, T)
    return torch.stack([getattr(stats, OUTPUTS[name]) for name in v.outputs])


def by_forward(v: Variant, x: Given, forward) -> Tensor:  # (outputs, T)
    from fastpost.kernels.forward import Logits

    wants = set(v.outputs) - {"logp"}
    p = Logits(x.hidden, x.weight, None, 1.0, v.softcap)
    q = Logits(x.hidden_q, x.weight_q, None, 1.0, None) if v.dense else None
    state = forward.state(p, x.target, None, wants, q)
    found = row_math.finish(state, wants, len(x.weight), None)
    return torch.stack([found[name] for name in v.outputs])


def forwards(v: Variant, device: torch.device) -> dict[str, object]:
    """The forward with the launches of this GPU, and, plain, at sizes beside the one of its table."""
    if device.type != "cuda":
        return {}
    from fastpost.kernels.forward import forward_on
    from fastpost.kernels.launch import Product, architecture

    forward = forward_on(device)
    if not forward.takes(set(v.outputs), v.dense):
        return {}
    sizes = PRODUCTS.get(architecture(device), ()) if v.name == "plain" else ()
    beside = {size: replace(forward, entries={**forward.entries, "plain": Product(*size)}) for size in sizes}
    return {FUSED: forward} | {f"{FUSED} {' x '.join(map(str, size))}": each for size, each in beside.items()}


def by_plain(v: Variant, x: Given) -> Tensor:  # (outputs, T)
    """With the logits in memory, of operands as they are given and in fp32 or wider."""
    wide = torch.promote_types(x.hidden.dtype, torch.float32)
    logits, logits_q = (
        a @ b.T if a.dtype == wide else torch.mm(a, b.T, out_dtype=wide)
        for a, b in ((x.hidden, x.weight), (x.hidden_q, x.weight_q))
    )
    if v.softcap is not None:
        logits = v.softcap * torch.tanh(logits / v.softcap)
    return stacked(v, statistics(logits, x.target, v.outputs, logits_q if v.dense else None)).double()


def worst(truth: Tensor, found: Tensor) -> float:  # (outputs, some of the rows), (outputs, T)
    return float((found[:, : truth.shape[1]] - truth).abs().max())


def trials(setup: Setup, inputs: Inputs) -> Iterator[Trial]:
    """As many of the rows are held against float64 as fit a block."""
    whole = Given(inputs.hidden, inputs.weight, inputs.hidden_q, inputs.weight_q, inputs.batch.target)
    rows = max(1, BLOCK_ELEMENTS // len(inputs.weight))
    for v in VARIANTS:
        x = whole.cut(setup.tokens // v.share, torch.float32 if v.name == "fp32" else inputs.hidden.dtype)
        same = x.hidden.dtype if x.hidden.is_cuda else torch.float32  # (a CPU has no such product of bf16)
        truth, single = (by_plain(v, x.cut(rows, dtype)) for dtype in (torch.float64, same))
        runs = {UNFUSED: partial(by_token_stats, v, x)}
        runs |= {name: partial(by_forward, v, x, forward) for name, forward in forwards(v, x.hidden.device).items()}
        yield Trial(
            case=f"statistics, {v.name}",
            setup=replace(setup, tokens=len(x.hidden), dtype=str(x.hidden.dtype).removeprefix("torch.")),
            products=2 if v.dense else 1,
            counted=None,
            runs=runs,
            results=runs,
            error=partial(worst, truth),
            allowed=2 * worst(truth, single) + 1e-5,
            product=plain_product(x.hidden, x.weight),
        )


def verdicts(measurements: Sequence[Measurement]) -> list[str]:
    """Of each variant, whether the tile-fused forward is the faster, and by how much."""
    cases = dict.fromkeys(m.case for m in measurements if m.provider == UNFUSED)
    return [_verdict(case, [m for m in measurements if m.case == case]) for case in cases]


def _verdict(case: str, entered: Sequence[Measurement]) -> str:
    seconds = {m.provider: m.seconds for m in entered if m.seconds}
    fused = {name: time for name, time in seconds.items() if name.startswith(FUSED)}
    unfused = {name: time for name, time in seconds.items() if name == UNFUSED}
    return verdict(case, fused, unfused, UNFUSED if fused else f"a {FUSED} forward that is right")
