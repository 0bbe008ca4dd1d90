"""The Triton row kernels, run by Triton's interpreter on the CPU: the numerics contract.

Run as a process of its own, TRITON_INTERPRET=1 pytest tests/interpreter: the switch is read when a kernel is decorated.
"""

import os
from dataclasses import replace

import pytest
import torch

import fastpost as fp
from fastpost.core import rows as row_math
from fastpost.core import sweep
from fastpost.core.rows import Shape, TorchRows
from fastpost.types import OUTPUTS
from problems import assert_loss_exact
from problems import problem as head_problem
from rules import assert_close_to_truth, assert_gradient_close_to_truth

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from fastpost.kernels.launch import Row
from fastpost.kernels.rows import TritonRows

STATISTICS = [name for name in OUTPUTS if name != "top1"]


@pytest.fixture
def triton_rows(monkeypatch):
    monkeypatch.setattr(sweep, "row_kernels", lambda device, dtype: TritonRows())
    monkeypatch.setattr("fastpost.core.gemm.native_products", lambda dtype, device: None)


def problem(T: int, D: int, V: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    weight, bias = draw(V, D) * 0.5, draw(V)
    bias[V // 2] = -torch.inf if V > 2 else 0.0
    target = torch.randint(V, (T,), generator=g)
    target = torch.where(target == V // 2, 0, target)
    return draw(T, D), weight, bias, target, (draw(T, 2 * D + 1), draw(V, 2 * D + 1) * 0.3), 0.5 + draw(T).square()


def run(hidden, head, target, reference_q, temperature, name):
    leaves = [hidden.clone().requires_grad_(), head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()]
    stats = fp.token_stats(
        leaves[0],
        fp.Head(leaves[1], leaves[2], head.softcap, head.scale),
        target,
        outputs=(name, "top1"),
        reference=reference_q,
        temperature=temperature,
        jsd_beta=0.3,
    )
    value = getattr(stats, OUTPUTS[name])
    upstream = torch.linspace(-1, 1, len(value))
    return value.detach(), stats.top1, torch.autograd.grad((value * upstream).sum(), leaves)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize(("T", "D", "V"), [(1, 3, 1), (64, 5, 7), (16, 9, 509)], ids=["one", "small", "prime"])
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["", "capped"])
def test_every_statistic_is_close_to_truth(monkeypatch, name, T, D, V, softcap):
    """That of torch's row kernels in float64: with a token banned there is none on plain logits."""
    monkeypatch.setitem(sweep.COLUMNS, "cpu", 128)  # several blocks: the running maximum moves between kernel launches

    def by(kernels, dtype):
        monkeypatch.setattr(sweep, "row_kernels", lambda *_: kernels())
        monkeypatch.setattr("fastpost.core.gemm.native_products", lambda dtype, device: None)
        hidden, weight, bias, target, (hidden_q, weight_q), temperature = problem(T, D, V, dtype=dtype)
        q = hidden_q, fp.Head(weight_q, None, softcap, 0.9)
        return run(hidden, fp.Head(weight, bias, softcap, 1.3), target, q, temperature, name)

    truth, top1, truths = by(TorchRows, torch.float64)
    single, _, singles = by(TorchRows, torch.float32)
    value, same_top1, grads = by(TritonRows, torch.float32)
    assert torch.equal(same_top1, top1)
    assert_close_to_truth(value, single, truth, name)
    for gradients in zip(grads, singles, truths, strict=True):
        assert_gradient_close_to_truth(*gradients, name=f"d{name}")


@pytest.mark.parametrize("name", ["sft", "grpo", "gspo", "dpo"])
@pytest.mark.parametrize("frozen", [False, True])
def test_losses_are_close_to_truth(triton_rows, name, frozen):
    S, L, D, V = 4, 5, 8, 61
    p = head_problem(T=S * L, D=D, V=V).to(torch.float32, train_head=not frozen)
    loss = getattr(fp.losses, name)
    batch = fp.Batch(
        p.target.index_fill(0, torch.arange(0, S * L, 4), -100),
        torch.full((S,), L),
        old_logp=torch.full((S * L,), -4.0),
        ref_logp=torch.full((S * L,), -4.2),
        advantage=torch.tensor([1.0, -1.0, 0.5, 2.0]),
    )
    batch = replace(batch, weight=torch.rand(batch.units(loss.unit)))
    assert_loss_exact(fp.fused_loss(loss, p.hidden, p.head, batch, outputs=("entropy",)), loss, p, batch, name)


def test_a_target_outside_the_tile_touches_nothing(triton_rows):
    hidden, weight, _, _, _, _ = problem(3, 4, 40)
    ids = torch.tensor([0, 15, 39])
    logp = fp.linear_logprobs(hidden, weight, ids)
    torch.testing.assert_close(logp, (hidden @ weight.T).log_softmax(1).gather(1, ids[:, None])[:, 0])


def test_logp_is_exact_to_1e_5_over_a_real_vocabulary(triton_rows):
    T, D, V = 32, 1024, 131072
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, D, generator=g).bfloat16()
    weight = (torch.randn(V, D, generator=g) * 3 / D**0.5).bfloat16()
    target = torch.randint(V, (T,), generator=g)
    logits = torch.cat([hidden.double() @ block.double().T for block in weight.split(8192)], 1)
    assert 2.5 < logits.std() < 3.5
    truth = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)
    assert (fp.linear_logprobs(hidden, weight, target).double() - truth).abs().max() <= 1e-5


@pytest.mark.parametrize("columns", [4096, 32], ids=["in registers", "read again"])
def test_a_fold_writes_its_left_operand_at_the_maximum_of_the_whole_tile(columns):
    narrow = TritonRows({"fold": Row(columns, 4)})
    g = torch.Generator().manual_seed(2)
    tile, target, inverse = torch.randn(5, 203, generator=g) * 4, torch.randint(203, (5,), generator=g), torch.rand(5)
    shape, wants = Shape(torch.randn(203, generator=g), 0.7, 3.0), frozenset({"entropy", "mean_logp"})
    states, outs = [], []
    for kernels, dtype in ((narrow, torch.float32), (TorchRows(), torch.float32), (TorchRows(), torch.float64)):
        state, out = row_math.new_state(5, tile.device, dtype), torch.empty_like(tile, dtype=dtype)
        kernels.fold(state, tile.to(dtype), target, 0, shape, inverse.to(dtype), wants, None, None, out)
        states.append(row_math.finish(state, wants, 203, inverse.to(dtype)))
        outs.append(out)
    assert_gradient_close_to_truth(*outs, name="left operand")
    for name in ("logp", "entropy", "mean_logp"):
        assert_close_to_truth(*(state[name] for state in states), name=name)
