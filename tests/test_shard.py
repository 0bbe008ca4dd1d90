"""A head whose vocabulary is spread over two processes is the head in one piece: every output, gradient and schedule.

Both ranks run every case before any test; a test then puts the ranks' gradients together, where each has some rows, or
finds them equal, and judges them against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastpost as fp
from fastpost.core.door import open_door
from fastpost.core.eager import eager_sweep
from fastpost.types import Head, LowRank, Shard
from loss_problems import CASES, fused, longest_unit, setting
from problems import (
    DIVERGENCES,
    OWN,
    Problem,
    assert_measured_exact,
    assert_measured_loss_exact,
    gradients,
    measured,
    ours,
    problem,
    random_upstream,
    schedules_of,
    small_tiles,
    small_workspace,
    stat,
)
from ranks import RANKS, two_processes

SIZES = {201: (64, 137), 200: (100, 100)}  # rows of each rank, by vocabulary
ROWS_OF_VOCABULARY = ("weight", "bias", "b0", "b1")  # the leaves that a rank has a part of
OUTPUTS = (*OWN, "top1")


# ---- what the ranks do ----


def piece(head: Head) -> Head:
    """This rank's rows of a head, as leaves of its own."""
    sizes = SIZES[len(head.weight)]
    first = sum(sizes[: dist.get_rank()])
    rows = lambda x: None if x is None else leaf(x[first : first + sizes[dist.get_rank()]], x)  # noqa: E731
    lora = tuple(replace(each, b=rows(each.b)) for each in head.lora)
    weight = rows(head.weight)
    return replace(head, weight=weight, bias=rows(head.bias), lora=lora, shard=Shard.of(weight))


def leaf(part: Tensor, of: Tensor) -> Tensor:
    return part.detach().clone().requires_grad_(of.requires_grad)


def in_pieces(p: Problem) -> Problem:
    if isinstance(p.reference, tuple):
        p = replace(p, reference=(p.reference[0], piece(p.reference[1])))
    return replace(p, head=piece(p.head))


def with_reference(p: Problem) -> Problem:
    V, dtype = len(p.head.weight), p.hidden.dtype
    hidden = torch.randn(len(p.hidden), 9).to(dtype)
    q = Head(torch.randn(V, 9).to(dtype), torch.randn(V).to(dtype), scale=0.5)
    return replace(p, reference=(hidden, q), jsd_beta=0.3)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "float64": lambda: problem(torch.float64, V=201),
    "fp32": lambda: problem(V=201),
    "bf16": lambda: problem(torch.bfloat16, V=201),
    "one token": lambda: problem(V=201, T=1),
    "bias": lambda: problem(V=201, bias=True),
    "cap and scale": lambda: problem(V=201, bias=True, softcap=5.0, scale=1.7),
    "temperature": lambda: problem(V=201, temperature=torch.rand(13) + 0.5),
    "large logits": lambda: problem(V=201, std=2000.0),
    "banned": lambda: banned(problem(V=201, bias=True)),
    "lora": lambda: problem(V=201, ranks=(4,)),
    "lora, only A trains": lambda: problem(V=201, ranks=(4,), softcap=5.0),
    "two adapters, capped": lambda: problem(V=201, bias=True, ranks=(4, 2), softcap=5.0, temperature=0.7),
    "first has no target": lambda: of_rank(problem(V=201), 1),
    "second has no target": lambda: of_rank(problem(V=201), 0),
}


def banned(p: Problem) -> Problem:
    """All that the first rank has, but for a token, has no probability."""
    bias = p.head.bias.detach().clone()
    bias[1 : SIZES[201][0]] = -1e4
    return replace(of_rank(p, 1), head=replace(p.head, bias=bias.requires_grad_()))


def of_rank(p: Problem, rank: int) -> Problem:
    sizes = SIZES[201]
    return replace(p, target=p.target % sizes[rank] + sum(sizes[:rank]))


def made(case: str, trained: bool) -> Problem:
    torch.manual_seed(0)
    p = with_reference(PROBLEMS[case]())
    p = p.to(p.hidden.dtype, train_head=trained)
    for adapter in p.head.lora if case == "lora, only A trains" else ():
        adapter.b.requires_grad_(False)
    return p


def statistics(case: str, trained: bool, outputs: tuple[str, ...]) -> dict:
    p = made(case, trained)
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch)
        return measured(in_pieces(p), outputs, random_upstream(p))


LOSSES = ("sft, all", "dpo", "grpo, all", "gspo", "aot", "kto", "kd", "gkd", "entropic", "distant", "spread")
LOSS_CASES = [(name, trained, rows) for name in LOSSES for trained in (True, False) for rows in (8, 60)]
LOSS_CASES += [(name, trained, 4096) for name in ("aot", "spread") for trained in (True, False)]  # one unit, all in all


