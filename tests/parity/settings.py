"""What every peer is shown, and how its answer is compared with ours.

A peer is a function (Case, **knobs) -> (U,) losses, or a scalar that it reduced in its own way. It is given the same
leaves as our loss, padded (`Case.rows`) or one tensor a sequence (`Case.each`), so that its gradients are of the same
tensors: every statistic must agree, also in having none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastpost as fp
from fastpost import losses

PROMPTS = (2, 1, 3, 1, 1, 2, 1, 2)  # positions at the head of each sequence that predict nothing; nor does the last
UNEQUAL = (5, 3, 1, 4, 6, 6, 2, 7)  # tokens of each completion: four pairs, one of a single token
EQUAL_CHOSEN = (4, 3, 4, 6, 4, 1, 4, 7)
EQUAL = (4, 4, 4, 4, 4, 4, 4, 4)


@dataclass(frozen=True)
class Case:
    """A packed batch of which everything is known, and the numbers of a policy as leaves."""

    stats: fp.Stats  # (T,) leaves
    batch: fp.Batch
    completions: tuple[int, ...]

    @property
    def S(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> Tensor:  # (S,) kept tokens
        return torch.tensor(self.completions)

    def each(self, x: Tensor) -> list[Tensor]:  # (T,) -> S of (n,)
        """The kept tokens of each sequence."""
        return list(x[self.batch.target != -100].split(list(self.completions)))

    def rows(self, x: Tensor) -> Tensor:  # (T,) -> (S, N)
        """As padded libraries hold it: the completions, zeros on their right."""
        return pad_sequence(self.each(x), batch_first=True)

    @property
    def mask(self) -> Tensor:  # (S, N)
        return self.rows(torch.ones_like(self.stats.logp))

    @property
    def leaves(self) -> dict[str, Tensor]:
        found = {f.name: getattr(self.stats, f.name) for f in fields(self.stats)}
        return {name: x for name, x in found.items() if x is not None and x.requires_grad}


def case(completions: tuple[int, ...] = UNEQUAL, dtype: torch.dtype = torch.float64) -> Case:
    """Ratios fall on both sides of every clip in the tables, advantages have both signs and a zero."""
    torch.manual_seed(0)
    S = len(completions)
    each = list(zip(PROMPTS, completions, strict=False))
    target = torch.cat([torch.tensor([-100] * prompt + [1] * n + [-100]) for prompt, n in each])
    T = len(target)
    draw = lambda low, high: low + (high - low) * torch.rand(T, dtype=dtype)  # noqa: E731
    leaf = lambda low, high: draw(low, high).requires_grad_()  # noqa: E731
    stats = fp.Stats(
        logp=leaf(-3, -0.05),
        lse=leaf(-2, 6),
        entropy=leaf(0.1, 3),
        reverse_kl=leaf(0, 1),
        forward_kl=leaf(0, 1),
        jsd=leaf(0, 0.6),
        log_sum_sq=leaf(-3, -0.1),
        mean_logp=leaf(-9, -4),
        top1=draw(0, 1) > 0.5,
        logp_at_1=leaf(-3, -0.05),
    )
    near = lambda spread: (stats.logp + spread * torch.randn(T, dtype=dtype)).detach().clamp(max=-0.01)  # noqa: E731
    batch = fp.Batch(
        target,
        torch.tensor([prompt + n + 1 for prompt, n in each]),
        old_logp=near(0.3),
        ref_logp=near(0.5),
        advantage=torch.tensor([1.0, -0.5, 0.25, -2.0, 0.0, 1.5, -1.0, 0.75], dtype=dtype)[:S],
        label=torch.tensor([True, False, False, True, True, True, False, True])[:S],
        kl=torch.tensor(0.37, dtype=dtype),
    )
    return Case(stats, batch, completions)


def tiny(logp: list[list[float]], *, dtype: torch.dtype = torch.float64, **fields: list | float) -> Case:
    """Of completions whose numbers are written out: what is of tokens as a list for each, of sequences as one list."""
    target = torch.cat([torch.tensor([-100, *([1] * len(one)), -100]) for one in logp])
    nothing = torch.zeros(len(target), dtype=dtype)
    stats = {name: nothing.clone() for name in ("entropy", "log_sum_sq", "reverse_kl")}
    known = {"ref_logp": nothing}
    for name, value in (fields | {"logp": logp}).items():
        if isinstance(value, list) and isinstance(value[0], list):
            value = [x for one in value for x in (0.0, *one, 0.0)]
        (stats if hasattr(fp.Stats, name) else known)[name] = torch.tensor(value, dtype=dtype)
    leaves = fp.Stats(**{name: x.requires_grad_() for name, x in stats.items()})
    batch = fp.Batch(target, torch.tensor([len(one) + 2 for one in logp]), **known)
    return Case(leaves, batch, tuple(map(len, logp)))


def equal_chosen() -> Case:
    """Where a mean over all chosen tokens and a mean of each chosen sequence's mean are one."""
    return case(EQUAL_CHOSEN)


