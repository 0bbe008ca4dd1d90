"""Kernels compiled ahead of time for GPUs that are not here, and what their vendors' tools say of the result."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Gpu(NamedTuple):
    target: GPUTarget
    shared: int  # bytes that one program may have
    products: str  # the instruction with which it multiplies 16-bit matrices, as a regular expression


GPUS = {
    "sm_80": Gpu(GPUTarget("cuda", 80, 32), 163 << 10, r"mma\.sync"),
    "sm_89": Gpu(GPUTarget("cuda", 89, 32), 99 << 10, r"mma\.sync"),
    "sm_90": Gpu(GPUTarget("cuda", 90, 32), 227 << 10, r"wgmma\.mma_async"),
    "sm_100": Gpu(GPUTarget("cuda", 100, 32), 227 << 10, r"tcgen05\.mma"),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 64 << 10, r"v_mfma_\w+_bf16"),
}


@dataclass(frozen=True)
class Compiled:
    text: str  # PTX or AMD's assembly
    spilled: int  # bytes of registers that did not fit, as the vendor's tool reports them
    shared: int  # bytes

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.text))


def ahead(
    kernel,
    gpu: Gpu,
    types: Mapping[str, str],  # of the arguments that are passed
    constants: Mapping[str, object],
    options: Mapping[str, int],
    tmp_path: Path,
    varying: Collection[str] = (),
) -> Compiled:
    """As a launch compiles it for pointers and sizes that are divisible by 16, but for sizes that are `varying`."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert all(t != "constexpr" or name in constants for name, t in signature.items()), signature
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (parameter, kind) in enumerate(zip(kernel.params, signature.values(), strict=True))
        if kind.startswith("*") or (kind == "i32" and not parameter.do_not_specialize and parameter.name not in varying)
    }
    known = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(kernel, signature, constexprs=known, attrs=aligned)
    binary = triton.compile(source, target=gpu.target, options={**options, "enable_fp_fusion": True})
    if gpu.target.backend == "hip":
        text = binary.asm["amdgcn"]
        return Compiled(text, _spilled_by_amd(text), binary.metadata.shared)
    return Compiled(binary.asm["ptx"], _spilled_by_nvidia(binary.asm["cubin"], tmp_path), binary.metadata.shared)


def _spilled_by_amd(text: str) -> int:
    names = (".vgpr_spill_count", ".sgpr_spill_count", ".private_segment_fixed_size")
    return sum(int(n) for name in names for n in re.findall(rf"{re.escape(name)}:\s+(\d+)", text))


def _spilled_by_nvidia(cubin: bytes, tmp_path: Path) -> int:
    """STACK; LOCAL is always 0 and proves nothing."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    (stack,) = re.findall(r"STACK:(\d+)", report.stdout + report.stderr)
    return int(stack)