def loss_of(name: str, trained: bool, rows: int) -> tuple[Tensor, dict[str, Tensor], set[str]]:
    (loss, knobs), (p, batch) = CASES[name], loss_problem(name, trained)
    p = in_pieces(p)
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, rows=rows)
        total = fused(loss, p, batch, **knobs)
        return total.detach(), gradients(total, torch.ones_like(total), p), schedules_of(total)


def loss_problem(name: str, trained: bool) -> tuple[Problem, fp.Batch]:
    torch.manual_seed(0)
    return setting(CASES[name][0], train_head=trained)


def all_ignored() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    p = in_pieces(made("fp32", True))
    return measured(replace(p, target=torch.full_like(p.target, -100)), (*OWN, *DIVERGENCES), random_upstream(p))


def twice() -> list[tuple[Tensor, dict[str, Tensor]]]:
    p = in_pieces(made("bf16", True))
    upstream = torch.ones(len(p.target))
    return [measured(p, ("entropy",), upstream)["entropy"] for _ in range(2)]


def by_torch(patch: pytest.MonkeyPatch) -> None:
    """A workspace holds as many rows with the native extension as without."""
    patch.setattr("fastpost.core.gemm.native_products", lambda dtype, device: None)


def moved(call: Callable[[], Tensor], workspace: int = 1 << 20) -> tuple[list[int], list[int]]:
    """How many numbers each collective of a call moves, and of its backward pass."""
    calls, reduce = [], dist.all_reduce

    def counted(x: Tensor, *args, **kwargs):
        calls.append(x.numel())
        return reduce(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch)
        small_workspace(patch, workspace)
        by_torch(patch)
        patch.setattr(dist, "all_reduce", counted)
        value = call()
        forward = list(calls)
        value.sum().backward()
    return forward, calls[len(forward) :]


def traffic() -> dict[str, tuple[list[int], list[int]]]:
    trained, frozen = (in_pieces(made("fp32", trains)) for trains in (True, False))
    return {
        "lazy": moved(lambda: ours(trained, ("logp",)).logp),
        "frozen": moved(lambda: ours(frozen, ("logp",)).logp),
        "held": moved(lambda: ours(trained, ("jsd",)).jsd, workspace=27_900),
    }


def eager_rows() -> list[int]:
    """Of a chunk whose logits are held, and of one that is kept, each beside a trained weight; small ones."""
    p = in_pieces(made("fp32", True))
    door = open_door(p.hidden, p.head, p.target, ("logp",), None, 1.0, 0.5, -100)
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, columns=64)
        small_workspace(patch, 8_000)
        by_torch(patch)
        patch.setattr("fastpost.core.eager._in_place", lambda sweep: False)
        return [eager_sweep(door.problem, door.operands, kept=kept).rows_each for kept in (False, True)]


def refusals() -> dict[str, str]:
    p, whole = in_pieces(made("lora", True)), made("lora", True)
    teacher = fp.TopK(torch.zeros(13, 1, dtype=torch.int64), torch.zeros(13, 1))
    dropping = LowRank(p.head.lora[0].a, p.head.lora[0].b, dropout=0.1)
    calls = {
        "top-k": lambda: ours(replace(p, reference=teacher), ("forward_kl",)),
        "whole reference": lambda: ours(replace(p, reference=whole.reference), ("forward_kl",)),
        "sharded reference": lambda: ours(replace(whole, reference=p.reference), ("forward_kl",)),
        "rows": lambda: Head(whole.head.weight, shard=p.head.shard),
        "dropout": lambda: replace(p.head, lora=(dropping,)),
        "ranks": lambda: Shard((1, 2, 3)),
        "empty": lambda: Shard((201, 0)),
        "target": lambda: ours(replace(p, target=p.target + 201), ("logp",)),
    }
    return {name: message(call) for name, call in calls.items()}


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def on_rank(rank: int) -> dict:
    return {
        "statistics": {(case, True): statistics(case, True, (*OWN, *DIVERGENCES)) for case in PROBLEMS},
        "frozen": {(case, False): statistics(case, False, ("logp", "jsd")) for case in PROBLEMS},
        "losses": {case: loss_of(*case) for case in LOSS_CASES},
        "ignored": all_ignored(),
        "twice": twice(),
        "traffic": traffic(),
        "eager rows": eager_rows(),
        "refusals": refusals(),
        "top1": ours(in_pieces(made("fp32", True)), ("top1",)).top1,
        "shard": Shard.of(torch.empty(rank + 1, 1)).sizes,
    }


# ---- what is made of it ----


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return two_processes(on_rank, tmp_path_factory.mktemp("ranks"), seconds=150.0)


