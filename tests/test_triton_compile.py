"""Every Triton row kernel, in the configurations that are launched, compiled ahead of time for GPUs that are not here:
no spills, shared memory to spare, and every tile read and written 16 bytes at a time.

Each check has a control that must trip it: a tile too large for the registers, and rows that start anywhere.
"""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compilation and interpretation need separate processes", allow_module_level=True)

from fastpost.kernels import logits, rows, sums  # noqa: E402
from fastpost.kernels.launch import ROWS, Row  # noqa: E402

from ahead import GPUS, Compiled, Gpu, ahead  # noqa: E402

KERNELS = {"fold": rows._fold_kernel, "mixture": rows._mixture_kernel, "grads": rows._grads_kernel}
POINTERS = {"target": "*i64", "bias": "*bf16", "bias_q": "*bf16"}
POINTERS |= dict.fromkeys(("state", "tile", "tile_q", "inverse_temperature", "c"), "*fp32")
SIZES = ("R", "B", "start", "tile_stride", "tile_q_stride", "out_stride")
NUMBERS = ("scale", "softcap", "scale_q", "softcap_q", "log_beta", "log_other")
# The plainest call, the frozen schedule's (which writes the left operand of its product), everything at once, and that
# of a tile too wide to stay in registers.
PLAIN, ALL = sums.slots(set(), False), sums.ALL.value
VARIANTS = {
    "plain": {"SLOTS": PLAIN, "ONCE": True},
    "frozen": {"SLOTS": PLAIN, "ONCE": True, "WRITE": True},
    "everything": {"SLOTS": ALL, "ONCE": True},
    "wide": {"SLOTS": ALL, "ONCE": False},
}
CALLS = [
    *(("fold", variant) for variant in VARIANTS),
    ("mixture", "everything"),
    *(("grads", variant) for variant in ("plain", "everything")),
]


def compiled(
    name: str, gpu: Gpu, variant: str, out: str, entry: Row, tmp_path, varying: tuple[str, ...] = ()
) -> Compiled:
    kernel, everything = KERNELS[name], variant in ("everything", "wide")
    types = POINTERS | {"out": f"*{out}"} | dict.fromkeys(SIZES, "i32") | dict.fromkeys(NUMBERS, "fp32")
    types = {argument: kind for argument, kind in types.items() if argument in kernel.arg_names}
    flags = {argument: everything for argument in kernel.arg_names if argument not in types}
    constants = flags | VARIANTS[variant] | {"BV": entry.BV}
    return ahead(kernel, gpu, types, constants, {"num_warps": entry.num_warps}, tmp_path, varying)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())
@pytest.mark.parametrize(("name", "variant"), CALLS)
def test_no_spills(name, variant, gpu, tmp_path):
    for out in ("bf16", "fp32") if variant == "everything" else ("bf16",):
        result = compiled(name, gpu, variant, out, ROWS[name], tmp_path)
        assert result.spilled == 0
        assert result.shared <= 48 << 10


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())
def test_a_tile_that_cannot_fit_is_seen_to_spill(gpu, tmp_path):
    columns = 16384 if gpu.target.backend == "hip" else 8192
    assert compiled("grads", gpu, "plain", "fp32", Row(columns, 1), tmp_path).spilled > 0


def accesses(result: Compiled) -> tuple[int, int]:
    """16-byte accesses, and narrower loads, of which a row has a few: its target, its sums or its coefficients."""
    return result.count(r"(?:ld|st)\.global\.v4\.b32"), result.count(r"ld\.global\.b(?:16|32|64)")


@pytest.mark.parametrize("name", [name for name in GPUS if name != "gfx942"])
def test_a_tile_is_read_once_and_16_bytes_at_a_time(name, tmp_path):
    gpu, threads = GPUS[name], 32
    for kernel, variant in (("fold", "plain"), ("fold", "frozen"), ("grads", "plain")):
        entry = ROWS[kernel]
        each = entry.BV // entry.num_warps // threads  # numbers of a thread
        read, written = each // 4, 0 if variant == "plain" and kernel == "fold" else each // 8
        wide, narrow = accesses(compiled(kernel, gpu, variant, "bf16", entry, tmp_path))
        assert wide == read + written
        assert narrow <= 6


def test_rows_that_start_anywhere_are_seen_to_be_read_in_pieces(tmp_path):
    result = compiled("fold", GPUS["sm_90"], "plain", "bf16", ROWS["fold"], tmp_path, varying=("tile_stride",))
    wide, narrow = accesses(result)
    assert wide == 0 and narrow > 6


def test_slots_are_those_of_the_torch_kernels():
    from fastpost.core import rows as torch_rows

    places = vars(rows) | vars(logits) | vars(sums)
    for name in (n for n in vars(torch_rows) if n.isupper() and not n.endswith("_ROWS") and n != "LAYOUT"):
        assert places[name].value == getattr(torch_rows, name), name
    assert sums.STATE_ROWS.value == torch_rows.STATE_ROWS
