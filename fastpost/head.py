"""The core: a language-model head turned into per-token statistics, without the (tokens, vocabulary) logits.

One G is one product of the head, 2 T D V flop. In `fastpost.core`, `door` checks a call and drops the rows that are
ignored or whose coefficient is known to be zero; one of `schedules` runs it: statistics alone G, frozen 2 G, eager 3 G
(2 G with a frozen weight), lazy 4 G (3 G); a reference costs one G_q more where its logits are computed, a LoRA on the
head (`lowrank`) its own thin products. `sweep` walks the tiles, and `rows` or its Triton and C++ twins do all that is
done to a logit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastpost.core.door import Door, eager_only, open_door
from fastpost.core.eager import EagerLoss, Plan, fits
from fastpost.core.gemm import wide
from fastpost.core.schedules import FrozenLogp, LazyStats, statistics
from fastpost.equation import Loss
from fastpost.types import IGNORE, OUTPUTS, Batch, Head, Stats, TopK, nearest


@eager_only
def token_stats(
    hidden: Tensor,  # (..., D)
    head: Head | Tensor,
    target: Tensor,  # (...) int64, already shifted: the token that each hidden state predicts
    *,
    outputs: Sequence[str] = ("logp",),
    differentiates: Sequence[str] | None = None,
    reference: tuple[Tensor, Head | Tensor] | TopK | None = None,
    temperature: float | Tensor = 1.0,
    jsd_beta: float = 0.5,
    ignore_index: int = IGNORE,
) -> Stats:
    """Per-token statistics of p = softmax(logits / temperature), logits = head(hidden), as autograd tensors.

    outputs, any of, in nats:
      "logp"        log p[target]                  "entropy"     -sum p log p
      "lse"         logsumexp of the logits        "log_sum_sq"  log sum p^2
      "reverse_kl"  KL(p || q), exact              "mean_logp"   mean_v log p_v
      "forward_kl"  KL(q || p), exact              "top1"        whether no token is likelier than the target
      "jsd"         generalised by jsd_beta        "logp@1"      logp at temperature 1
    differentiates: the outputs that are to carry a gradient, None for all; the others come detached. logp alone, with a
    frozen head, costs one pass (2 G in place of 3).
    jsd_beta: m = b q + (1 - b) p as in GKD (arXiv:2306.13649); 0 and 1 give the forward and the reverse KL.
    reference: (hidden_q, head_q), whose D may differ and whose V may not, or a TopK teacher; q is a constant.
    temperature: a number, or a tensor of target's shape; it divides the logits of p and of q.

    Returns a Stats with a field of target's shape for each output: fp32 (float64 for float64 inputs; top1 bool), None
    where not asked. A target equal to ignore_index gives 0, no gradient, and no work. Gradients flow to hidden, weight,
    bias and the a and b of a LoRA, in their dtypes. Logits are fp32 whatever the inputs' dtype. On an accelerator the
    call waits once for the number of kept rows.

    Raises ValueError, naming the argument and the shapes, for what does not fit together. Backward is once
    differentiable; the transforms of torch.func are not supported.
    """
    door = open_door(hidden, head, target, outputs, reference, temperature, jsd_beta, ignore_index)
    p, operands = door.problem, door.operands
    carrying = {door.inner(name) for name in _carrying(outputs, differentiates)}
    if not carrying or not (door.needs_rows or door.needs_head):
        values = statistics(p, operands)
    else:
        schedule = FrozenLogp if not door.needs_head and carrying == {"logp"} else LazyStats
        found = dict(zip(p.names, schedule.apply(*operands, p), strict=True))
        values = {name: x if name in carrying else x.detach() for name, x in found.items()}
    return door.stats(values, outputs)


def _carrying(outputs: Sequence[str], differentiates: Sequence[str] | None) -> set[str]:
    """The outputs through which a gradient is to flow."""
    known = [name for name in outputs if name != "top1"]
    if differentiates is None:
        return set(known)
    for name in differentiates:
        if name not in known:
            raise ValueError(
                f"differentiates must be some of outputs, other than top1: got {name!r}{nearest(name, known)} and "
                f"outputs {tuple(outputs)}"
            )
    return set(differentiates)


def linear_logprobs(
    hidden: Tensor,  # (..., D)
    head: Head | Tensor,
    target: Tensor,  # (...)
    *,
    reference: tuple[Tensor, Head | Tensor] | TopK | None = None,
    temperature: float | Tensor = 1.0,
    jsd_beta: float = 0.5,
    ignore_index: int = IGNORE,
) -> Tensor:  # (...)
    """log softmax(logits / temperature)[target]: `token_stats(...).logp`, in place of log_softmax and gather."""
    same = {"reference": reference, "temperature": temperature, "jsd_beta": jsd_beta, "ignore_index": ignore_index}
    return token_stats(hidden, head, target, **same).logp


@eager_only
def fused_loss(
    loss: Loss,
    hidden: Tensor,  # (T, D) or (1, T, D)
    head: Head | Tensor,
    batch: Batch,
    *,
    reference: tuple[Tensor, Head | Tensor] | TopK | None = None,
    temperature: float | Tensor = 1.0,
    jsd_beta: float = 0.5,
    ignore_index: int = IGNORE,
    outputs: Sequence[str] = (),
    return_stats: bool = False,
    **knobs: object,
) -> Tensor | tuple[Tensor, Stats]:
    """Sum over kept units of batch.weight * loss: a scalar that backpropagates, by the cheapest schedule.

    loss: one of fastpost.losses, or any function declared with `fastpost.loss`. knobs go to it; an unknown one is a
    ValueError.
    batch.weight None: the mean over kept units, for one process and one accumulation step.
    return_stats: (loss, Stats), detached and in input order, of what the loss reads and of `outputs`, from the same
    pass. The other arguments are those of `token_stats`.

    A unit of weight 0, or of tokens whose advantage is 0 where a policy loss has no penalty, is idle: it adds exactly
    nothing, keeps its place in the mean, and costs no product; for return_stats one, without a gradient. Not looked for
    where that would be a wait of its own: in a Batch from packing that is on an accelerator, and under graph capture.
    """
    if not isinstance(loss, Loss):
        raise ValueError(f"loss must be declared with fastpost.loss (fastpost.losses has the catalogue), got {loss!r}")
    if not isinstance(batch, Batch):
        raise ValueError(f"batch must be a fastpost.Batch, got {type(batch).__name__}")
    loss = _bound(loss, knobs, temperature)
    _check_weight(loss, batch)
    if ignore_index != IGNORE:
        batch = replace(batch, kept=None, kept_lengths=None)
    asked = tuple(dict.fromkeys((*loss.reads, *outputs)))
    enter = functools.partial(
        open_door, hidden, head, batch.target, asked, reference, temperature, jsd_beta, ignore_index
    )
    door = enter(batch.kept, batch.lengths, _live(loss, batch, ignore_index))
    total, found = _scheduled(_plan_loss(loss, batch, door), door)
    if not return_stats:
        return total
    stats = door.stats({n: x.detach() for n, x in found.items()}, asked)
    if door.idle is not None:
        with torch.no_grad():
            beside = enter(door.idle)
        stats = _merged(stats, beside.stats(statistics(beside.problem, beside.operands), asked), asked)
    return total, stats


def _scheduled(plan: Plan, door: Door) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss by the cheapest schedule, and the statistics."""
    p, operands = plan.problem, door.operands
    carrying = {door.inner(name) for name in plan.loss.differentiates}
    if not (door.needs_rows or door.needs_head):
        found = statistics(p, operands)
    elif not door.needs_head and carrying <= {"logp"}:
        found = dict(zip(p.names, FrozenLogp.apply(*operands, p), strict=True))
    elif fits(plan, operands):
        total, *values = EagerLoss.apply(*operands, plan)
        return total, dict(zip(p.names, values, strict=True))
    else:
        found = dict(zip(p.names, LazyStats.apply(*operands, p), strict=True))
    return plan.weighted(found, plan.batch, slice(None)), found


