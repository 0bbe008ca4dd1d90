"""float16 under a loss scale, where tiles are as narrow as operands: gradients are as good as torch's own in fp16.

Where products take fp16 (a GPU), dL/dlogits is rounded to it before it is multiplied. Of a mean over many tokens it
lies far below what fp16 can hold, 6e-8, until a loss scale has multiplied it, so it may not be made before backward is
called. A CPU widens its operands: here one is made to behave as the other.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost import losses
from fastpost.core import sweep
from fastpost.core.gemm import Gemm
from problems import comparisons, gradients, plain_loss, problem
from rules import assert_gradient_close_to_truth

T, D, V = 2048, 32, 8192
SCALE = 65536.0  # at which torch.amp's GradScaler begins; fp16 itself ends before


class Narrow(Gemm):
    """Tiles in the dtype of the operands; accumulators as wide as ever."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        super().__init__(dtype, device)
        self.tile_dtype, self._widens = dtype, False

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return torch.mm(a.to(out.dtype), b.to(out.dtype).T, out=out)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
        b = b.to(a.dtype).to(total.dtype)
        torch.addmm(total, a.to(total.dtype), b, beta=0 if fresh else 1, out=total)


@fp.loss(unit="token", reads=("logp", "entropy"))
def bonus(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return -stats.logp - 0.1 * stats.entropy


@pytest.mark.parametrize("loss", [losses.sft, bonus], ids=["sft", "logp and entropy"])
def test_a_scaled_loss_has_torchs_own_gradients(loss, monkeypatch):
    monkeypatch.setattr(sweep, "Gemm", Narrow)
    p = problem(torch.float16, T=T, D=D, V=V)
    batch = fp.Batch(p.target, torch.tensor([T]), weight=torch.full((T,), 1 / T))
    got = gradients(fp.fused_loss(loss, p.hidden, p.head, batch), torch.tensor(SCALE), p)
    (truth, _, same), scaled = comparisons(p), replace(batch, weight=batch.weight * SCALE)
    want, yardstick = (gradients(plain_loss(loss, x, scaled), torch.tensor(1.0), x) for x in (truth, same))
    for leaf, gradient in got.items():
        assert gradient.dtype == torch.float16
        assert_gradient_close_to_truth(gradient, yardstick[leaf], want[leaf], f"d{loss.name}/d{leaf}")
