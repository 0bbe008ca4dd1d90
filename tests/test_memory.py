"""Tiled MLPs and offloaded activations: the same results and gradients, and how many bytes they keep."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

import tiny
from fastpost.models import memory
from fastpost.models.lora import lora_config, with_lora
from fastpost.models.memory import offload_activations, tile_mlps, undo
from fastpost.models.switch import Switch
from fastpost.models.trunk import causal_lm, hidden_states
from fastpost.packing import Example, pack
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from test_workspace import MB, bytes_of, peak

PACKED = pack([Example(list(range(5, 5 + n)), [True] * n) for n in (11, 6, 9)])
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "phi", "gpt2"]


def made(family: str, lora: bool, checkpointed: bool = False):
    changes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128} if family == "gpt2" else {}
    model = tiny.model(family, **changes)
    if lora:
        known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        targets = sorted(known & {name for pair in memory.MLPS for name in pair})
        model = with_lora(model, lora_config(2, lora_target_modules=targets, init_lora_weights=False))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def run(model, double: bool = False) -> tuple[Tensor, Tensor]:
    """Hidden states, and the gradient of all that trains."""
    model = model.double() if double else model
    hidden = hidden_states(model, PACKED.to(model.device))
    hidden.square().sum().backward()
    return hidden, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---- the MLP in slices ----


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_change_nothing_but_the_rounding(family: str, lora: bool, checkpointed: bool, monkeypatch):
    model, seen = made(family, lora, checkpointed), []
    plain, truth = copy.deepcopy(model), run(copy.deepcopy(model), double=True)
    monkeypatch.setattr(memory, "_tiled", spying(memory._tiled, seen))
    tile_mlps(model, 7)
    for ours, same, want in zip(run(model), run(plain), truth, strict=True):
        assert_gradient_close_to_truth(ours, same, want)
    assert set(seen) == {7} and len(seen) >= 2


def spying(function, seen: list[int]):
    def spy(module: nn.Module, forward, tokens: int, hidden: Tensor) -> Tensor:
        seen.append(tokens)
        return function(module, forward, tokens, hidden)

    return spy


def test_a_model_without_gradients_or_with_few_tokens_is_the_same_to_the_bit():
    model = made("llama", lora=False)
    want = hidden_states(model, PACKED)
    tile_mlps(model, 26)
    assert torch.equal(hidden_states(model, PACKED), want)
    undo(model)
    tile_mlps(model, 5)
    with torch.no_grad():
        assert_close_to_truth(hidden_states(model, PACKED), want, hidden_states(made("llama", False).double(), PACKED))


def test_a_dropout_is_drawn_again_as_it_was():
    def gradient(recomputed: bool) -> Tensor:
        model = with_lora(tiny.model("llama"), lora_config(2, lora_dropout=0.5, init_lora_weights=False)).train()
        tile_mlps(model, 7)
        torch.manual_seed(3)
        with nullcontext() if recomputed else patch.object(memory, "checkpoint", lambda f, x, **_: f(x)):
            return run(model)[1]

    assert torch.equal(gradient(True), gradient(False))


def gradient_of_the_first_adapter(tile: int, checkpointed: bool = False, dtype=torch.float32) -> Tensor:
    """Of a pass under it; when backward runs, the second is on."""
    model = with_lora(tiny.model("llama"), lora_config(2, lora_target_modules=["up_proj"], init_lora_weights=False))
    model.add_adapter("second", lora_config(2, lora_target_modules=["up_proj"], init_lora_weights=False))
    model.set_requires_grad(["default", "second"])
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if tile:
        tile_mlps(model.train(), tile)
    switch = Switch.of(model.to(dtype))
    with switch.using("default"):
        loss = hidden_states(model, PACKED).sin().sum()
    with switch.using("second"):
        loss.backward()
    return torch.cat([p.grad.flatten() for p in switch.parameters("default")])


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_a_tile_is_computed_again_under_the_adapter_of_its_forward(checkpointed: bool):
    ours, same = gradient_of_the_first_adapter(7, checkpointed), gradient_of_the_first_adapter(0)
    assert_gradient_close_to_truth(ours, same, gradient_of_the_first_adapter(0, dtype=torch.float64))


def test_a_tile_that_forgot_its_adapter_would_have_another_gradient():
    """That the test above can fail."""
    forgetful = lambda f, x, use_reentrant, context_fn: checkpoint(f, x, use_reentrant=use_reentrant)  # noqa: E731
    with patch.object(memory, "checkpoint", forgetful):
        found = gradient_of_the_first_adapter(7)
    same, truth = (gradient_of_the_first_adapter(0, dtype=dtype) for dtype in (torch.float32, torch.float64))
    with pytest.raises(AssertionError, match="torch's own allows"):
        assert_gradient_close_to_truth(found, same, truth)


def test_what_was_put_on_is_taken_off_and_copies_have_their_own():
    model = made("llama", lora=True)
    mlp = causal_lm(model).model.layers[0].mlp
    assert "forward" not in vars(mlp) and type(mlp).forward is LlamaMLP.forward
    mlp.forward = own = partial(LlamaMLP.forward, mlp)  # somebody else's, as liger's is
    tile_mlps(model, 4)
    tile_mlps(model, 8)
    other = causal_lm(copy.deepcopy(model)).model.layers[0].mlp
    with torch.no_grad():
        other.down_proj.base_layer.weight.zero_()
        other.down_proj.lora_B["default"].weight.zero_()
        x = torch.ones(1, 20, 32)
        assert not other(x).any() and mlp(x).any()
    undo(model)
    assert mlp.forward is own and all("forward" not in vars(m) for m in model.modules() if m is not mlp)
    assert not any(memory.KEPT in vars(m) for m in model.modules())


def test_what_cannot_be_tiled_is_named():
    with pytest.raises(ValueError, match="tiled_mlp must be a positive number of tokens, got 0"):
        tile_mlps(made("llama", False), 0)
    with pytest.raises(ValueError, match="tiled_mlp finds no MLP in Qwen3MoeForCausalLM: leave it out"):
        tile_mlps(tiny.model("qwen3_moe", num_experts=4, moe_intermediate_size=16), 4)


T, D, WIDTH, TILE = 2048, 64, 1024, 128


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_tiled_mlp_keeps_one_tile(lora: bool):
    """Untiled, a SwiGLU keeps gate, silu(gate), up and their product, each (T, I), and their gradients come on top."""
    mlp: nn.Module = nn.ModuleDict({"mlp": LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=WIDTH))})
    if lora:
        from peft import inject_adapter_in_model

        config = lora_config(2, lora_target_modules=["gate_proj", "up_proj", "down_proj"])
        inject_adapter_in_model(config, mlp)
    hidden = torch.randn(1, T, D).requires_grad_()
    upstream = torch.ones(1, T, D)
    plain = peak(lambda: mlp["mlp"](hidden).backward(upstream))
    tile_mlps(mlp, TILE)
    tiled = peak(lambda: mlp["mlp"](hidden).backward(upstream))
    wide, weights = T * WIDTH * 4, bytes_of(*mlp.parameters())
    assert plain > 4 * wide
    # Of a tile as much as of all, as a share; of T tokens what has their width; of a weight two gradients to be added.
    allowed = plain * TILE / T + 4 * bytes_of(hidden) + 2 * weights
    assert tiled <= allowed < plain / 4, f"{tiled / MB:.1f} of {plain / MB:.1f} MB, {allowed / MB:.1f} allowed"


# ---- activations on the host ----


def counting(moved: list[tuple[int, ...]]):
    """`memory._away`, with a note of what leaves."""
    plain = memory._away

    def away(least: int, x: Tensor):
        kept = plain(least, x)
        if kept is not x:
            moved.append(tuple(x.shape))
        return kept

    return away


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_checkpointing_keeps_leaves_and_comes_back_to_the_bit(
    lora: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    """One hidden state to each layer, no weight. On a CPU the host is where it was, so any tensor may go."""
    model, moved = made("llama", lora, checkpointed=True).to(device), []
    want = run(copy.deepcopy(model))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "SMALL", 26 * 32 * 4)
    monkeypatch.setattr(memory, "_away", counting(moved))
    offload_activations(model)
    assert all(torch.equal(ours, plain) for ours, plain in zip(run(model), want, strict=True))
    assert moved.count((1, 26, 32)) >= 2 and all(shape[:2] == (1, 26) for shape in moved)


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="activation_offloading moves activations from a GPU to its host"):
        offload_activations(made("llama", False))
