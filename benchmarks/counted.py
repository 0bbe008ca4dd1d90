"""What the head does, counted: flop, bytes and workspace of each schedule, as formulas of the shapes.

T kept tokens are cut into chunks of R, V columns into blocks of B; K is the width of what is multiplied: D of the
policy, D_q of a reference, r of a LoRA. Each product is 2 T V K flop and joins three sides, of which one is its result:

  tile      T V elements             tile     = rows @ columns.T     logits
  rows      T K, once a block        rows    += tile @ columns       U, dhidden, dlow
  columns   V K, once a chunk        columns += tile.T @ rows        dW, db

Bytes are counted at two levels:

  fetched   what comes from memory though the workspace stays in cache: a head, block by block, once a chunk and pass;
            hidden states once a pass; what dW and db hold so far, read and written once a chunk (the first one only
            writes dW)
  touched   all that products and row kernels read and write

`bound` is the roofline (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785): no run that is cut so
takes fewer seconds. Left out are vectors of a number a token, what is done once a call to tensors of a result's size,
the reading of a LoRA's factors, and the scratch of row kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fastpost.core.eager import fits_in_gradient
from fastpost.core.sweep import apart

Schedule = Literal["statistics", "frozen", "kept", "eager", "lazy"]  # kept: eager, of logp alone
Side = Literal["tile", "rows", "columns"]


@dataclass(frozen=True)
class Work:
    """A call of the head. Its elements have `stored` bytes; products take them with `multiplied`, and make `wide`."""

    T: int
    D: int
    V: int
    r: int = 0  # of a LoRA on the head, in the logits' dtype; 0: none
    D_q: int = 0  # of a reference with a head of its own; 0: none
    jsd: bool = False  # each pair of tiles is read a second time
    compares: bool = False  # whether a divergence from the reference carries a gradient
    trains: frozenset[str] = frozenset({"hidden", "weight"})  # and "a", "b" of the LoRA
    stored: int = 2
    multiplied: int = 2
    wide: int = 4

    @property
    def low_trains(self) -> bool:
        return self.r > 0 and bool(self.trains & {"hidden", "a"})


@dataclass(frozen=True)
class Cost:
    """Of one thing after another: what they do adds up, and the workspace is that of the greediest."""

    flop: int = 0
    fetched: int = 0  # bytes
    touched: int = 0  # bytes
    workspace: int = 0  # bytes of tiles, of operands that had to be widened, and of accumulators

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flop + other.flop,
            self.fetched + other.fetched,
            self.touched + other.touched,
            max(self.workspace, other.workspace),
        )

    def bound(self, flop_rate: float, bandwidth: float) -> float:
        """The fewest seconds, at so many flop and bytes a second."""
        return max(self.flop / flop_rate, self.fetched / bandwidth)


@dataclass(frozen=True)
class Pass:
    """A way through the tiles, of R rows and B columns each; of a chunk, all may be held."""

    work: Work
    R: int
    B: int
    held: bool

    def product(self, K: int, result: Side, operand: int, *, adds: bool = True, fresh: bool = False) -> Cost:
        """Of operands with so many bytes an element. The result is written, and where it adds, read before, unless it
        is `fresh` and the chunk the first."""
        x, chunks, blocks = self.work, -(-self.work.T // self.R), -(-self.work.V // self.B)
        elements = {"tile": x.T * x.V, "rows": blocks * x.T * K, "columns": chunks * x.V * K}
        size = {"tile": x.multiplied, "rows": operand, "columns": operand} | {result: x.wide * (2 if adds else 1)}
        moved = {side: n * size[side] for side, n in elements.items()}
        if fresh:
            moved[result] -= elements[result] // chunks * x.wide
        return Cost(2 * x.T * x.V * K, moved["columns"] if result == "columns" else 0, sum(moved.values()))

    def operands(self, K: int, *, opened: bool = False) -> Cost:
        """A head brought in, and hidden states unless their chunk is open; and widened, where they are not multiplied
        as they are stored."""
        x, chunks = self.work, -(-self.work.T // self.R)
        elements = ((0 if opened else x.T) + chunks * x.V) * K
        return Cost(0, elements * x.stored, elements * (x.stored + x.multiplied) if x.multiplied != x.stored else 0)

    def kernel(self, *, writes: bool) -> Cost:
        """A row kernel reads each tile, the reference's too, and may write what is multiplied next."""
        x = self.work
        return Cost(0, 0, x.T * x.V * (x.wide * (2 if x.D_q else 1) + (x.multiplied if writes else 0)))

    def logits(self) -> Cost:
        x = self.work
        cost = self.product(x.D, "tile", x.multiplied, adds=False)
        if x.r:
            cost += self.product(x.r, "tile", x.wide)
        if x.D_q:
            cost += self.product(x.D_q, "tile", x.multiplied, adds=False)
        return cost

    def fold(self, *, sums: bool = False) -> Cost:
        """Statistics; and the sums of the frozen schedule, whose left operand the kernel writes."""
        x, cost = self.work, self.workspace(sums=sums)
        cost += self.operands(x.D) + self.operands(x.D_q) + self.logits() + self.kernel(writes=sums)
        if x.jsd:
            cost += self.kernel(writes=False)
        if sums:
            cost += self.product(x.D, "rows", x.multiplied)
        if sums and x.r:
            cost += self.product(x.r, "rows", x.wide)
        return cost

    def gradients(self) -> Cost:
        """The products with the gradient of each tile."""
        x, cost = self.work, Cost()
        if "hidden" in x.trains:
            cost += self.product(x.D, "rows", x.multiplied)
        if x.low_trains:
            cost += self.product(x.r, "rows", x.wide)
        if "weight" in x.trains:
            cost += self.product(x.D, "columns", x.multiplied, fresh=True)
        if "b" in x.trains:
            cost += self.product(x.r, "columns", x.wide)
        return cost

    def grads(self) -> Cost:
        """Gradients, from tiles that are held, or made again."""
        x, cost = self.work, self.workspace(grads=True)
        cost += self.operands(x.D, opened=self.held) + self.kernel(writes=True)
        if not self.held:
            cost += self.operands(x.D_q) + self.logits()
        return cost + self.gradients()

    @property
    def in_place(self) -> bool:
        """Whether what is kept lies where dW will be."""
        x = self.work
        return "weight" in x.trains and fits_in_gradient(x.T, self.R, x.multiplied, x.D * x.stored)

    @property
    def accumulated(self) -> int:
        """How many of dW's rows add up in wide numbers: of a single chunk those of a block, which then are rounded."""
        x = self.work
        return min(self.B, x.V) if x.T <= self.R and x.stored != x.wide else x.V

    def keeps(self) -> Cost:
        """Statistics, the sums of the frozen schedule, and the head's gradient from what they were made of, which is
        read once more and becomes a gradient in its place. The weight is not read again."""
        x, R, B, cost = self.work, min(self.R, self.work.T), min(self.B, self.work.V), self.fold()
        room = x.V * x.D * x.stored if self.in_place else R * x.V * x.multiplied
        rows = R * x.D if "hidden" in x.trains else 0
        columns = (B if self.in_place else self.accumulated) * x.D if "weight" in x.trains else 0
        workspace = cost.workspace + room + (rows + columns) * x.wide
        cost += Cost(touched=3 * x.T * x.V * x.multiplied, workspace=workspace)
        return cost + self.gradients()

    def workspace(self, *, sums: bool = False, grads: bool = False) -> Cost:
        x, R, B = self.work, min(self.R, self.work.T), min(self.B, self.work.V)
        tiles = (R * (apart(x.V) if self.held else B)) * x.wide * (2 if x.D_q else 1)
        if sums and self.held:
            tiles += R * B * x.wide  # what is held is read again, so the kernel writes elsewhere
        elif (sums or grads) and x.multiplied != x.wide:
            tiles += R * B * x.multiplied
        widened = (R + B) * (x.D + x.D_q) * x.multiplied if x.multiplied != x.stored else 0
        rows = R * x.D if sums or (grads and "hidden" in x.trains) else 0
        columns = self.accumulated * x.D if grads and "weight" in x.trains else 0
        return Cost(workspace=tiles + widened + (rows + columns) * x.wide)


def low_rank(x: Work, *, backward: bool) -> Cost:
    """low = hidden A^T of a LoRA, which comes before the head, and the way back through it."""
    times = 1 + (backward and x.low_trains) * (("hidden" in x.trains) + ("a" in x.trains))
    return Cost(2 * x.T * x.D * x.r * times)


def cost(schedule: Schedule, there: Pass, back: Pass) -> Cost:
    """Of a call and its backward pass. Lazy makes the gradients in a sweep of its own, `back`."""
    own = low_rank(there.work, backward=schedule != "statistics")
    if schedule in ("statistics", "frozen"):
        return own + there.fold(sums=schedule == "frozen")
    if schedule == "kept":
        return own + there.keeps()
    return own + there.fold() + (there if schedule == "eager" else back).grads()


def backward_work(x: Work) -> Work:
    """What a lazy backward pass sees: the reference only where its divergence carries a gradient."""
    return replace(x, jsd=False, D_q=x.D_q if x.compares else 0)
