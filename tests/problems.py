"""Problems for the head: what it is called with, and what float64 and plain torch make of the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost import reference as plain
from fastpost.core.compaction import Rows
from fastpost.core.quantised import Quantised, Weight
from fastpost.types import OUTPUTS, LowRank
from rules import STATISTIC_SLACK, assert_close_to_truth, assert_gradient_close_to_truth

OWN = ("logp", "lse", "entropy", "log_sum_sq", "mean_logp", "logp@1")  # statistics of p alone that have a gradient
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
Measured = dict[str, tuple[Tensor, dict[str, Tensor]]]  # a statistic -> its values, and its gradient in each leaf
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def leaf(x: Weight, dtype: torch.dtype, train: bool = True) -> Tensor:
    """The same numbers; those of a quantised weight are what it is dequantised to."""
    x = x[:] if isinstance(x, Quantised) else x
    return x.detach().to(dtype, copy=True).requires_grad_(train)


def fresh(
    head: fp.Head, dtype: torch.dtype, lora: torch.dtype, *, weight: bool, bias: bool = False, adapters: bool = True
) -> fp.Head:
    """The same head as leaves of these dtypes."""
    return replace(
        head,
        weight=leaf(head.weight, dtype, weight),
        bias=None if head.bias is None else leaf(head.bias, dtype, bias),
        lora=tuple(replace(x, a=leaf(x.a, lora, adapters), b=leaf(x.b, lora, adapters)) for x in head.lora),
    )


@dataclass(frozen=True)
class Problem:
    """The arguments of `token_stats`. No target is ignored."""

    hidden: Tensor  # (T, D)
    head: fp.Head
    target: Tensor  # (T,)
    temperature: float | Tensor = 1.0
    reference: tuple[Tensor, fp.Head] | fp.TopK | None = None
    jsd_beta: float = 0.5

    def to(
        self,
        dtype: torch.dtype,
        *,
        train_head: bool = True,
        train_bias: bool | None = None,  # None: as the head
        lora: torch.dtype | None = None,
    ) -> Problem:
        """The same numbers in another dtype, as fresh leaves. Adapters train in any case, and may have their own."""
        train_bias = train_head if train_bias is None else train_bias
        reference = self.reference
        if isinstance(reference, tuple):
            hidden, q = reference
            reference = leaf(hidden, dtype, False), fresh(q, dtype, lora or dtype, weight=False, adapters=False)
        return replace(
            self,
            hidden=leaf(self.hidden, dtype),
            head=fresh(self.head, dtype, lora or dtype, weight=train_head, bias=train_bias),
            temperature=self.temperature.to(dtype) if isinstance(self.temperature, Tensor) else self.temperature,
            reference=reference,
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        found = {"hidden": self.hidden, "weight": self.head.weight, "bias": self.head.bias}
        for i, adapter in enumerate(self.head.lora):
            found |= {f"a{i}": adapter.a, f"b{i}": adapter.b}
        return {name: x for name, x in found.items() if x is not None and x.requires_grad}

    @property
    def options(self) -> dict:
        return {"temperature": self.temperature, "reference": self.reference, "jsd_beta": self.jsd_beta}


def problem(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    T: int = 13,
    D: int = 16,
    V: int = 200,
    std: float = 3.0,  # of the logits
    bias: bool = False,
    ranks: Sequence[int] = (),  # of adapters on the head
    **rest: object,  # of the head, and of Problem
) -> Problem:
    weight = torch.randn(V, D).mul(std / D**0.5)
    shape = {name: rest.pop(name) for name in ("softcap", "scale") if name in rest}
    offset = torch.randn(V).to(device, dtype) if bias else None
    lora = tuple(adapter(r, weight.to(device, dtype)) for r in ranks)
    head = fp.Head(weight.to(device, dtype), offset, lora=lora, **shape)
    target = torch.randint(0, V, (T,)).to(device)
    return Problem(torch.randn(T, D).to(device, dtype), head, target, **rest).to(dtype)


def adapter(r: int, weight: Tensor, scaling: float = 0.7) -> LowRank:
    """One that adds about as much to the logits as the weight (V, D) itself."""
    (V, D), like = weight.shape, {"dtype": weight.dtype, "device": weight.device}
    a, b = torch.randn(r, D), torch.randn(V, r) * float(weight.float().square().mean().sqrt()) / r**0.5
    return LowRank(a.to(**like), b.to(**like), scaling)


def stat(stats: fp.Stats, output: str) -> Tensor:
    value = getattr(stats, OUTPUTS[output])
    assert value is not None, f"{output} is None"
    return value


def ours(p: Problem, outputs: Sequence[str]) -> fp.Stats:
    return fp.token_stats(p.hidden, p.head, p.target, outputs=outputs, **p.options)


def theirs(p: Problem) -> fp.Stats:
    return plain.token_stats(p.hidden, p.head, p.target, **p.options)


def gradients(value: Tensor, upstream: Tensor, p: Problem) -> dict[str, Tensor]:
    """Of sum(value * upstream), by the leaf's name; zero where a leaf plays no part."""
    found = torch.autograd.grad(
        value, list(p.leaves.values()), upstream.to(value.dtype), retain_graph=True, materialize_grads=True
    )
    return dict(zip(p.leaves, found, strict=True))


