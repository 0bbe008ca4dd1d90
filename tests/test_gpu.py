"""What only a GPU can show: synchronisation, graph capture, the workspace in bytes, the tile-fused forward, a run.

The numbers of the head and of its losses are held against float64 there too: by tests/test_device.py, and by every
other test that takes `device`.
"""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial

import pytest
import torch

import fastpost as fp
from fastpost.core import rows as row_math
from fastpost.core.gemm import exact_products
from fastpost.core.rows import TorchRows
from fastpost.packing import Example, pack
from rules import assert_close_to_truth, assert_gradient_close_to_truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LOSSES = ("sft", "grpo", "gspo", "dpo")


def packed_batch(S: int, L: int, V: int) -> fp.Batch:
    """S sequences of L tokens, of which the first half is prompt, made on the host and moved."""
    examples = [Example(torch.randint(V, (L,)).tolist(), [i >= L // 2 for i in range(L)]) for _ in range(S)]
    values = torch.randn(3, S * L)
    batch = pack(examples, old_logp=values[0] - 8, ref_logp=values[1] - 8, advantage=values[2]).batch
    return batch.to("cuda")


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_packed_batch_is_never_waited_for(name, frozen):
    V, D = 1000, 64
    batch = packed_batch(4, 16, V)
    hidden = torch.randn(64, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16, requires_grad=not frozen)
    loss = getattr(fp.losses, name)
    fp.fused_loss(loss, hidden, weight, batch).backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        fp.fused_loss(loss, hidden, weight, batch, outputs=("entropy",), return_stats=True)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_finding_idle_rows_is_no_second_wait(frozen):
    T, V, D = 64, 1000, 64
    hidden = torch.randn(T, D, device="cuda", requires_grad=True)
    weight = torch.randn(V, D, device="cuda", requires_grad=not frozen)
    advantage = (torch.arange(T, device="cuda") % 2).float()
    batch = fp.Batch(torch.randint(V, (T,), device="cuda"), torch.tensor([T // 2, T // 2]), advantage=advantage)

    def waits(loss: fp.Loss) -> int:
        fp.fused_loss(loss, hidden, weight, batch, return_stats=True)[0].backward()  # compiles the kernels
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                fp.fused_loss(loss, hidden, weight, batch, return_stats=True)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in seen)

    assert waits(fp.losses.grpo) == waits(fp.losses.sft) == waits(fp.losses.gspo) == 1


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_captured_graph_replays_the_loss_on_new_numbers(frozen):
    T, V, D = 64, 1000, 64
    target = torch.randint(V, (T,), device="cuda")
    target[::3] = -100
    batch = fp.Batch(target, torch.tensor([T]), weight=torch.full((T,), 1 / 42, device="cuda"))
    hidden = torch.randn(T, D, device="cuda", requires_grad=True)
    weight = torch.randn(V, D, device="cuda", requires_grad=not frozen)
    leaves = [x for x in (hidden, weight) if x.requires_grad]

    def step():
        total = fp.fused_loss(fp.losses.sft, hidden, weight, batch)
        return total.detach(), torch.autograd.grad(total, leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, grads = step()
    with torch.no_grad():
        hidden.normal_()
    graph.replay()
    want, want_grads = step()
    torch.testing.assert_close(total, want)
    for ours, theirs in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("schedule", ["frozen", "eager", "lazy"])
def test_the_workspace_is_bounded(schedule):
    T, D, V = 8192, 2048, 131072
    hidden = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16, requires_grad=schedule != "frozen")
    target = torch.randint(V, (T,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if schedule == "eager":
        fp.fused_loss(fp.losses.sft, hidden, weight, fp.Batch(target, torch.tensor([T]))).backward()
    else:
        fp.linear_logprobs(hidden, weight, target).sum().backward()
    returned = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight) if x.grad is not None)
    kept = hidden.numel() * hidden.element_size()  # U, or dhidden
    accumulator = weight.numel() * 4 if weight.requires_grad else 0
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= returned + kept + accumulator + (512 << 20), f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", ["token_stats", *LOSSES])
def test_two_runs_give_the_same_bits_at_a_real_size(name, frozen, dtype):
    """Where a product may be split over its sum, and many programs write: tests/test_determinism.py has small tiles."""
    T, D, V = 2048, 1024, 50_257
    hidden = torch.randn(T, D, device="cuda", dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, device="cuda", dtype=dtype).div_(D**0.5).requires_grad_(not frozen)
    leaves, batch = [x for x in (hidden, weight) if x.requires_grad], packed_batch(4, T // 4, V)

    def run():
        if name == "token_stats":
            stats = fp.token_stats(hidden, weight, batch.target, outputs=("logp", "entropy"))
            total = (stats.logp + stats.entropy).sum()
        else:
            total = fp.fused_loss(getattr(fp.losses, name), hidden, weight, batch)
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    for once, again in zip(run(), run(), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("D", [96, 100], ids=["copied", "pointers"])
@pytest.mark.parametrize("kind", ["plain", "one", "two"])
def test_the_tile_fused_forward_is_close_to_truth(kind, D, dtype):
    fused = pytest.importorskip("fastpost.kernels.forward")
    T, V, draw = 301, 5003, partial(torch.randn, device="cuda")
    hidden, weight = draw(T, D).to(dtype), (3 * draw(V, D) / D**0.5).to(dtype)
    target, inverse = torch.randint(V, (T,), device="cuda"), 0.5 + torch.rand(T, device="cuda")
    p, q, wants = fused.Logits(hidden, weight, None, 1.0, None), None, {"entropy", "log_sum_sq"}
    if kind != "plain":
        p, wants = p._replace(bias=draw(V), scale=0.8, softcap=9.0), wants | {"mean_logp"}
    if kind == "two":
        q = p._replace(weight=weight + (0.1 * draw(V, D)).to(dtype), softcap=None)
        wants |= {"logp@1", "reverse_kl", "forward_kl"}
    forward = fused.forward_on(hidden.device)
    if not forward.takes(wants, q is not None):
        pytest.skip("no launch of this kind for this GPU")
    state, again = (forward.state(p, target, inverse, wants, q) for _ in range(2))
    assert torch.equal(state.nan_to_num(), again.nan_to_num()), "two runs, two results"
    ours = row_math.finish(state, wants, V, inverse)
    fp32, truth = (by_torch(p, q, target, inverse, wants, wide) for wide in (torch.float32, torch.float64))
    for name in wants | {"logp"}:
        assert_close_to_truth(ours[name], fp32[name], truth[name], name)


def by_torch(p, q, target, inverse, wants, wide):
    """The statistics by torch's row kernels on whole rows of logits, products of the operands as they are."""
    state, tiles = row_math.new_state(len(target), target.device, wide), []
    for x in (p, q or p):
        a, b = (x.hidden, x.weight) if wide == torch.float32 else (x.hidden.to(wide), x.weight.to(wide))
        with exact_products(a.device):
            tiles.append(torch.mm(a, b.T) if a.dtype == wide else torch.mm(a, b.T, out_dtype=wide))
    shapes = [row_math.Shape(x.bias, x.scale, x.softcap) for x in (p, q or p)]
    inverse = None if inverse is None else inverse.to(wide)
    TorchRows().fold(state, tiles[0], target, 0, shapes[0], inverse, wants, tiles[1], shapes[1])
    return row_math.finish(state, wants, len(p.weight), inverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("asked", ["plain", "scaled", "window", "soft cap", "soft cap in a window", "window of one"])
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_a_kernel_over_a_pack_rounds_no_more_than_the_exact_path(kernel, asked, layout, dtype):
    pytest.importorskip("transformers")
    from fastpost.models.attention import exact, flex, varlen
    from test_packed_attention import LAYOUT, PLAIN, SCORES, Layer, assert_attends

    scores, layout = SCORES[asked], LAYOUT if layout == "shared" else PLAIN
    x = torch.zeros(1, 4, 43, 32, device="cuda", dtype=dtype)
    if not (varlen.takes(x, x, layout, scores) if kernel == "varlen" else flex.takes(x, scores)):
        pytest.skip("not for this kernel")

    def attend(*given):
        *tensors, layout, scores = given
        if kernel == "varlen":
            return varlen.packed(*tensors, layout, scores, None)
        return flex.packed(Layer(), *tensors, layout, scores, {})

    assert_attends(attend, partial(exact.packed, Layer()), layout, scores, dtype, torch.device("cuda"))


def test_ligers_kernels_round_no_more_than_the_trunk(monkeypatch):
    for extra in ("transformers", "peft", "liger_kernel"):
        pytest.importorskip(extra)
    from transformers.models.llama import modeling_llama

    from fastpost.integrations.liger import apply_liger
    from test_memory import made, run

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # put back later
    model = made("llama", lora=False).cuda()
    plain, truth = copy.deepcopy(model), run(copy.deepcopy(model), double=True)
    apply_liger(model)
    for ours, theirs, want in zip(run(model), run(plain), truth, strict=True):
        assert_gradient_close_to_truth(ours, theirs, want)


def test_sft_and_grpo_run_by_their_verbs(tmp_path):
    for extra in ("transformers", "peft", "datasets", "bitsandbytes"):
        pytest.importorskip(extra)
    import tiny
    from fastpost.cli import main

    model = tmp_path / "model"
    tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(model)  # rows that four bits can hold
    tiny.tokenizer().save_pretrained(model)
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}", "answer": str(2 * i)} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", str(model), "--dataset", str(data), "--max_steps", "2", "--logging_steps", "1"]
    assert main(["sft", *common, "--output_dir", str(tmp_path / "sft"), "--lora_r", "4"]) == 0
    qlora = ["--lora_r", "4", "--load_in_4bit", "true", "--optim", "paged_adamw_8bit"]
    kept = ["--gradient_checkpointing", "true", "--activation_offloading", "true"]
    assert main(["sft", *common, "--output_dir", str(tmp_path / "qlora"), *qlora, *kept]) == 0
    sampled = ["--reward", "number_match", "--max_completion_length", "8", "--beta", "0.1"]
    assert main(["grpo", *common, "--output_dir", str(tmp_path / "grpo"), *sampled]) == 0
    for run in ("sft", "qlora", "grpo"):
        lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2 and all(abs(line["loss"]) < 100 for line in lines)
