"""Every Triton kernel, in the configurations that are launched, compiled ahead of time for GPUs that are not here: no
spills.

On NVIDIA a spill shows as STACK in cuobjdump's resource report (LOCAL is always 0 and proves nothing); on AMD in the
kernel's own metadata. A tile too large for the registers is the control: it must trip the check, or the check is worth
nothing.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compilation and interpretation need separate processes", allow_module_level=True)

from fastpost.kernels import rows  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {"fold": rows._fold_kernel, "mixture": rows._mixture_kernel, "grads": rows._grads_kernel}
INTEGERS = {"R", "B", "start", "tile_stride", "tile_q_stride", "out_stride"}
NUMBERS = {"scale", "softcap", "scale_q", "softcap_q", "log_beta", "log_other"}
# The plainest call, the frozen schedule's (which writes the left operand of its product), and everything at once.
VARIANTS = {"plain": set(), "frozen": {"WRITE"}, "everything": None}


def compiled(kernel, target: GPUTarget, on: set[str] | None, out: str, launch: dict[str, int]):
    signature, constants = {}, {}
    for name in kernel.arg_names:
        if name == "BV":
            signature[name], constants[name] = "constexpr", launch["BV"]
        elif name.isupper() and name not in INTEGERS:
            signature[name], constants[name] = "constexpr", on is None or name in on
        elif name in INTEGERS:
            signature[name] = "i32"
        elif name in NUMBERS:
            signature[name] = "fp32"
        else:
            signature[name] = {"out": f"*{out}", "target": "*i64", "bias": "*bf16", "bias_q": "*bf16"}.get(
                name, "*fp32"
            )
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": launch["num_warps"], "enable_fp_fusion": True})


def spills(binary, target: GPUTarget, tmp_path: Path) -> int:
    """Bytes of registers spilled, as the vendor's own tools report them."""
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        names = (".vgpr_spill_count", ".sgpr_spill_count", ".private_segment_fixed_size")
        return sum(int(n) for name in names for n in re.findall(rf"{re.escape(name)}:\s+(\d+)", text))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    (stack,) = re.findall(r"STACK:(\d+)", report.stdout + report.stderr)
    return int(stack)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize(
    ("kernel", "variant"),
    [
        ("fold", "plain"),
        ("fold", "frozen"),
        ("fold", "everything"),
        ("mixture", "everything"),
        ("grads", "plain"),
        ("grads", "everything"),
    ],
)
def test_no_spills(kernel, variant, target, tmp_path):
    for out in ("bf16", "fp32") if variant == "everything" else ("bf16",):
        binary = compiled(KERNELS[kernel], target, VARIANTS[variant], out, rows.LAUNCH[kernel])
        assert spills(binary, target, tmp_path) == 0
        assert binary.metadata.shared <= 48 << 10


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_a_tile_that_cannot_fit_is_seen_to_spill(target, tmp_path):
    binary = compiled(KERNELS["grads"], target, VARIANTS["plain"], "fp32", {"BV": 16384, "num_warps": 1})
    assert spills(binary, target, tmp_path) > 0


def test_slots_are_those_of_the_torch_kernels():
    from fastpost import rows as torch_rows

    for name in (n for n in vars(torch_rows) if n.isupper() and not n.endswith("_ROWS") and n != "LAYOUT"):
        value = getattr(rows, name)
        assert getattr(value, "value", value) == getattr(torch_rows, name), name
