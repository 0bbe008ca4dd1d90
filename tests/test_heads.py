"""Head.of: the model's own logits for every family that writes its head differently, or a refusal that says why."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model

import fastpost as fp
import tiny
from fastpost.models.heads import head_of
from fastpost.models.probe import check_head
from rules import assert_close_to_truth

IDS = torch.tensor([[3, 14, 15, 42, 65, 35, 89, 79, 32]])
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "inkling_text": {"logits_mup_width_multiplier": 3.0, "unpadded_vocab_size": 90, "n_routed_experts": 8},
    "phi": {},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "nanochat": {"final_logit_softcapping": 2.0},
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "head_dim": 8, "lru_width": 32},
}


def adapted(**changes):
    """A tiny Llama with an adapter that no longer adds zero."""
    config = LoraConfig(r=2, task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | changes))
    model = get_peft_model(tiny.model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def plain_logits(head, hidden):
    logits = head.scale * nn.functional.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_gives_the_models_own_logits(family):
    model = tiny.model(family, **FAMILIES[family])
    logits = model(IDS, use_cache=False).logits[0]
    hidden = model.get_decoder()(IDS, use_cache=False).last_hidden_state[0]
    head = head_of(model)
    torch.testing.assert_close(plain_logits(head, hidden), logits)
    stats, wide = fp.token_stats(hidden, fp.Head.of(model), IDS[0]), [x.double() for x in (head.weight, hidden)]
    bias = None if head.bias is None else head.bias.double()
    truth = plain_logits(replace(head, weight=wide[0], bias=bias), wide[1])
    theirs, want = (x.log_softmax(-1).gather(1, IDS.T)[:, 0] for x in (logits, truth))
    assert_close_to_truth(stats.logp, theirs, want)
    plain = head.softcap is None and head.scale == 1
    assert plain == (family in ("llama", "qwen3", "mistral", "phi", "gpt2", "opt"))
    assert (head.bias is not None) == (family == "phi")


def test_the_weight_is_the_models_own_and_its_gradient_arrives():
    model = tiny.model("llama", tie_word_embeddings=True)
    head = head_of(model)
    assert head.weight is model.model.embed_tokens.weight
    hidden = torch.randn(9, 32, requires_grad=True)
    fp.linear_logprobs(hidden, head, IDS[0]).sum().backward()
    assert model.model.embed_tokens.weight.grad.norm() > 0


@pytest.mark.parametrize(
    "model",
    [
        lambda: adapted(),
        lambda: adapted(modules_to_save=["lm_head"]),
        lambda: nn.DataParallel(tiny.model()),
        lambda: adapted(target_modules=["lm_head"]).merge_and_unload(),
    ],
    ids=["lora", "modules_to_save", "wrapped", "merged"],
)
def test_wrapped_models_give_their_own_logits(model):
    model = model()
    lm = model.module if isinstance(model, nn.DataParallel) else model
    logits = lm(IDS).logits[0]
    hidden = lm(IDS, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(plain_logits(head_of(model), hidden), logits)


def test_modules_to_save_follows_the_active_adapter():
    model = adapted(modules_to_save=["lm_head"])
    trained = head_of(model).weight
    assert trained.requires_grad
    with model.disable_adapter():
        reference = head_of(model).weight
        hidden = model(IDS, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(hidden @ reference.T, model(IDS).logits[0])
    assert not torch.equal(trained, reference)


# ---- a LoRA on the head ----

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


def test_modules_to_save_of_one_adapter_and_lora_of_none():
    head = fp.Head.of(adapted(modules_to_save=["lm_head"]))
    assert head.lora == () and head.weight.requires_grad


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


def with_head(layer):
    model = tiny.model()
    model.lm_head = layer
    return model


def zero3():
    layer = nn.Linear(32, 97, bias=False)
    layer.weight = nn.Parameter(torch.empty(0))
    layer.weight.ds_id = 0
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.Linear(32, 97).to(torch.float8_e4m3fn), r"quantised \(Parameter, torch\.float8_e4m3fn\) in a way"),
        (zero3, r"sharded \(DeepSpeed ZeRO-3\)"),
        (lambda: nn.Linear(32, 97, device="meta"), "on the meta device"),
        (lambda: nn.Sequential(nn.Linear(32, 97)), "the head is a Sequential, which Head.of does not know"),
    ],
)
def test_a_head_that_cannot_be_read_is_refused_by_name(layer, message):
    with pytest.raises(ValueError, match=message):
        head_of(with_head(layer()))


def test_heads_of_more_than_one_layer_are_refused():
    with pytest.raises(ValueError, match="BertLMHeadModel keeps its output embedding inside another module"):
        head_of(tiny.model("bert", is_decoder=True))
    with pytest.raises(ValueError, match="ElectraForCausalLM keeps its output embedding beside generator_predictions"):
        head_of(tiny.model("electra", is_decoder=True))
    with pytest.raises(ValueError, match="takes a Hugging Face causal LM, got Linear"):
        head_of(nn.Linear(2, 2))


def test_an_unknown_operation_on_the_logits_is_noticed():
    model = tiny.model()
    check_head(model)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 1.01)
    with pytest.raises(ValueError, match="the head found in LlamaForCausalLM does not give the model's own logits"):
        check_head(model)
