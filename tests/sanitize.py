"""Every Triton kernel, and the CUDA twin, under NVIDIA's compute-sanitizer: `python tests/sanitize.py`, on a GPU.

memcheck finds accesses out of bounds, racecheck hazards in shared memory. Only our own kernels are watched, launched
here on small, odd shapes. An error is a failure. That the tool is absent, or not made for this GPU, is said, and is
none.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fastpost as fp
from fastpost.core import rows
from fastpost.core.rows import Shape, TorchRows
from fastpost.types import OUTPUTS

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # (under pytest it is there already)
import cuda_rows  # noqa: E402

SOURCES = ROOT / "kernels" / "triton"
TOOLS = ("memcheck", "racecheck")
UNSUPPORTED = "device not supported"  # what they say of a GPU that they may not watch, virtual or too new
T, D, D_Q, V = 13, 24, 10, 301
STATISTICS = tuple(name for name in OUTPUTS if name != "top1")


def triton_names() -> list[str]:
    """Those that are launched: by their names, which other functions of Triton do not have."""
    trees = [ast.parse(path.read_text()) for path in sorted(SOURCES.glob("*.py"))]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if f.name.endswith("_kernel") and f.decorator_list]


def kernel_names() -> list[str]:
    of_cuda = [name for path in cuda_rows.SOURCES for name in re.findall(r"(\w+_kernel)\(", path.read_text())]
    return [*triton_names(), *of_cuda]


def launch(device: torch.device) -> None:
    """Each schedule, in fp32 and bf16, with plain logits and with all that shapes them."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, hidden_q, weight_q = (
            torch.randn(shape, device=device, dtype=dtype) for shape in ((T, D), (V, D), (T, D_Q), (V, D_Q))
        )
        target, bias = torch.randint(V, (T,), device=device), torch.randn(V, device=device, dtype=dtype)
        batch = fp.Batch(target, torch.tensor([T]), advantage=torch.ones(T, device=device))
        for shape in ({}, {"bias": bias, "softcap": 5.0, "scale": 0.5}):
            options = {"temperature": 0.7} if shape else {}
            q = hidden_q, fp.Head(weight_q, **shape)
            leaf, trained = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            stats = fp.token_stats(leaf, fp.Head(trained, **shape), target, outputs=STATISTICS, reference=q, **options)
            sum(getattr(stats, OUTPUTS[name]).sum() for name in STATISTICS).backward()  # lazy
            for head in (trained, weight):  # eager, frozen
                fp.fused_loss(fp.losses.grpo, leaf, fp.Head(head, **shape), batch, **options).backward()


def launch_forward(device: torch.device) -> None:
    """The tile-fused forward, which no schedule calls."""
    from fastpost.kernels.forward import SUPPORTED, Logits, forward_on

    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, hidden_q, weight_q = (
            torch.randn(shape, device=device, dtype=dtype) for shape in ((T, D), (V, D), (T, D_Q), (V, D_Q))
        )
        target, bias = torch.randint(V, (T,), device=device), torch.randn(V, device=device)
        p, q = Logits(hidden, weight, None, 1.0, None), Logits(hidden_q, weight_q, bias, 0.5, 5.0)
        forward, inverse = forward_on(device), torch.full((T,), 1.4, device=device)
        for policy, wants, reference in ((p, {"entropy"}, None), (q, {"mean_logp"}, None), (p, SUPPORTED, q)):
            if forward.takes(wants, reference is not None):
                forward.state(policy, target, inverse, wants, reference)


def launch_twin(twin: cuda_rows.CudaRows, device: torch.device) -> None:
    """The CUDA row kernels, each instantiation of them."""
    tile, tile_q, c = (torch.randn(shape, device=device) for shape in ((T, V), (T, V), (rows.COEFFICIENT_ROWS, T)))
    target, bias = torch.randint(V, (T,), device=device), torch.randn(V, device=device)
    for shape in (Shape(None, 1.0, None), Shape(bias, 0.5, 5.0)):
        for wants in ({"entropy"}, {"log_sum_sq", "logp@1"}, {"reverse_kl", "forward_kl", "jsd"}):
            q = (tile_q, shape) if "jsd" in wants else (None, None)
            for out in (None, torch.empty_like(tile), torch.empty_like(tile, dtype=torch.bfloat16)):
                state = rows.new_state(T, device, tile.dtype)
                twin.fold(state, tile, target, 0, shape, None, wants, *q, out)
                if out is not None:
                    twin.grads(tile, target, 0, shape, None, c, wants, out, *q)


def launch_all(device: torch.device) -> None:
    launch(device)
    launch_forward(device)
    for twin in cuda_rows.candidates(device, TorchRows()).values():
        launch_twin(twin, device)


def find() -> str | None:
    beside = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(beside))


def command(sanitizer: str, tool: str) -> list[str]:
    watched = [word for name in kernel_names() for word in ("--kernel-name", f"kns={name}")]
    return [sanitizer, "--tool", tool, "--error-exitcode", "1", *watched, sys.executable, __file__, "--launch"]


def watch(sanitizer: str, tool: str) -> int:
    """The exit code of a tool, 0 where it cannot watch."""
    # An allocation of its own for each tensor: in torch's pool one that runs over its end meets the next.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    words = command(sanitizer, tool)
    found = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(found.stdout, end="")
    unsupported = found.returncode != 0 and UNSUPPORTED in found.stdout.lower()
    verdict = f"failed with exit code {found.returncode}" if found.returncode else "no error"
    print(f"compute-sanitizer, {tool}: {'does not take this device, skipped' if unsupported else verdict}", flush=True)
    return 0 if unsupported else found.returncode


def main(argv: Sequence[str] | None = None) -> int:
    if "--launch" in (sys.argv[1:] if argv is None else argv):
        launch_all(torch.device("cuda"))
        torch.cuda.synchronize()
        return 0
    sanitizer = find()
    if sanitizer is None:
        print("compute-sanitizer: not found, skipped")
        return 0
    # Compiles, so that the tools below find the kernels where they are cached.
    launch_all(torch.device("cuda"))
    return max([watch(sanitizer, tool) for tool in TOOLS], key=abs)


if __name__ == "__main__":
    sys.exit(main())
