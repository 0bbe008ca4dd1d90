"""Problems for a twin of the row kernels: whole rows of logits, tile by tile, against core/rows.py in float64, with
rows.py in fp32 as the yardstick.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.core import rows
from fastpost.core.rows import Shape, TorchRows
from rules import assert_close_to_truth, assert_gradient_close_to_truth

PLAIN = Shape(bias=None, scale=1.0, softcap=None)
OWN = frozenset({"top1", "entropy", "log_sum_sq", "mean_logp", "logp@1"})
BOTH = OWN | {"reverse_kl", "forward_kl"}
JSD = frozenset({"jsd"})
ALL = BOTH | JSD
V = 211  # a vocabulary that is cut in tiles


def walk(
    kernels,
    z: Tensor,
    target: Tensor,
    wants: frozenset[str],
    inverse: Tensor | None,
    zq: Tensor | None,
    width: int,
    shape: Shape = PLAIN,
    beta: float = 0.5,
) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics and dL/dtile of whole rows (R, V), tile by tile, in the dtype of z; L is a weighted sum."""
    inverse = None if inverse is None else inverse.to(z.dtype)
    bias = None if shape.bias is None else shape.bias.to(z.device)
    part = lambda span: shape._replace(bias=None if bias is None else bias[span])  # noqa: E731
    state = rows.new_state(len(z), z.device, z.dtype)
    spans = [slice(i, min(i + width, z.shape[1])) for i in range(0, z.shape[1], width)]
    for span in spans:
        tile_q = None if zq is None else zq[:, span]
        shape_q = None if zq is None else part(span)
        kernels.fold(state, z[:, span], target, span.start, part(span), inverse, wants, tile_q, shape_q)
    stats = rows.finish(state, wants, z.shape[1], inverse)
    if zq is not None and "jsd" in wants:
        for span in spans:
            kernels.mixture(state, z[:, span], part(span), inverse, zq[:, span], part(span), beta)
        stats |= rows.finish_mixture(state, beta)
    names = [name for name in ("logp", "lse", *sorted(wants)) if stats[name].is_floating_point()]
    d = {name: torch.linspace(-1, 1.5 + i, len(z)).to(z) for i, name in enumerate(names)}
    c = rows.coefficients(stats, d, z.shape[1], beta)
    grad = torch.empty_like(z)
    for span in spans:
        tile_q, shape_q = (None, None) if zq is None else (zq[:, span], part(span))
        tile, out = z[:, span], grad[:, span]
        kernels.grads(tile, target, span.start, part(span), inverse, c, frozenset(names), out, tile_q, shape_q, beta)
    return {name: stats[name] for name in ("logp", "lse", *sorted(wants))}, grad


def held_against_truth(
    kernels,
    z: Tensor,
    target: Tensor,
    wants: frozenset[str] = OWN,
    inverse: Tensor | None = None,
    zq: Tensor | None = None,
    width: int = 64,
    shape: Shape = PLAIN,
    beta: float = 0.5,
) -> None:
    wide = None if zq is None else zq.double()
    exact, exact_grad = walk(TorchRows(), z.double(), target, wants, inverse, wide, z.shape[1], shape, beta)
    plain, plain_grad = walk(TorchRows(), z, target, wants, inverse, zq, width, shape, beta)
    ours, our_grad = walk(kernels, z, target, wants, inverse, zq, width, shape, beta)
    for name in exact:
        assert_close_to_truth(ours[name].float(), plain[name].float(), exact[name].double(), name)
    assert_gradient_close_to_truth(our_grad, plain_grad, exact_grad)


WANTS = {"logp": frozenset(), "entropy": frozenset({"entropy"}), "own": OWN, "both": BOTH, "jsd": JSD, "all": ALL}

SHAPES = {
    "bias": Shape(torch.linspace(-2, 2, V), 1.0, None),
    "bf16 bias": Shape(torch.linspace(-2, 2, V).bfloat16(), 1.0, None),
    "a banned token": Shape(torch.zeros(V).index_fill(0, torch.tensor([7]), -torch.inf), 1.0, None),
    "scale": Shape(None, 0.5, None),
    "softcap": Shape(None, 1.0, 5.0),
    "all": Shape(torch.linspace(-2, 2, V), 0.7, 5.0),
}
