"""Head.of: the model's own logits for every family that writes its head differently, or a refusal that says why."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

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


def test_modules_to_save_of_one_adapter_and_lora_of_none():
    head = fp.Head.of(adapted(modules_to_save=["lm_head"]))
    assert head.lora == () and head.weight.requires_grad


# ---- what is refused ----


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
