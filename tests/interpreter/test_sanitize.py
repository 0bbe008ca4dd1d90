"""The script that compute-sanitizer watches launches every kernel there is."""

import os

import pytest
import torch

import sanitize
from fastpost.core import sweep

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from fastpost.kernels import forward, rows
from fastpost.kernels.launch import Product


class Launched:
    """A kernel that leaves its name."""

    def __init__(self, kernel, name: str, names: set[str]):
        self.kernel, self.name, self.names = kernel, name, names

    def __getitem__(self, grid):
        self.names.add(self.name)
        return self.kernel[grid]


def test_every_kernel_is_launched(monkeypatch):
    launched: set[str] = set()
    for name in sanitize.triton_names():
        module = rows if hasattr(rows, name) else forward
        monkeypatch.setattr(module, name, Launched(getattr(module, name), name, launched))
    monkeypatch.setattr(sweep, "row_kernels", lambda device, dtype: rows.TritonRows())
    monkeypatch.setattr("fastpost.core.gemm.native_products", lambda dtype, device: None)
    tables = dict.fromkeys(("plain", "one", "two", "fp32"), Product(16, 64, 16, 4, 2))
    monkeypatch.setattr(forward, "forward_on", lambda device: forward.TritonForward(tables, True, 3))
    sanitize.launch(torch.device("cpu"))
    sanitize.launch_forward(torch.device("cpu"))
    assert launched == set(sanitize.triton_names()) and len(launched) >= 5
