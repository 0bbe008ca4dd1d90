"""The trunk over a pack: each sequence as if it were alone, in values and gradients, or a refusal that says why."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from transformers import T5Config, T5ForConditionalGeneration

import decoders
import tiny
from fastpost.models import attention
from fastpost.models.probe import check_packing
from fastpost.models.trunk import hidden_states, positions
from fastpost.packing import Example, pack
from rules import assert_close_to_truth, assert_gradient_close_to_truth

LENGTHS = [7, 1, 23, 6, 12, 1, 2]


def examples(lengths=LENGTHS, seed=0):
    ids = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 97, (n,), generator=ids).tolist() for n in lengths]
    return [Example(row, [False] * len(row)) for row in rows]


def gradients(model, hidden):
    """Of a function that gives every element of `hidden` a coefficient of its own."""
    coefficients = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden).cos()
    model.zero_grad()
    (hidden * coefficients).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def alone(model, rows):
    """Each sequence through the model on its own, by transformers' own attention, with its own plain call."""
    model.set_attn_implementation("eager")
    return torch.cat([model.base_model(torch.tensor([row.input_ids])).last_hidden_state for row in rows], 1)


@pytest.mark.parametrize("how", ["eager", "sdpa", attention.NAME])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 8}),
        ("mistral", {"sliding_window": 5}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
        ("gpt2", {}),
        ("phi", {}),
        ("cohere", {}),
        ("granite", {}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}),
    ],
)
def test_packed_is_each_alone(family, changes, how):
    attention.register()
    model, rows = tiny.model(family, **changes), examples()
    wide = copy.deepcopy(model).double()
    with decoders.Doubles():
        truth = alone(wide, rows)
        true_gradients = gradients(wide, truth)
    theirs = alone(model, rows)
    their_gradients = gradients(model, theirs)
    model.set_attn_implementation(how)
    ours = hidden_states(model, pack(rows))
    assert_close_to_truth(ours, theirs, truth)
    assert_gradient_close_to_truth(gradients(model, ours), their_gradients, true_gradients)


def test_gradient_checkpointing_changes_nothing():
    attention.register()
    model, rows = tiny.model("llama").double().train(), examples()
    model.set_attn_implementation(attention.NAME)
    plain = gradients(model, hidden_states(model, pack(rows)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradients(model, hidden_states(model, pack(rows))), plain)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_padded_batches_and_generation_still_work_with_packed_attention(family):
    attention.register()
    model = decoders.model(family, torch.float32)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    model.set_attn_implementation("eager")
    truth = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    model.set_attn_implementation(attention.NAME)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), truth)


def test_models_whose_sequences_see_each_other_are_refused_by_name():
    attention.register()
    for family in ("llama", "opt"):
        model = tiny.model(family)
        model.set_attn_implementation(attention.NAME)
        check_packing(model)
    with pytest.raises(ValueError, match="OPTForCausalLM lets packed sequences see each other"):
        check_packing(tiny.model("opt"))  # by its own mask, which knows nothing of packs


MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mamba", {}, "MambaForCausalLM has recurrent layers"),
        ("falcon_h1", MAMBA | {"mamba_d_ssm": 64}, "FalconH1ForCausalLM has recurrent layers"),
        ("qwen3_next", {"head_dim": 8, "num_experts": 4}, "Qwen3NextForCausalLM has recurrent layers"),
        ("minimax", {"head_dim": 8}, "MiniMaxForCausalLM has layers of linear_attention"),
        ("lfm2", {"full_attn_idxs": [1]}, "Lfm2ForCausalLM has layers of conv"),
        ("llama4_text", {"intermediate_size_mlp": 48}, "Llama4ForCausalLM has layers of chunked_attention"),
        ("bloom", {}, "BloomForCausalLM lets packed sequences see each other"),  # ALiBi
        ("mpt", {}, "MptForCausalLM lets packed sequences see each other"),
        ("falcon", {"alibi": True}, "FalconForCausalLM lets packed sequences see each other"),
        ("bert", {}, "BertSelfAttention asks for .*not causal"),
        ("phimoe", {"sliding_window": 5}, "PhimoeAttention asks for .*a window of 5 in its mask alone"),
        ("doge", {}, "DogeForCausalLM cannot run over a pack"),
    ],
)
def test_what_packs_cannot_do_is_refused_by_name(family, changes, message):
    attention.register()
    model = tiny.model(family, **changes)
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ValueError, match=message):
        check_packing(model)


def test_what_is_no_causal_lm_is_refused():
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=8, d_kv=4, d_ff=8, num_layers=1))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        hidden_states(encoder_decoder, pack(examples()))
    with pytest.raises(ValueError, match="causal LM, got Linear"):
        hidden_states(torch.nn.Linear(2, 2), pack(examples()))
    with pytest.raises(ValueError, match="got DataParallel: pass the LlamaForCausalLM inside it"):
        hidden_states(torch.nn.DataParallel(tiny.model("llama")), pack(examples()))


def test_a_length_that_the_model_has_no_place_for_is_named():
    model = tiny.model("llama", max_position_embeddings=32)
    hidden_states(model, pack(examples([32, 3])))
    with pytest.raises(ValueError, match=r"longest sequence has 33 tokens, but LlamaForCausalLM has 32 positions"):
        hidden_states(model, pack(examples([3, 33])))
    packed = pack(examples([4, 3]))
    empty = replace(packed.batch, lengths=torch.tensor([4, 0, 3]), kept=None, kept_lengths=None)
    with pytest.raises(ValueError, match="lengths must be positive, got 0 for sequence 1 of the pack"):
        hidden_states(model, replace(packed, batch=empty))


def test_a_token_that_the_model_does_not_embed_is_named():
    for token in (97, -1):
        with pytest.raises(ValueError, match=rf"input_ids must be from 0 to 96 for LlamaForCausalLM, got {token}$"):
            hidden_states(tiny.model("llama"), pack([Example([5, token], [False, True])]))


def test_stretched_rotations_know_more_positions():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    assert positions(tiny.model("llama", max_position_embeddings=32)) == 32
    assert positions(tiny.model("llama", max_position_embeddings=32, rope_parameters=yarn)) == 128
    # (but for those that follow the longest sequence of the pack)
    dynamic = yarn | {"rope_type": "dynamic"}
    assert positions(tiny.model("llama", max_position_embeddings=32, rope_parameters=dynamic)) == 32
