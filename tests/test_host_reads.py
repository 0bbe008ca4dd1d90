"""A packed batch is never waited for, shown without a GPU: a tensor on `meta` has no numbers, and to read one raises.

Everything runs there as on an accelerator, but for torch's own row kernels in place of Triton's; tests/test_gpu.py
counts the waits of a real one.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

import fastpost as fp
from fastpost import losses
from fastpost.packing import Example, pack
from problems import schedules_of

S, L, D, V = 4, 16, 8, 50
CASES = {
    "sft": (losses.sft, {}),
    "grpo": (losses.grpo, {"beta": 0.04, "entropy_coef": 0.01}),
    "gspo": (losses.gspo, {}),
    "dpo": (losses.dpo, {}),
    "kto": (losses.kto, {}),
}


@pytest.fixture(autouse=True)
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """autocast does not know of the device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def operands(dtype: torch.dtype, trained: bool) -> tuple[torch.Tensor, torch.Tensor]:
    like = {"device": "meta", "dtype": dtype}
    return torch.empty(S * L, D, **like, requires_grad=True), torch.empty(V, D, **like, requires_grad=trained)


def packed() -> fp.Batch:
    """On the host: the second half of each sequence is predicted."""
    examples = [Example(torch.randint(V, (L,)).tolist(), [i >= L // 2 for i in range(L)]) for _ in range(S)]
    values = torch.randn(3, S * L)
    fields = {"label": torch.arange(S) % 2 == 0, "kl": torch.tensor(0.5)}
    return pack(examples, old_logp=values[0], ref_logp=values[1], advantage=values[2], **fields).batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_a_packed_batch_is_never_read(case, trained, dtype):
    (loss, knobs), (hidden, weight) = CASES[case], operands(dtype, trained)
    asked = {"outputs": ("entropy", "top1"), "return_stats": True}
    total, stats = fp.fused_loss(loss, hidden, weight, packed().to("meta"), temperature=0.7, **asked, **knobs)
    assert schedules_of(total) <= {"FrozenLogp", "EagerLoss"}
    total.backward()
    assert hidden.grad.shape == hidden.shape and stats.entropy.shape == (S * L,)


def test_any_other_is_and_it_is_seen():
    hidden, weight = operands(torch.float32, True)
    raw = fp.Batch(torch.empty(S * L, device="meta", dtype=torch.int64), torch.full((S,), L))
    with pytest.raises((RuntimeError, NotImplementedError), match="out of meta tensor"):
        fp.fused_loss(losses.sft, hidden, weight, raw)
