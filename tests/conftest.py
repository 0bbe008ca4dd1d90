"""What every test gets: a seed and poisoned memory. By name: `device`, `tiles`; `saved`, a tiny model;
`emulated`, the CUDA row kernels for a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(str(ROOT / folder) for folder in ("fastpost", "kernels"))
ALLOCATORS = (
    *((torch, name) for name in ("empty", "empty_like", "empty_strided")),
    *((Tensor, name) for name in ("new_empty", "new_empty_strided")),
)


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same allocator, except that memory handed to our own files holds NaN, or the most negative integer."""

    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if sys._getframe(1).f_code.co_filename.startswith(OURS):
            _poison(tensor)
        return tensor

    return wrapper


def _poison(tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.detach().fill_(float("nan"))
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).min)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` returns whatever was there before, often plausible numbers: reading them must fail loudly."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine; the cuda ones (ROCm's too) carry the `gpu` mark."""
    return torch.device(request.param)


@pytest.fixture(params=["one tile", "many tiles", "many tiles in torch"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the head visits the logits, and whether products and row kernels are those of this machine or torch's."""
    from fastpost.core.rows import TorchRows
    from problems import small_tiles

    if request.param != "one tile":
        small_tiles(monkeypatch)
    if request.param == "many tiles in torch":
        monkeypatch.setattr("fastpost.core.sweep.row_kernels", lambda device, dtype: TorchRows())
        monkeypatch.setattr("fastpost.core.gemm.native_products", lambda dtype, device: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a directory: some trainers load their reference from where the policy came from."""
    import tiny

    path = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of them."""
    import emulation

    if emulation.compiler() is None:
        pytest.skip("needs g++")
    return emulation.build(tmp_path_factory.mktemp("emulated") / "rows.so")
