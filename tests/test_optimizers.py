"""AdamW in its kinds: torch's, bitsandbytes', and their state to the disk and back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")

import bitsandbytes
from safetensors.torch import load_file, save_file

from fastpost.trainers.config import Sft
from fastpost.trainers.loop import trainable
from fastpost.trainers.optimizers import BITSANDBYTES, adamw, load_state_tensors, state_tensors
from rules import assert_gradient_close_to_truth

KINDS = ("adamw_torch", *BITSANDBYTES)


def config(**changes) -> Sft:
    return Sft(
        **({"model": "m", "dataset": "d", "output_dir": "o", "learning_rate": 1e-2, "weight_decay": 0.1} | changes)
    )


def network() -> nn.Module:
    """Its first weight is large enough for 8 bits, the others are not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 4))


def groups(model: nn.Module) -> list[dict]:
    """As the config wants them, written out."""
    kinds = ((2, 0.1), (1, 0.0))
    return [{"params": [p for p in model.parameters() if p.ndim == n], "weight_decay": w} for n, w in kinds]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    optimizer.step()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(optim: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = adamw(list(model.parameters()), config(optim=optim))
    for seed in range(steps):
        step(model, optimizer, seed)
    return model, optimizer


def test_vectors_do_not_decay_and_frozen_weights_are_left_out():
    model = network()
    model[2].requires_grad_(False)
    for optim in KINDS:
        groups = adamw(trainable(model), config(weight_decay=0.3, optim=optim)).param_groups
        assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.3, 1), (0.0, 3)]


def test_fp32_moments_of_bitsandbytes_move_weights_as_torchs_do():
    exact = network().double()
    optimizer = torch.optim.AdamW(groups(exact), 1e-2)
    for seed in range(4):
        step(exact, optimizer, seed)
    began, paged, torchs = flat(network()), *(flat(trained(optim, 4)[0]) for optim in ("paged_adamw_32bit", KINDS[0]))
    assert_gradient_close_to_truth(paged - began, torchs - began, flat(exact) - began)


@pytest.mark.parametrize(("optim", "own"), BITSANDBYTES.items())
def test_the_rest_is_bitsandbytes_own(optim: str, own: str):
    model, (ours, optimizer) = network(), trained(optim, 3)
    theirs = getattr(bitsandbytes.optim, own)(groups(model), lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for seed in range(3):
        step(model, theirs, seed)
    assert type(optimizer) is type(theirs) and torch.equal(flat(ours), flat(model))


@pytest.mark.parametrize("optim", KINDS)
def test_state_goes_to_the_disk_and_back_to_the_bit(optim: str, tmp_path: Path):
    straight, _ = trained(optim, 5)
    model, optimizer = trained(optim, 3)
    save_file(state_tensors(optimizer), tmp_path / "state.safetensors")
    again = adamw(list(model.parameters()), config(optim=optim))
    load_state_tensors(again, load_file(tmp_path / "state.safetensors"))
    before, after = state_tensors(optimizer), state_tensors(again)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    for seed in (3, 4):
        step(model, again, seed)
    assert torch.equal(flat(model), flat(straight))


@pytest.mark.parametrize("optim", KINDS)
def test_state_of_other_parameters_is_refused(optim: str):
    _, optimizer = trained(optim, 1)
    state, narrow = state_tensors(optimizer), [torch.nn.Parameter(torch.zeros(3)) for _ in range(99)]
    with pytest.raises(ValueError, match=r"of another model: it trained tensor \d+, and here 1 do"):
        load_state_tensors(adamw(narrow[:1], config(optim=optim)), {"9.step": torch.tensor(1.0)} | state)
    with pytest.raises(ValueError, match=r"of another model: tensor 0 that trains was \(.*\), and is \(3,\)"):
        load_state_tensors(adamw(narrow, config(optim=optim)), state)


def test_moments_in_8_bits_are_a_quarter_of_those_in_32():
    sizes = {}
    for optim in ("adamw_torch", "adamw_8bit"):
        state = state_tensors(trained(optim, 1)[1])
        sizes[optim] = sum(x.numel() * x.itemsize for name, x in state.items() if name.startswith("0."))
    count = 64 * 128
    assert sizes["adamw_torch"] == 2 * 4 * count + 4
    assert sizes["adamw_8bit"] == 2 * (count + 4 * count // 256 + 4 * 256) + 8  # moments, absmaxes, codes; the step


def test_what_is_loaded_into_a_paged_optimizer_is_paged_again(monkeypatch: pytest.MonkeyPatch):
    """On a CPU nothing is; what asks for pages is counted."""
    model, optimizer = trained("paged_adamw_8bit", 1)
    again = adamw(list(model.parameters()), config(optim="paged_adamw_8bit"))
    asked, plain = [], type(again).get_state_buffer

    def get_state_buffer(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        asked.append((tuple(parameter.shape), dtype))
        return plain(self, parameter, dtype)

    monkeypatch.setattr(type(again), "get_state_buffer", get_state_buffer)
    load_state_tensors(again, state_tensors(optimizer))
    large, small = ((128, 64), torch.uint8), ((4, 128), torch.float32)
    assert asked.count(large) == asked.count(small) == 2 and len(asked) == 2 * len(list(model.parameters()))


def test_that_nothing_is_paged_on_a_cpu_is_said(capsys: pytest.CaptureFixture):
    adamw(list(network().parameters()), config(optim="paged_adamw_32bit"))
    assert "optim paged_adamw_32bit: nothing is paged on a CPU" in capsys.readouterr().err
    adamw(list(network().parameters()), config(optim="adamw_8bit"))
    assert not capsys.readouterr().err


def test_an_optimizer_that_is_unknown_is_named():
    with pytest.raises(ValueError, match=r"optim must be one of adamw_torch, .* got 'adamw_9bit' \(did you mean"):
        config(optim="adamw_9bit")