def comparisons(p: Problem) -> tuple[Problem, Problem, Problem]:
    """p in float64, in fp32, and in the dtypes it has."""
    dtypes = torch.float64, torch.float32, p.hidden.dtype
    adapters = *dtypes[:2], p.head.lora[0].a.dtype if p.head.lora else None
    trains = {"train_head": p.head.weight.requires_grad}
    trains["train_bias"] = p.head.bias is not None and p.head.bias.requires_grad
    truth, fp32, same = (p.to(d, lora=lora, **trains) for d, lora in zip(dtypes, adapters, strict=True))
    return truth, fp32, same


def assert_gradients_exact(
    got: dict[str, Tensor],
    p: Problem,
    same: dict[str, Tensor],
    truth: dict[str, Tensor],
    name: str,
    slack: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """The rule, for each leaf of p."""
    assert got.keys() == p.leaves.keys()
    for leaf, gradient in got.items():
        what = f"d{name}/d{leaf}"
        assert gradient.dtype == p.leaves[leaf].dtype, f"{what} is {gradient.dtype}"
        assert_gradient_close_to_truth(gradient, same[leaf], truth[leaf], what, slack.get(leaf, 0.0))


def random_upstream(p: Problem) -> Tensor:  # (T,)
    return torch.randn(len(p.target)).bfloat16().float().to(p.hidden.device)


def measured(p: Problem, outputs: Sequence[str], upstream: Tensor) -> Measured:
    """Ours: every output, and its gradients."""
    got = ours(p, outputs)
    return {name: (stat(got, name), gradients(stat(got, name), upstream, p)) for name in outputs}


def assert_exact(p: Problem, outputs: Sequence[str]) -> None:
    """Every output and each of its gradients, by the rule of DESIGN 5; in float64, by torch's own tolerance as well."""
    upstream = random_upstream(p)
    assert_measured_exact(p, measured(p, outputs, upstream), upstream)


def assert_measured_exact(p: Problem, found: Measured, upstream: Tensor) -> None:
    dtype, (truth, fp32, same) = p.hidden.dtype, comparisons(p)
    want, single, yardstick = theirs(truth), theirs(fp32), theirs(same)
    for name, (value, grads) in found.items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        assert_close_to_truth(value, stat(single, name), stat(want, name), name)
        truths = gradients(stat(want, name), upstream, truth)
        yardsticks = gradients(stat(yardstick, name), upstream, same)
        assert_gradients_exact(grads, p, yardsticks, truths, name)
        if dtype == torch.float64:
            torch.testing.assert_close(value, stat(want, name), msg=name)
            torch.testing.assert_close(grads, {leaf: truths[leaf] for leaf in grads})


def in_dtype(batch: fp.Batch, dtype: torch.dtype) -> fp.Batch:
    """Its floating fields in another dtype."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    floating = {n: x for n, x in values.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return replace(batch, **{n: x.to(dtype) for n, x in floating.items()})


def plain_loss(loss: fp.Loss, p: Problem, batch: fp.Batch, moved: float = 0.0, **knobs: object) -> Tensor:
    """What `fused_loss` computes, with the logits in memory and in p's own dtype throughout.

    moved: by how much each statistic is off, up in one sequence and down in the next.
    """
    visible = replace(p, target=batch.target.clamp(min=0))
    stats, sign = theirs(visible), 1 - 2 * (batch.sequence % 2)
    given = {f.name: getattr(stats, f.name) for f in fields(stats)}
    floating = {n: x + moved * sign for n, x in given.items() if x is not None and x.is_floating_point()}
    return weighted(loss, replace(stats, **floating) if moved else stats, p, batch, **knobs)


def weighted(loss: fp.Loss, stats: fp.Stats, p: Problem, batch: fp.Batch, **knobs: object) -> Tensor:
    if "temperature" in loss.__signature__.parameters:
        knobs = knobs | {"temperature": p.temperature}
    units = loss(stats, in_dtype(batch, p.hidden.dtype), **knobs)
    return units.sum() if batch.weight is None else (units * batch.weight.to(units.dtype)).sum()


def sensitivity(loss: fp.Loss, truth: Problem, batch: fp.Batch, **knobs: object) -> float:
    """By how much, at the most, the loss moves for each unit by which its statistics do: sum |dL/ds|."""
    stats = theirs(replace(truth, target=batch.target.clamp(min=0)))
    names = [OUTPUTS[name] for name in loss.bind(**knobs).differentiates]
    leaves = {name: getattr(stats, name).detach().requires_grad_() for name in names}
    value = weighted(loss, replace(stats, **leaves), truth, batch, **knobs)
    return float(sum(g.abs().sum() for g in torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)))


def statistics_slack(truth: Problem, fp32: Problem, names: Sequence[str]) -> float:
    """What the rule allows the worst of these statistics."""
    want, single = theirs(truth), theirs(fp32)
    errors = [(stat(single, name).double() - stat(want, name)).abs().max() for name in names]
    return 2 * torch.stack(errors).max().item() + STATISTIC_SLACK


def assert_loss_exact(
    total: Tensor, loss: fp.Loss, p: Problem, batch: fp.Batch, name: str = "loss", **knobs: object
) -> None:
    """The rule for a loss with explicit weights, and for its gradient in each leaf of p."""
    grads = gradients(total, torch.ones_like(total), p)
    assert_measured_loss_exact(total, grads, loss, p, batch, name, **knobs)


def assert_measured_loss_exact(
    total: Tensor,
    grads: dict[str, Tensor],  # in each leaf of p
    loss: fp.Loss,
    p: Problem,
    batch: fp.Batch,
    name: str = "loss",
    **knobs: object,
) -> None:
    truth, fp32, same = comparisons(p)
    slack = statistics_slack(truth, fp32, loss.bind(**knobs).differentiates)
    want, yardstick = plain_loss(loss, truth, batch, **knobs), plain_loss(loss, same, batch, **knobs)
    moved = plain_loss(loss, truth, batch, moved=slack, **knobs)  # what a constant of the gradient makes of it, too
    allowed = STATISTIC_SLACK + slack * sensitivity(loss, truth, batch, **knobs) + (moved - want).abs().item()
    assert_close_to_truth(total, plain_loss(loss, fp32, batch, **knobs), want, name, allowed)
    one = torch.ones_like(total)
    truths, yardsticks = gradients(want, one, truth), gradients(yardstick, one, same)
    off = {leaf: float((g - truths[leaf]).norm()) for leaf, g in gradients(moved, one, truth).items()}
    assert_gradients_exact(grads, p, yardsticks, truths, name, off)


def small_tiles(monkeypatch: pytest.MonkeyPatch, *, columns: int = 64, rows: int = 5) -> None:
    """Tiles so small that a tiny problem has many, of unequal size, and units that do not fit in one."""
    monkeypatch.setattr("fastpost.core.sweep.COLUMNS", {"cpu": columns, "cuda": columns})
    monkeypatch.setattr("fastpost.core.sweep.MOST_ROWS", rows)
    monkeypatch.setattr("fastpost.core.sweep.PANEL", {"cpu": 1, "cuda": 1})


def small_workspace(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """So many bytes."""
    for name in ("WORKSPACE", "WORKSPACE_HELD"):
        monkeypatch.setattr(f"fastpost.core.sweep.{name}", {"cpu": size, "cuda": size})


def graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The door finds the rows as it does then, when nothing may depend on a count."""

    def masked(target: Tensor, ignore_index: int, *_: object) -> Rows:
        return Rows(None, mask=target != ignore_index)

    monkeypatch.setattr("fastpost.core.door.find_rows", masked)


def schedules_of(value: Tensor) -> set[str]:
    """The names of the head's autograd functions behind a tensor."""
    seen, queue, found = set(), [value.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {name for name in ("FrozenLogp", "LazyStats", "EagerLoss") if node.name() == f"{name}Backward"}
        queue += [following for following, _ in node.next_functions]
    return found
