"""The trunk over a pack: each sequence as if it were alone, in values and gradients, or a refusal that says why."""

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from fastpost.models import attention
from fastpost.models.probe import check_packing
from fastpost.models.trunk import hidden_states
from fastpost.packing import Example, pack

LENGTHS = [7, 1, 23, 6, 12, 1, 2]
FP32 = 2e-6  # transformers' norms and rotations round to fp32 even in a float64 model


def distance(ours, truth):
    """Relative, in the Frobenius norm."""
    return ((ours - truth).norm() / truth.norm()).item()


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
    model, rows = tiny.model(family, **changes).double(), examples()
    truth = alone(model, rows)
    true_gradients = gradients(model, truth)
    model.set_attn_implementation(how)
    hidden = hidden_states(model, pack(rows))
    assert distance(hidden, truth) < FP32
    assert distance(gradients(model, hidden), true_gradients) < FP32


def test_gradient_checkpointing_changes_nothing():
    attention.register()
    model, rows = tiny.model("llama").double().train(), examples()
    model.set_attn_implementation(attention.NAME)
    plain = gradients(model, hidden_states(model, pack(rows)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradients(model, hidden_states(model, pack(rows))), plain)


def test_groups_hold_every_position_once_and_at_most_half_padding():
    bounds = attention.boundaries(torch.tensor(LENGTHS)).flatten()
    assert bounds.tolist() == [0, 7, 8, 31, 37, 49, 50, 52]
    grouped = attention.groups(bounds)
    assert torch.cat([index[real] for index, real in grouped]).sort().values.tolist() == list(range(52))
    for _, real in grouped:
        assert (real.sum(1) * 2 > real.shape[1]).all()


def test_varlen_is_told_the_same_attention(monkeypatch):
    """The kernel itself needs a GPU; here a plain implementation of its documented meaning stands in."""

    def varlen_attn(q, k, v, bounds, _, longest, __, *, scale, window_size, enable_gqa):
        assert enable_gqa and longest == max(LENGTHS)
        left, right = window_size
        out = torch.empty_like(q)
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            back = torch.arange(end - start)[:, None] - torch.arange(end - start)
            mask = (back >= -right) & ((back <= left) if left >= 0 else True)
            sequence = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            done = torch.nn.functional.scaled_dot_product_attention(
                *sequence, attn_mask=mask, scale=scale, enable_gqa=True
            )
            out[start:end] = done[0].transpose(0, 1)
        return out

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_has_varlen", lambda query, value: True)
    attention.register()
    for changes in ({}, {"sliding_window": 5}):
        model, rows = tiny.model("mistral", **changes).double(), examples()
        truth = alone(model, rows)
        model.set_attn_implementation(attention.NAME)
        assert distance(hidden_states(model, pack(rows)), truth) < FP32


def test_padded_batches_and_generation_still_work_with_packed_attention():
    attention.register()
    model = tiny.model("llama")
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
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
    with pytest.raises(ValueError, match="FalconH1ForCausalLM has recurrent layers"):
        hidden_states(tiny.model("falcon_h1", mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64), pack(examples()))
    with pytest.raises(ValueError, match="causal LM, got Linear"):
        hidden_states(torch.nn.Linear(2, 2), pack(examples()))
    with pytest.raises(ValueError, match="got DataParallel: pass the LlamaForCausalLM inside it"):
        hidden_states(torch.nn.DataParallel(tiny.model("llama")), pack(examples()))


def test_attention_that_sdpa_cannot_express_is_refused():
    bounds = attention.boundaries(torch.tensor([2, 2]))
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"\(softcap\): load the model with attn_implementation='eager'"):
        attention.packed_attention(torch.nn.Identity(), x, x, x, bounds, softcap=30.0)
