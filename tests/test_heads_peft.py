"""Head.of where PEFT has put an adapter on the head: a plain LoRA is read as it stands, any other refused by name."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model

import fastpost as fp
import tiny
from fastpost.models.probe import check_head
from test_heads import FAMILIES, IDS

ON_HEAD = {"target_modules": ["q_proj", "lm_head"]}


def on_head(family: str = "llama", dtype: torch.dtype = torch.float64, shape: dict | None = None, **changes):
    """A tiny model with adapters that add something, on its head too. In float64 two ways to a number agree."""
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | ON_HEAD | changes))
    model = get_peft_model(tiny.model(family, **(shape or {})).to(dtype), config)
    stir(model)
    return model


def stir(model) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))


def states(model, rows: int = 9) -> torch.Tensor:  # (rows, D)
    return torch.randn(rows, 32, dtype=model.get_base_model().dtype).requires_grad_()


def assert_its_own_head(model, hidden: torch.Tensor | None = None) -> fp.Head:
    """The logits of model.lm_head itself, and their gradients, through token_stats."""
    hidden, target = states(model) if hidden is None else hidden, torch.arange(9)
    head, layer = fp.Head.of(model), model.get_base_model().lm_head
    leaves = [hidden, *(x for x in layer.parameters() if x.requires_grad)]
    state = torch.get_rng_state()
    logits = layer(hidden)[:, : len(head.weight)] * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    want = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.set_rng_state(state)
    logp = fp.linear_logprobs(hidden, head, target)
    torch.testing.assert_close(logp, want)
    got, grads = (torch.autograd.grad(x.square().sum(), leaves, allow_unused=True) for x in (logp, want))
    torch.testing.assert_close(got, grads)
    return head


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),  # tied, as Gemma is
        ("cohere", {"logit_scale": 0.25}),
        ("inkling_text", FAMILIES["inkling_text"]),  # rows beyond the vocabulary
    ],
    ids=str,
)
def test_a_lora_on_the_head_is_the_models_own(family, shape):
    model = on_head(family, shape=shape, target_modules=["lm_head"])
    head = assert_its_own_head(model)
    layer = model.get_base_model().lm_head
    (lora,) = head.lora
    assert lora.a is layer.lora_A["default"].weight and lora.scaling == 1.5 and lora.dropout == 0
    assert lora.b is layer.lora_B["default"].weight or family == "inkling_text"
    assert not head.weight.requires_grad and lora.a.requires_grad
    if family != "inkling_text":  # whose layers do not go over packs
        check_head(on_head(family, torch.float32, shape))  # (not every trunk is there in float64)


def test_a_step_of_training_is_that_of_the_models_own_logits():
    model, twin = on_head(), on_head()
    twin.load_state_dict(model.state_dict())
    hidden = model.get_base_model().model(IDS).last_hidden_state[0, :-1]
    batch = fp.Batch(IDS[0, 1:], torch.tensor([8]))
    fp.fused_loss(fp.losses.sft, hidden, fp.Head.of(model), batch).backward()
    nn.functional.cross_entropy(twin(IDS).logits[0, :-1], IDS[0, 1:]).backward()
    # (transformers' norms round to fp32 in the trunk of a float64 model)
    got, want = ({n: p.grad.float() for n, p in m.named_parameters() if p.requires_grad} for m in (model, twin))
    assert len(got) == 6 and all(g.norm() > 0 for g in got.values())
    torch.testing.assert_close(got, want)


def test_rank_stabilised_lora_is_in_the_scaling():
    assert assert_its_own_head(on_head(use_rslora=True)).lora[0].scaling == 3.0


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_bias_of_the_adapter_joins_that_of_the_head(family):
    model = on_head(family, target_modules=["lm_head"], lora_bias=True)
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["default"].bias.normal_()
    assert assert_its_own_head(model).bias is not None


def test_adapters_that_are_active_together_add_up():
    model = on_head()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=1, task_type="CAUSAL_LM", **ON_HEAD))
    model.add_adapter("elsewhere", LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    stir(model)
    for active, ranks in (("other", [2]), (["default", "other"], [4, 2]), ("elsewhere", []), ("default", [4])):
        model.base_model.set_adapter(active)
        assert [len(x.a) for x in assert_its_own_head(model).lora] == ranks


def test_adapters_that_are_off_or_merged_are_no_longer_there():
    model, base = on_head(), tiny.model().lm_head.weight.double()
    with model.disable_adapter():
        head = assert_its_own_head(model)
        assert head.lora == () and torch.equal(head.weight, base)
    hidden = states(model)
    want = fp.linear_logprobs(hidden, fp.Head.of(model), torch.arange(9))
    model.merge_adapter()
    merged = assert_its_own_head(model, hidden)
    assert merged.lora == ()
    torch.testing.assert_close(fp.linear_logprobs(hidden, merged, torch.arange(9)), want)
    model.unmerge_adapter()
    assert len(fp.Head.of(model).lora) == 1


def test_a_merged_adapter_that_is_switched_off_is_taken_out_as_its_own_forward_would():
    model, base = on_head(), tiny.model().lm_head.weight.double()
    model.merge_adapter()
    assert not torch.allclose(fp.Head.of(model).weight, base)
    with model.disable_adapter():
        torch.testing.assert_close(fp.Head.of(model).weight, base)


def test_dropout_is_that_of_the_layer_in_training_and_none_in_eval():
    model = on_head(lora_dropout=0.3)
    assert assert_its_own_head(model.train()).lora[0].dropout == 0.3
    assert assert_its_own_head(model.eval()).lora[0].dropout == 0


def test_fp32_adapters_over_a_bf16_model_are_not_rounded():
    """PEFT adds them in fp32 and rounds the sum to bf16; here the sum stays, and is that of float64."""
    model = on_head(dtype=torch.bfloat16)
    head, hidden = fp.Head.of(model), states(model)
    (lora,) = head.lora
    assert head.weight.dtype == torch.bfloat16 and lora.a.dtype == lora.b.dtype == torch.float32
    z = hidden.double() @ head.weight.double().T + 1.5 * hidden.double() @ lora.a.double().T @ lora.b.double().T
    target = torch.arange(9)
    truth = z.log_softmax(-1).gather(1, target[:, None])[:, 0]
    theirs = model.get_base_model().lm_head(hidden).double().log_softmax(-1).gather(1, target[:, None])[:, 0]
    logp = fp.linear_logprobs(hidden, head, target)
    assert (logp - truth).abs().max() < 1e-5 < 1e-3 < (theirs - truth).abs().max()
    logp.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16 and lora.a.grad.dtype == lora.b.grad.dtype == torch.float32
    check_head(model)


def test_the_reference_of_a_lora_head_is_its_own_base():
    model = on_head()
    policy, hidden = fp.Head.of(model), states(model)
    with model.disable_adapter():
        reference = fp.Head.of(model)
    assert reference.weight is policy.weight
    stats = fp.token_stats(hidden, policy, torch.arange(9), outputs=("reverse_kl",), reference=(hidden, reference))
    lm_head = model.get_base_model().lm_head
    p, q = lm_head(hidden).log_softmax(-1), lm_head.base_layer(hidden).log_softmax(-1)
    torch.testing.assert_close(stats.reverse_kl, (p.exp() * (p - q)).sum(-1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: on_head(use_dora=True), "the head carries DoraLinearVariant, .*plain LoRA.*modules_to_save"),
        (
            lambda: get_peft_model(tiny.model(), VeraConfig(r=2, task_type="CAUSAL_LM", target_modules=["lm_head"])),
            r"the head carries peft\.tuners\.vera\.layer\.Linear, .*plain LoRA",
        ),
        (
            lambda: get_peft_model(
                tiny.model(), IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[])
            ),
            r"the head carries peft\.tuners\.ia3\.layer\.Linear, .*plain LoRA",
        ),
    ],
    ids=["dora", "vera", "ia3"],
)
def test_any_other_adapter_of_the_head_is_refused_by_name(model, message):
    model = model()
    with pytest.raises(ValueError, match=message):
        fp.Head.of(model)


def test_an_adapter_that_is_refused_may_be_switched_off():
    model = on_head(use_dora=True)
    with model.disable_adapter():
        assert torch.equal(fp.Head.of(model).weight, tiny.model().lm_head.weight.double())
