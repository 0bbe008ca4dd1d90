"""The tile-fused forward, in every configuration that is launched, compiled ahead of time: no spills, shared memory
within the GPU's limit, the GPU's own matrix instructions in the loop.

Each check has a control that must trip it: a tile too large for the registers, one too large for shared memory, and
fp32 operands, which no 16-bit matrix instruction may touch.
"""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compilation and interpretation need separate processes", allow_module_level=True)

from fastpost.kernels import forward, sums  # noqa: E402
from fastpost.kernels.launch import COPY_ENGINE, FORWARD, Product  # noqa: E402

from ahead import GPUS, Compiled, Gpu, ahead  # noqa: E402

WANTS = {"plain": forward.PLAIN, "one": {*forward.PLAIN, "mean_logp"}, "two": forward.SUPPORTED}
POINTERS = {"parts": "*fp32", "target": "*i64", "bias": "*bf16", "bias_q": "*bf16", "inverse_temperature": "*fp32"}
SIZES = ("R", "V", "D", "D_q", "blocks", "tiles_each", *(f"{x}_stride" for x in ("hidden", "weight")))
SIZES += ("hidden_q_stride", "weight_q_stride")
NUMBERS = ("scale", "softcap", "scale_q", "softcap_q")


def compiled(gpu: Gpu, kind: str, entry: Product, tma: bool, tmp_path, dtype: str = "bf16") -> Compiled:
    """With all that a call of this kind may ask for."""
    dense, shaped = kind == "two", kind != "plain"
    rows = {"hidden": entry.BM, "weight": entry.BN, "hidden_q": entry.BM, "weight_q": entry.BN}
    matrices = {x: f"tensordesc<{dtype}[{n}, {entry.BK}]>" if tma else f"*{dtype}" for x, n in rows.items()}
    types = POINTERS | matrices | dict.fromkeys(SIZES, "i32") | dict.fromkeys(NUMBERS, "fp32")
    constants = {"HAS_BIAS": shaped, "CAPPED": shaped, "TEMPERED": True, "TMA": tma, "EVEN": tma or kind == "plain"}
    constants |= {"DENSE": dense, "HAS_BIAS_Q": dense, "CAPPED_Q": dense, "SLOTS": sums.slots(WANTS[kind], dense)}
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    return ahead(forward._forward_kernel, gpu, types, constants | entry._asdict(), options, tmp_path)


LAUNCHES = [
    (name, kind, tma)
    for name, entries in FORWARD.items()
    for kind in entries
    for tma in (True, False)
    # Where there is a copy engine, pointers are for what it does not take, and that is never "plain".
    if (name in COPY_ENGINE if tma else not (name in COPY_ENGINE and kind == "plain"))
]


@pytest.mark.parametrize(("name", "kind", "tma"), LAUNCHES)
def test_every_launch_fits_its_gpu(name, kind, tma, tmp_path):
    gpu, dtype = GPUS[name], "fp32" if kind == "fp32" else "bf16"
    # fp32 operands come with whatever else the GPU has an entry for.
    most = kind if kind != "fp32" else list(FORWARD[name])[-2]
    result = compiled(gpu, most, FORWARD[name][kind], tma, tmp_path, dtype)
    assert result.spilled == 0
    assert result.shared <= gpu.shared
    assert (result.count(gpu.products) > 0) == (kind != "fp32")
    assert (result.count(r"cp\.async\.bulk\.tensor") > 0) == tma
    if name == "sm_90" and kind != "fp32":  # the next product is issued before the last is waited for
        assert result.count(r"wgmma\.wait_group\.sync\.aligned 1")


def test_the_tables_are_of_the_gpus_that_are_compiled_for():
    assert FORWARD.keys() == GPUS.keys()


@pytest.mark.parametrize("name", GPUS)
def test_the_parts_are_put_together_without_a_spill(name, tmp_path):
    types = {"state": "*fp32", "parts": "*fp32", "R": "i32", "P": "i32"}
    constants = {"SLOTS": sums.slots(forward.SUPPORTED, True), "BR": forward.BR}
    result = ahead(forward._merge_kernel, GPUS[name], types, constants, {"num_warps": 4}, tmp_path)
    assert result.spilled == 0


@pytest.mark.parametrize("name", [name for name in GPUS if name != "gfx942"])
def test_too_large_a_tile_is_seen_to_spill(name, tmp_path):
    """AMD's compiler takes a quarter of a minute over one; the row kernels' control is of its report, too."""
    assert compiled(GPUS[name], "plain", Product(64, 128, 16, 1, 1), False, tmp_path).spilled > 0


@pytest.mark.parametrize("name", GPUS)
def test_too_many_stages_are_seen_to_exceed_shared_memory(name, tmp_path):
    gpu = GPUS[name]
    size = Product(64, 64, 256, 4, 3 if name == "gfx942" else 5)
    assert compiled(gpu, "plain", size, False, tmp_path).shared > gpu.shared
