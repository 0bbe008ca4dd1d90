"""The script that compute-sanitizer watches launches every kernel there is."""

import os

import pytest
import torch

import sanitize
from fastpost import sweep

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from fastpost.kernels import rows


class Launched:
    """A kernel that leaves its name."""

    def __init__(self, kernel, name: str, names: set[str]):
        self.kernel, self.name, self.names = kernel, name, names

    def __getitem__(self, grid):
        self.names.add(self.name)
        return self.kernel[grid]


def test_every_kernel_is_launched(monkeypatch):
    launched: set[str] = set()
    for name in sanitize.kernel_names():
        monkeypatch.setattr(rows, name, Launched(getattr(rows, name), name, launched))
    monkeypatch.setattr(sweep, "row_kernels", lambda device, dtype: rows.TritonRows())
    sanitize.launch(torch.device("cpu"))
    assert launched == set(sanitize.kernel_names()) and len(launched) >= 3