def _merged(one: Stats, other: Stats, names: Sequence[str]) -> Stats:
    """Of different rows: each is 0 where the other is not."""
    return Stats(**{name: getattr(one, name) + getattr(other, name) for name in (OUTPUTS[each] for each in names)})


def _live(loss: Loss, batch: Batch, ignore_index: int) -> Tensor | None:  # (T,) bool
    """The kept rows that are not idle; None: all. In a packed batch on an accelerator, which is never waited for, they
    are not looked for: to count them would be a wait."""
    if batch.kept is not None and batch.target.device.type != "cpu":
        return None
    return loss.live(batch, batch.target != ignore_index)


def _bound(loss: Loss, knobs: dict[str, object], temperature: float | Tensor) -> Loss:
    """The loss with its knobs. One that names the temperature among them gets the call's."""
    if "temperature" in loss.__signature__.parameters:
        if isinstance(temperature, Tensor):
            raise ValueError(f"the loss {loss.name!r} is one of a single temperature, got a tensor of them")
        knobs = knobs | {"temperature": temperature}
    return loss.bind(**knobs)


def _check_weight(loss: Loss, batch: Batch) -> None:
    U = batch.units(loss.unit)
    if batch.weight is not None and batch.weight.shape != (U,):
        raise ValueError(
            f"batch.weight must have shape ({U},), one for each {loss.unit}, got {tuple(batch.weight.shape)}"
        )


def _plan_loss(loss: Loss, batch: Batch, door: Door) -> Plan:
    """Brings everything to the rows that are to be multiplied."""
    p = door.problem
    if door.kept is not None and loss.unit != "token":
        raise ValueError(f"under graph capture only a loss of tokens can run, and {loss.name!r} is one of {loss.unit}s")
    everything = torch.arange(len(p), device=p.target.device)
    inner = batch.at(everything if p.index is None else p.index, door.lengths)
    if door.kept is not None:
        inner = inner.blank(door.kept)
    if batch.weight is None:
        kept = inner.kept_units(loss.unit) if door.kept is None else door.kept
        count = kept.sum(dtype=wide(p.dtype))
        if door.idle is not None:  # no unit is idle in part
            count = count + batch.at(door.idle).kept_units(loss.unit).sum()
        weight = (1 / count.clamp(min=1)).expand(len(kept))
    elif loss.unit == "token" and p.index is not None:
        weight = batch.weight.index_select(0, p.index)
    else:
        weight = batch.weight
    names = {name: door.inner(name) for name in loss.reads}
    return Plan(p, loss, inner, weight.to(wide(p.dtype)), door.kept, names)