def equal() -> Case:
    return case(EQUAL)


def single() -> Case:
    """For peers that refuse float64."""
    return case(dtype=torch.float32)


def ragged() -> Case:
    """An advantage of its own for each token."""
    c = case()
    return replace(c, batch=replace(c.batch, advantage=torch.randn_like(c.stats.logp)))


def on_policy() -> Case:
    """Whose samples are the policy's own: no old_logp is given, and ratios are one, in value."""
    c = case()
    return replace(c, batch=replace(c.batch, old_logp=None))


@dataclass(frozen=True)
class Row:
    """One line of a table: this loss with these knobs is what that peer gives."""

    loss: str
    knobs: dict[str, object]
    peer: Callable[..., Tensor]
    theirs: dict[str, object] | None = None  # the peer's knobs, where it means something else by a name
    weight: Callable[[Case], Tensor] | None = None  # (U,) of a peer that reduces; None: the mean
    case: Callable[[], Case] = case

    def __str__(self) -> str:
        knobs = ",".join(f"{name}={value}" for name, value in self.knobs.items())
        source = getattr(self.peer, "func", self.peer)
        parts = (self.loss, knobs, source.__module__.rpartition(".")[2], self.case.__name__)
        return "-".join(part for part in parts if part not in ("", "case"))


# How peers reduce what ours gives a unit.


def mean_of_sequences(case: Case) -> Tensor:  # (T,)
    return case.batch.spread(1.0 / (case.lengths * case.S))


def mean_of_tokens(case: Case) -> Tensor:  # (T,) or, of the same number everywhere, ()
    return 1.0 / case.lengths.sum()


def fixed_length(case: Case) -> Tensor:  # ()
    return torch.tensor(1 / (case.S * 16))


def named(name: str) -> fp.Loss:
    return getattr(losses, name)


def gradients(value: Tensor, upstream: Tensor, case: Case) -> dict[str, Tensor]:
    found = torch.autograd.grad(
        value, list(case.leaves.values()), upstream.to(value.dtype), retain_graph=True, materialize_grads=True
    )
    return dict(zip(case.leaves, found, strict=True))


def assert_same(got: Tensor, want: Tensor, case: Case) -> None:
    """Values, and the gradient of each statistic, to the rounding of the less precise of the two."""
    assert got.shape == want.shape, f"ours is {tuple(got.shape)}, theirs {tuple(want.shape)}"
    dtype = want.dtype
    torch.testing.assert_close(got.to(dtype), want)
    upstream = torch.ones_like(want) if want.ndim == 0 else torch.randn_like(want)
    ours, theirs = gradients(got, upstream, case), gradients(want, upstream, case)
    for name, x in ours.items():
        torch.testing.assert_close(x.to(dtype), theirs[name].to(dtype), msg=lambda m, name=name: f"d/d{name}: {m}")


def check(row: Row) -> None:
    c = row.case()
    units = named(row.loss)(c.stats, c.batch, **row.knobs)
    want = row.peer(c, **(row.knobs if row.theirs is None else row.theirs))
    if want.ndim == 0:
        units = units.mean() if row.weight is None else (units * row.weight(c)).sum()
    assert_same(units, want, c)


def idle(name: str, rows: list[Row]) -> set[str]:
    """The knobs of a loss that make no difference in any row: rows that none would miss prove nothing."""
    rows = [row for row in rows if row.loss == name]
    return {
        knob
        for knob in {knob for row in rows for knob in row.knobs}
        if not any(_moves(row, knob) for row in rows if knob in row.knobs)
    }


def _moves(row: Row, knob: str) -> bool:
    """Whether the loss or its gradient is another without this knob."""
    c, results = row.case(), []
    for knobs in (row.knobs, {name: x for name, x in row.knobs.items() if name != knob}):
        units = named(row.loss)(c.stats, c.batch, **knobs)
        results.append([units, *gradients(units, torch.ones_like(units), c).values()])
    return any(not torch.allclose(a, b) for a, b in zip(*results, strict=True))
