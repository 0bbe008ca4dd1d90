"""Models whose head bitsandbytes has quantised, with and without PEFT's adapters on it: Head.of is the model's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peft import LoraConfig, PeftModel, get_peft_model

import fastpost as fp
import tiny
from fastpost import losses
from fastpost.core.quantised import Quantised
from fastpost.models.probe import check_head
from problems import Problem, assert_exact, leaf, ours, theirs
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from test_quantised import KINDS, MANY, D, dequantised, layer

IDS = torch.tensor([[3, 14, 15, 42, 65, 35, 89, 79, 32]])


def model(kind: str, dtype: torch.dtype = torch.float32, **rest: object) -> nn.Module:
    """A tiny Llama whose head alone is quantised."""
    made = tiny.model(hidden_size=D).to(dtype)
    made.lm_head = layer(kind, dtype, shape=(97, D), **rest)
    made.lm_head.support_avx512bf16_for_cpu = False
    return made


def with_lora(kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> PeftModel:
    """QLoRA: adapters that add something, on the quantised head too, by PEFT's own layer for it."""
    base = model(kind, dtype)
    setattr(base, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    made = get_peft_model(base, LoraConfig(**(config | changes)))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    layer_type = type(made.get_base_model().lm_head)
    assert layer_type.__module__ == "peft.tuners.lora.bnb", layer_type
    return made


def dense_twin(made: PeftModel) -> PeftModel:
    """The same model in float64, its head what the quantised one is dequantised to."""
    base = tiny.model(hidden_size=D)
    base.lm_head.weight = nn.Parameter(dequantised(made.get_base_model().lm_head.base_layer, torch.float32))
    twin = get_peft_model(base, made.peft_config["default"])
    twin.load_state_dict({name: x for name, x in made.state_dict().items() if "lora" in name}, strict=False)
    return twin.double()


def own_loss(made: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(made(IDS).logits[0, :-1], IDS[0, 1:])


def trained(made: nn.Module, total: Tensor) -> dict[str, Tensor]:
    """The gradient of what trains."""
    leaves = {name: p for name, p in made.named_parameters() if p.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def of_model(made: nn.Module, dtype: torch.dtype) -> Problem:
    """Its head, and hidden states of this dtype."""
    head = fp.Head.of(made)
    assert isinstance(head.weight, Quantised)
    head = replace(head, weight=head.weight.to(dtype))
    return Problem(torch.randn(MANY, D).to(dtype).requires_grad_(), head, torch.randint(0, 97, (MANY,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_head_of_gives_the_models_own_logits(kind, dtype):
    made = model(kind, dtype)
    hidden, logits = made.model(IDS).last_hidden_state[0], made(IDS).logits[0]
    wide = hidden.double() @ dequantised(made.lm_head, dtype).double().T
    truth, theirs = (x.log_softmax(-1).gather(1, IDS.T)[:, 0] for x in (wide, logits))
    assert_close_to_truth(fp.linear_logprobs(hidden, fp.Head.of(made), IDS[0]), theirs, truth)
    check_head(made)
    if kind == "int8":
        check_head(made.eval())  # where its layer rounds the hidden states
        assert not torch.equal(made(IDS).logits[0], logits)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_in_the_compute_dtype_of_the_layer(compute):
    made = model("nf4", compute_dtype=compute)
    hidden, target = torch.randn(MANY, D, requires_grad=True), torch.randint(0, 97, (MANY,))
    weight = dequantised(made.lm_head, compute)
    truth_of = leaf(hidden.to(compute), torch.float64)
    truth = (truth_of @ weight.double().T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    theirs = made.lm_head(hidden).log_softmax(-1).gather(1, target[:, None])[:, 0]
    logp = fp.linear_logprobs(hidden, fp.Head.of(made), target)
    with torch.autocast("cpu", torch.bfloat16 if compute == torch.float16 else torch.float16):
        assert torch.equal(fp.linear_logprobs(hidden, fp.Head.of(made), target), logp)
    single = (hidden.to(compute).float() @ weight.float().T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert_close_to_truth(logp, single, truth)
    upstream = torch.randn(MANY)
    got, yardstick = (torch.autograd.grad(x, hidden, upstream)[0] for x in (logp, theirs))
    (want,) = torch.autograd.grad(truth, truth_of, upstream.double())
    assert got.dtype == torch.float32
    assert_gradient_close_to_truth(got, yardstick, want)
    check_head(made)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_without_one_they_are_in_the_dtype_of_the_hidden_states_or_of_autocast(kind):
    head, target = fp.Head.of(model(kind)), torch.randint(0, 97, (MANY,))
    hidden = torch.randn(MANY, D)
    rounded = fp.linear_logprobs(hidden.bfloat16(), head, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp.linear_logprobs(hidden, head, target), rounded)
    assert not torch.equal(fp.linear_logprobs(hidden, head, target), rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_a_lora_on_a_quantised_head_trains(kind, dtype):
    made = with_lora(kind, dtype)
    lm_head, p = made.get_base_model().lm_head, of_model(made, dtype)
    assert p.head.lora[0].a is lm_head.lora_A["default"].weight and p.head.lora[0].scaling == 1.5
    assert_exact(p, ["logp", "entropy"])
    logits = lm_head(p.hidden).log_softmax(-1).gather(1, p.target[:, None])[:, 0]
    want = theirs(p.to(torch.float64, train_head=False, lora=torch.float64)).logp
    assert_close_to_truth(ours(p, ["logp"]).logp, logits, want)
    check_head(made)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_step_of_training_is_that_of_the_models_own_logits(kind):
    made = with_lora(kind)
    hidden = made.get_base_model().model(IDS).last_hidden_state[0, :-1]
    total = fp.fused_loss(losses.sft, hidden, fp.Head.of(made), fp.Batch(IDS[0, 1:], torch.tensor([8])))
    twin = dense_twin(made)
    got, theirs, want = (
        trained(m, loss) for m, loss in ((made, total), (made, own_loss(made)), (twin, own_loss(twin)))
    )
    assert len(got) == 6 and all(g.norm() > 0 for g in got.values())
    for name, gradient in got.items():
        assert_gradient_close_to_truth(gradient, theirs[name], want[name], name)


@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_the_reference_of_a_lora_head_is_its_own_base_and_read_once(kind, monkeypatch):
    made = with_lora(kind)
    policy, hidden, target = fp.Head.of(made), torch.randn(MANY, D), torch.randint(0, 97, (MANY,))
    with made.disable_adapter():
        base = fp.Head.of(made)
    taken, take = [], Quantised.__getitem__
    monkeypatch.setattr(Quantised, "__getitem__", lambda weight, rows: taken.append(rows) or take(weight, rows))
    for q, blocks in ((base, 1), (fp.Head.of(model(kind)), 2)):
        taken.clear()
        stats = fp.token_stats(hidden, policy, target, outputs=["reverse_kl"], reference=(hidden, q))
        assert (stats.reverse_kl > 0).all() and len(taken) == blocks


@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_adapters_that_are_merged_are_quantised_with_the_weight(kind):
    made = with_lora(kind)
    hidden, target = torch.randn(MANY, D), torch.randint(0, 97, (MANY,))
    made.merge_adapter()
    head, lm_head = fp.Head.of(made), made.get_base_model().lm_head
    assert head.lora == ()
    wide = hidden.double() @ dequantised(lm_head.base_layer.train(), torch.float32).double().T
    truth, single = (x.log_softmax(-1).gather(1, target[:, None])[:, 0] for x in (wide, wide.float()))
    assert_close_to_truth(fp.linear_logprobs(hidden, head, target), single, truth)