def whole(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients of the head in one piece."""
    together = {}
    for name, mine in parts[0].items():
        each = [part[name] for part in parts]
        if name not in ROWS_OF_VOCABULARY:
            assert torch.equal(*each), f"the ranks differ in d{name}"
        together[name] = torch.cat(each) if name in ROWS_OF_VOCABULARY else mine
    return together


def put_together(found: list[dict], *path: object) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    ranks = found
    for key in path:
        ranks = [rank[key] for rank in ranks]
    together = {}
    for name, (value, _) in ranks[0].items():
        assert torch.equal(value, ranks[1][name][0]), f"the ranks differ in {name}"
        together[name] = value, whole([rank[name][1] for rank in ranks])
    return together


@pytest.mark.parametrize("case", PROBLEMS)
def test_statistics_and_gradients_are_those_of_one_piece(found, case):
    p = made(case, True)
    assert_measured_exact(p, put_together(found, "statistics", (case, True)), random_upstream(p))


@pytest.mark.parametrize("case", PROBLEMS)
def test_with_a_frozen_weight_too(found, case):
    """logp takes the frozen schedule, unless an adapter's B trains; the JSD the lazy one."""
    p = made(case, False)
    assert_measured_exact(p, put_together(found, "frozen", (case, False)), random_upstream(p))


@pytest.mark.parametrize(("name", "trained", "rows"), LOSS_CASES)
def test_every_schedule_is_that_of_one_piece(found, name, trained, rows):
    (loss, knobs), (p, batch) = CASES[name], loss_problem(name, trained)
    (total, first, schedule), (other, second, _) = (rank["losses"][name, trained, rows] for rank in found)
    assert torch.equal(total, other)
    expected = "EagerLoss" if longest_unit(loss) <= rows else "LazyStats"
    if loss.bind(**knobs).differentiates == ("logp",) and not trained:
        expected = "FrozenLogp"
    assert schedule == {expected}
    assert_measured_loss_exact(total, whole([first, second]), loss, p, batch, name, **knobs)


def test_with_every_target_ignored_all_is_zero(found):
    for name, (value, grads) in put_together(found, "ignored").items():
        assert not value.any(), name
        assert not any(g.any() for g in grads.values()), name


def test_top1_is_of_the_whole_vocabulary(found):
    want = stat(ours(made("fp32", True), ("top1",)), "top1")
    assert torch.equal(found[0]["top1"], want)
    assert torch.equal(found[1]["top1"], want)


def test_the_same_call_gives_the_same_bits(found):
    for rank in found:
        (value, grads), (again, grads_again) = rank["twice"]
        assert torch.equal(value, again)
        assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_two_small_collectives_a_chunk_and_one_gradient_of_the_hidden_states(found):
    D, chunks = 16, (5, 5, 3)
    small, large = [(3 * rows, 14 * rows) for rows in chunks], [(D * rows,) for rows in chunks]
    for rank in found:
        assert rank["traffic"]["lazy"] == (flat(small), flat(large))
        assert rank["traffic"]["frozen"] == (flat(a + b for a, b in zip(small, large, strict=True)), [])


def test_uneven_shards_cut_the_same_chunks(found):
    """27900 bytes hold 4 whole rows of the longer shard, and would hold 5 of the shorter."""
    for rank in found:
        forward, _ = rank["traffic"]["held"]
        assert forward == flat((3 * rows, 14 * rows, 2 * rows) for rows in (4, 4, 4, 1))


def test_uneven_shards_have_room_for_the_same_rows_where_a_weight_trains(found):
    """What the gradient of the longer shard will take may be filled on both."""
    first, second = (rank["eager rows"] for rank in found)
    assert first == second and all(1 < rows < 13 for rows in first), (first, second)


def flat(numbers: Iterable[tuple[int, ...]]) -> list[int]:
    return [n for each in numbers for n in each]


def test_a_shard_asks_the_ranks_for_their_sizes(found):
    assert [rank["shard"] for rank in found] == [(1, 2)] * RANKS


REFUSALS = {
    "top-k": "reference must be .hidden_q, head_q. where the head is sharded, got a TopK",
    "whole reference": "the reference's head must be sharded as the policy's is, got None beside Shard",
    "sharded reference": "the reference's head must be sharded as the policy's is, got Shard.* beside None",
    "rows": r"head.shard gives rank . \d+ rows, got head.weight .201, 16.",
    "dropout": "head.lora of a sharded head must have dropout 0",
    "ranks": r"one entry for each rank of its group.* got \(1, 2, 3\) for 2 ranks, here rank",
    "empty": r"positive row counts, one for each rank, got \(201, 0\)",
    "target": r"target must be in \[0, 201\), the vocabulary of the head",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(found, what):
    for rank in found:
        with pytest.raises(ValueError, match=REFUSALS[what]):
            raise ValueError(rank["refusals"][what])


def test_without_processes_there_is_no_shard():
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group"):
        Shard((3,))
