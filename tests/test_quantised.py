"""Heads of bitsandbytes: their rows are those of the layer, their products exact, and no copy of them is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import bitsandbytes
from peft import LoraConfig, PeftModel, get_peft_model

import fastpost as fp
import tiny
from fastpost import losses
from fastpost.models.probe import check_head
from fastpost.quantised import Nested, Quantised, weight_of
from problems import (
    DIVERGENCES,
    OWN,
    Problem,
    adapter,
    assert_exact,
    assert_loss_exact,
    leaf,
    ours,
    schedules_of,
    small_tiles,
    theirs,
)
from problems import problem as dense_problem
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from test_workspace import MB, WORKSPACE, bytes_of, peak

EVERY = (*OWN, *DIVERGENCES)
MANY = 64  # rows, enough that torch's error, the yardstick, is no stroke of luck
V, D = 200, 64
KINDS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 twice": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": True},
    "int8": None,
}


def layer(
    kind: str,
    dtype: torch.dtype = torch.float32,
    *,
    shape: tuple[int, int] = (V, D),
    blocksize: int = 64,
    **rest: object,  # of Linear4bit
) -> nn.Linear:
    """One of bitsandbytes, quantised from a weight of this dtype whose logits have a standard deviation of 3."""
    words, width = shape
    if kind == "int8":
        made = bitsandbytes.nn.Linear8bitLt(width, words, bias=False, has_fp16_weights=False)
    else:
        made = bitsandbytes.nn.Linear4bit(width, words, bias=False, **KINDS[kind], **rest)
        made.weight.blocksize = blocksize
    weight = torch.randn(words, width).mul_(3 / width**0.5).to(dtype)
    made.weight.data = weight
    return made.to("cpu").train()  # in eval mode its product rounds the hidden states, too, or its weight is repacked


def dequantised(made: nn.Linear, dtype: torch.dtype) -> Tensor:  # (V, D)
    """What it multiplies with: its product with the identity."""
    return made(torch.eye(made.in_features, dtype=dtype)).T.detach()


# ---- rows ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_layer_bit_for_bit(kind, dtype):
    made = layer(kind, dtype)
    weight, want = weight_of(made).to(dtype), dequantised(made, dtype)
    assert weight.shape == want.shape and weight[:].dtype == dtype
    index = torch.tensor([3, 199, 3, 0])
    assert torch.equal(weight[:], want) and torch.equal(weight[index], want[index])
    assert torch.equal(torch.cat([weight[start : start + 37] for start in range(0, V, 37)]), want)
    assert torch.equal(weight.narrow(0, 0, 90)[:], want[:90])


@pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "fp4"])
@pytest.mark.parametrize("options", [{"blocksize": 32}, {"blocksize": 256}, {"quant_storage": torch.bfloat16}], ids=str)
def test_blocks_and_storage_may_be_any(options, kind):
    made = layer(kind, shape=(53, 768), **options)
    assert torch.equal(weight_of(made).to(torch.float32)[11:40], dequantised(made, torch.float32)[11:40])


def test_a_weight_in_bfloat16_is_read_as_it_was_quantised():
    """Of products in fp32: codes times scales in fp32, not rounded to the dtype that the weight once had."""
    made = layer("nf4", torch.bfloat16)
    weight = weight_of(made).to(torch.float32)[:]
    assert torch.equal(weight, dequantised(made, torch.float32)) and not torch.equal(weight, weight.bfloat16().float())


# ---- against float64 ----


def problem(kind: str, dtype: torch.dtype, **traits: object) -> Problem:
    """A quantised head beside a bias and adapters that train, and a reference on a quantised head of another width."""
    p = dense_problem(dtype, T=MANY, D=D, V=V, **traits)
    q = layer(kind, shape=(V, 128))
    weight, weight_q = (weight_of(made).to(dtype) for made in (layer(kind), q))
    reference = torch.randn(MANY, 128, dtype=dtype), fp.Head(weight_q)
    return replace(p, head=replace(p.head, weight=weight), reference=reference)


TRAITS = {
    "plain": {},
    "all of them": {"bias": True, "softcap": 5.0, "scale": 0.5, "temperature": 0.75, "ranks": (3,)},
}


@pytest.mark.parametrize("tiles", ["one tile", "many tiles"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_every_statistic_and_gradient(kind, traits, dtype, tiles, monkeypatch):
    if tiles == "many tiles":
        small_tiles(monkeypatch)
    p = problem(kind, dtype, **traits)
    assert p.leaves.keys() == {"hidden", *({"bias", "a0", "b0"} if traits else ())}
    assert_exact(p, EVERY)


@fp.loss(unit="sequence", reads=("logp", "reverse_kl"))
def distant(stats: fp.Stats, batch: fp.Batch) -> Tensor:
    return torch.log1p(batch.per_sequence(stats.reverse_kl)) - 0.1 * batch.per_sequence(stats.logp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["FrozenLogp", "EagerLoss", "LazyStats"])
@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_every_schedule_is_exact(kind, schedule, dtype, monkeypatch):
    p = problem(kind, dtype, bias=True, ranks=(3,))
    if schedule == "FrozenLogp":
        p.head.bias.requires_grad_(False)
        p.head.lora[0].b.requires_grad_(False)
    small_tiles(monkeypatch, rows=5 if schedule == "LazyStats" else 40)
    batch = fp.Batch(p.target.index_fill(0, torch.tensor([0, 9]), -100), torch.tensor([20, 14, 30]))
    batch = replace(batch, old_logp=ours(p, ["logp"]).logp.detach().float() + 0.2 * torch.randn(MANY))
    batch = replace(batch, advantage=torch.randn(3), weight=torch.rand(3))
    loss = losses.gspo if schedule == "FrozenLogp" else distant
    given = {} if schedule == "FrozenLogp" else {"reference": p.reference}
    total = fp.fused_loss(loss, p.hidden, p.head, batch, **given)
    assert schedules_of(total) == {schedule}
    assert_loss_exact(total, loss, p, batch)


# ---- the head of a model ----

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


def test_a_quantised_teacher_of_a_dense_policy():
    p = dense_problem(T=MANY, D=16, V=V)
    assert_exact(replace(p, reference=problem("nf4", torch.float32).reference), DIVERGENCES)


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


def repacked() -> nn.Linear:
    made = layer("nf4")
    made.weight.quant_state.packing_format_for_cpu = True
    return made


REFUSED = {
    "no 4 bits yet": (
        lambda: bitsandbytes.nn.Linear4bit(D, V),
        "a Params4bit that is not quantised yet: move the layer",
    ),
    "no 8 bits yet": (
        lambda: bitsandbytes.nn.Linear8bitLt(D, V, has_fp16_weights=False),
        "of torch.float32, not of int8",
    ),
    "trains": (lambda: bitsandbytes.nn.Linear8bitLt(D, V), r"quantised anew at each forward \(has_fp16_weights=True\)"),
    "repacked": (repacked, "repacked the head's 4-bit weight .*support_avx512bf16_for_cpu = False"),
    "across rows": (
        lambda: layer("nf4", blocksize=128),
        r"weight \(200, 64\) has blocks of 128 .*a blocksize that divides 64",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(what):
    make, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        weight_of(make())


def test_a_bare_weight_of_bitsandbytes_says_how_it_is_read():
    with pytest.raises(ValueError, match=r"head\.weight must be a floating .*uint8 .*quantised\.weight_of\(layer\)"):
        fp.Head(layer("nf4").weight)


# ---- memory ----


def large(kind: str, words: int, width: int) -> Quantised:
    """Any codes at all."""
    if kind == "int8":
        return Quantised(torch.randint(-127, 128, (words, width), dtype=torch.int8), torch.rand(words, 1), kind)
    code = lambda count: torch.randint(0, 256, (words, count), dtype=torch.uint8)  # noqa: E731
    absmax = Nested(code(width // 64), torch.rand(256), torch.rand(words * width // 64 // 256), torch.tensor(0.1), 256)
    return Quantised(code(width // 2), absmax, "nf4")


@pytest.mark.parametrize("schedule", ["statistics", "FrozenLogp", "EagerLoss", "LazyStats"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_no_copy_of_the_weight_is_made(kind, schedule):
    """One of bfloat16 alone would be more than the workspace may be."""
    T, words, width = 64, 40_960, 1024
    weight = large(kind, words, width)
    lora = adapter(4, torch.ones(words, width, dtype=torch.bfloat16))
    lora.b.requires_grad_(schedule in ("EagerLoss", "LazyStats"))
    hidden = torch.randn(T, width, dtype=torch.bfloat16).mul_(1e-3).requires_grad_(schedule != "statistics")
    head, batch = fp.Head(weight, lora=(lora,)), fp.Batch(torch.randint(0, words, (T,)), torch.tensor([T]))

    def function() -> None:
        if schedule == "LazyStats":
            total = fp.token_stats(hidden, head, batch.target, outputs=("logp", "entropy")).logp.sum()
        else:
            total = fp.fused_loss(losses.sft, hidden, head, batch)
        assert schedules_of(total) == ({schedule} - {"statistics"})
        if schedule != "statistics":
            total.backward()

    most, allowed = peak(function), WORKSPACE + 3 * bytes_of(lora.b, wide=True)
    assert most <= allowed < words * width * 2, f"{most / MB:.1f} MB"
