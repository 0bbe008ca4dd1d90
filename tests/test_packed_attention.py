"""A packed batch is the padded one: logits and the gradient of every parameter, family by family."""

from functools import partial

import pytest
import torch

pytest.importorskip("transformers")

import decoders
from decoders import FAMILIES, Doubles, padded_logits
from fastpost.models import attention
from fastpost.models.attention import exact, flex, varlen
from fastpost.models.attention.layout import Layout, visible
from fastpost.models.attention.scores import Scores
from fastpost.models.trunk import hidden_states
from fastpost.packing import Example, pack
from fastpost.shared_prompt import share_prompts
from rules import assert_close_to_truth, assert_gradient_close_to_truth

LENGTHS = [7, 1, 23, 6, 12, 1, 2]
# float64 alone: a gradient is at the end of some hundred sums of about as many terms, and each may round.
ROUNDING = 2**12 * torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def registered():
    attention.register()


def assert_equal_to_rounding(ours, truth):
    """Relative to the norm of all gradients: that of a key's bias is 0, which softmax is blind to."""
    norm = sum(x.norm() ** 2 for x in truth.values()) ** 0.5
    for name in truth:
        assert ours[name].dtype == torch.float64
        assert (ours[name] - truth[name]).norm() <= ROUNDING * norm, name


def packed_logits(model, rows):
    model.set_attn_implementation(attention.NAME)
    return decoders.logits(model, hidden_states(model, pack(rows).to(model.device)))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_padded_in_float64(family):
    model, rows = decoders.model(family), decoders.examples(LENGTHS)
    with Doubles():
        truth = padded_logits(model, rows)
        true_gradients = decoders.gradients(model, truth)
        ours = packed_logits(model, rows)
        assert_equal_to_rounding({"logits": ours}, {"logits": truth})
        assert_equal_to_rounding(decoders.gradients(model, ours), true_gradients)
    assert all(gradient.any() for name, gradient in true_gradients.items() if "k_proj.bias" not in name)


# (an expert is chosen or not: in bfloat16 the smallest rounding sends a token elsewhere)
HALF = [(family, torch.bfloat16) for family in FAMILIES if family not in decoders.MIXTURES]


@pytest.mark.parametrize(("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), *HALF])
def test_packed_rounds_no_more_than_padded(family, dtype, device):
    rows = decoders.examples(LENGTHS)
    exact_model, model = decoders.model(family), decoders.model(family, dtype).to(device)
    with Doubles():
        truth = padded_logits(exact_model, rows)
        true_gradients = decoders.gradients(exact_model, truth)
    theirs = padded_logits(model, rows)
    their_gradients = decoders.gradients(model, theirs)
    ours = packed_logits(model, rows)
    our_gradients = decoders.gradients(model, ours)
    assert_close_to_truth(ours, theirs, truth)
    for name, of_truth in true_gradients.items():
        assert_gradient_close_to_truth(our_gradients[name], their_gradients[name], of_truth, name)


STRETCHED = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE = {"rope_parameters": STRETCHED, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("lengths", [[7, 16, 1, 9], [17, 23, 40]], ids=["short", "long"])
def test_packs_on_one_side_of_a_longropes_window_are_padded_batches(lengths: list[int]):
    model, rows = decoders.model("phi3", **LONGROPE), decoders.examples(lengths)
    with Doubles():
        truth, ours = padded_logits(model, rows), packed_logits(model, rows)
    assert_equal_to_rounding({"logits": ours}, {"logits": truth})


@pytest.mark.parametrize("lengths", [[16, 17], [40, 1, 20, 9]])
def test_sequences_on_both_sides_of_it_are_each_what_they_are_alone(lengths: list[int]):
    """Beside one of 17 tokens, a sequence of 16 is turned by the short factors all the same; with its gradient."""
    model, rows = decoders.model("phi3", **LONGROPE), decoders.examples(lengths)
    with Doubles():
        alone = torch.cat([padded_logits(model, [row]) for row in rows])
        together = packed_logits(model, rows)
        truth, ours = (decoders.gradients(model, logits) for logits in (alone, together))
    assert_equal_to_rounding({"logits": together} | ours, {"logits": alone} | truth)


def test_shared_prompts_on_both_sides_of_it_are_refused_with_what_to_set():
    model = decoders.model("phi3", **LONGROPE)
    model.set_attn_implementation(attention.NAME)
    prompt, (long, short) = decoders.examples([12])[0], decoders.examples([6, 3], seed=1)
    behind = [Example(prompt.input_ids + x.input_ids, prompt.loss_mask + x.loss_mask) for x in (long, short)]
    shared = share_prompts(pack([behind[0], behind[0]]), 2)
    hidden_states(model, shared)
    with pytest.raises(ValueError, match=r"15 to 18 tokens, and Phi3ForCausalLM .* set share_prompts to false"):
        hidden_states(model, share_prompts(pack(behind), 2))


# ---- a layout, and the ways to attend to one ----

# A prompt of 9 with two completions, another with one, a prompt of 3 with a completion of one token, a sequence alone.
LENGTHS_OF_SEGMENTS = torch.tensor([9, 6, 5, 9, 7, 3, 1, 3])
LAYOUT = Layout.of(LENGTHS_OF_SEGMENTS, torch.tensor([-1, 0, 0, -1, 3, -1, 5, -1]))
PLAIN = Layout.of(LENGTHS_OF_SEGMENTS)


def test_a_layout_survives_in_the_place_of_a_mask():
    for layout in (LAYOUT, PLAIN):
        read = Layout.read(layout.as_mask())
        assert read is not None and torch.equal(read.bounds, layout.bounds)
        assert (read.continues is None) == (layout.continues is None)
        assert layout.continues is None or torch.equal(read.continues, layout.continues)
    for mask in (None, torch.ones(2, 4, dtype=torch.int32), torch.ones(1, 1, 4, 4, dtype=torch.bool)):
        assert Layout.read(mask) is None


def test_what_a_token_sees():
    """Two completions of 2 and 3 tokens behind a prompt of 2, written out."""
    layout = Layout.of(torch.tensor([2, 2, 3]), torch.tensor([-1, 0, 0]))
    place = torch.arange(7)
    seen = [  # by each token, the places it sees; positions are 0 1 | 2 3 | 2 3 4
        *([0], [0, 1], [0, 1, 2], [0, 1, 2, 3]),
        *([0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]),
    ]
    sees = visible(layout, 7, None)(place[:, None], place)
    assert [row.nonzero().flatten().tolist() for row in sees] == seen
    narrow = visible(layout, 7, 2)(place[:, None], place)
    assert [row.nonzero().flatten().tolist() for row in narrow] == [[0], [0, 1], [1, 2], [2, 3], [1, 4], [4, 5], [5, 6]]


def test_groups_hold_every_token_once_and_at_most_half_padding():
    for layout in (LAYOUT, PLAIN):
        found = list(exact.groups(layout))
        assert torch.cat([group.index[group.real] for group in found]).sort().values.tolist() == list(range(43))
        assert all((group.real.sum(1) * 2 > group.real.shape[1]).all() for group in found)
    behind = {tuple(group.prefixes[:, :1].flatten().tolist()): group.copies for group in exact.groups(LAYOUT)}
    assert behind == {(): [2], (0, 20): [2, 1], (36,): [1]}, "prompts of one length are in one group"


class Layer(torch.nn.Module):
    """What the ways to attend ask of a module: 4 heads on 2."""

    num_key_value_groups = 2
    is_causal = True


def inputs(dtype=torch.float64, d=8):
    """query, key and value, of numbers that bfloat16 holds."""
    drawn = (torch.randn(1, heads, 43, d).bfloat16() for heads in (4, 2, 2))
    return [x.to(dtype).requires_grad_() for x in drawn]


def by_definition(query, key, value, layout, scores):
    """All pairs of the pack, one softmax."""
    place = torch.arange(43, device=query.device)
    mask = visible(layout, 43, scores.window)(place[:, None], place)
    logits = query @ key.repeat_interleave(2, 1).mT * (scores.scaling or query.shape[-1] ** -0.5)
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    total = logits.logsumexp(-1, keepdim=True)
    if scores.sinks is not None:
        total = torch.logaddexp(total, scores.sinks.view(1, -1, 1, 1))
    return ((logits - total).exp() @ value.repeat_interleave(2, 1)).transpose(1, 2)


def with_gradients(output, tensors):
    weights = torch.linspace(-9, 9, output.numel(), dtype=torch.float64).view_as(output).cos().to(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


SCORES = {
    "plain": Scores(),
    "scaled": Scores(scaling=0.7),
    "window of one": Scores(window=1),
    "window": Scores(window=4),
    "window as long as a sequence": Scores(window=11),
    "soft cap": Scores(softcap=0.8),
    "soft cap in a window": Scores(softcap=0.8, scaling=1.3, window=5),
}


@pytest.mark.parametrize("layout", [PLAIN, LAYOUT], ids=["plain", "shared"])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_the_exact_path_is_the_definition(scores, layout):
    tensors = inputs()
    truth = with_gradients(by_definition(*tensors, layout, scores), tensors)
    ours = with_gradients(exact.packed(Layer(), *tensors, layout, scores), tensors)
    torch.testing.assert_close(ours, truth)


def assert_attends(attend, yardstick, layout, scores, dtype, device):
    """By rules.py: the output, and the gradient of all three. Alone some have a gradient of 0, rounding apart."""
    wide = inputs(d=32)
    narrow = [x.detach().to(device, dtype).requires_grad_() for x in wide]
    there = layout.to(device)
    truth = with_gradients(by_definition(*wide, layout, scores), wide)
    ours, theirs = (with_gradients(by(*narrow, there, scores), narrow) for by in (attend, yardstick))
    assert_close_to_truth(ours[0], theirs[0], truth[0])
    together = [torch.cat([x.flatten().cpu().double() for x in found[1:]]) for found in (ours, theirs, truth)]
    assert_gradient_close_to_truth(*together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", [PLAIN, LAYOUT], ids=["plain", "shared"])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_the_exact_path_rounds_no_more_than_the_definition(scores, layout, dtype, device):
    assert_attends(partial(exact.packed, Layer()), by_definition, layout, scores, dtype, device)


@pytest.mark.parametrize("layout", [PLAIN, LAYOUT], ids=["plain", "shared"])
def test_sinks_are_the_definition(layout):
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    scores, tensors = Scores(window=6, sinks=sinks), [*inputs(), sinks]
    truth = with_gradients(by_definition(*tensors[:3], layout, scores), tensors)
    ours = with_gradients(exact.packed(Layer(), *tensors[:3], layout, scores), tensors)
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("layout", [PLAIN, LAYOUT], ids=["plain", "shared"])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_flex_attention_is_told_the_same(monkeypatch, scores, layout):
    """Compiled it needs a GPU; uncompiled it is the same call, block mask and all. (It has no gradient on a CPU.)"""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda query, key, value, training, **options: flex_attention(query, key, value, **options),
    )
    tensors, masks = [x.detach() for x in inputs()], {}
    ours = flex.packed(Layer(), *tensors, layout, scores, masks)
    torch.testing.assert_close(ours, exact.packed(Layer(), *tensors, layout, scores))
    assert torch.equal(flex.packed(Layer(), *tensors, layout, scores, masks), ours) and list(masks) == [scores.window]


def plain_varlen(q, k, v, bounds, window, scaling, softcap):  # (T, heads, d)
    """The documented meaning of the kernels, which need a GPU: bottom-right causal windows of each sequence."""
    left, right = window
    out = torch.empty_like(q)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        mask = (back >= -right) & ((back <= left) if left >= 0 else True)
        one, two, three = (x[start:end].transpose(0, 1) for x in (q, k, v))
        group = len(one) // len(two)
        logits = one @ two.repeat_interleave(group, 0).mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        out[start:end] = (weights @ three.repeat_interleave(group, 0)).transpose(0, 1)
    return out


def torch_varlen(q, k, v, bounds, bounds_k, longest, longest_k, *, scale, window_size, enable_gqa):
    assert enable_gqa and bounds is bounds_k and longest == longest_k == max(LENGTHS)
    return plain_varlen(q, k, v, bounds, window_size, scale, None)


def flash_varlen(
    q, k, v, bounds, bounds_k, longest, longest_k, *, softmax_scale, causal, window_size, softcap, deterministic
):
    assert causal and deterministic and bounds is bounds_k and longest == longest_k == max(LENGTHS)
    return plain_varlen(q, k, v, bounds, window_size, softmax_scale, softcap)


@pytest.mark.parametrize(
    ("kernel", "family"),
    [("torch", "qwen3"), ("torch", "mistral"), ("flash_attn", "mistral"), ("flash_attn", "gemma2")],
)
def test_varlen_kernels_are_told_the_same(monkeypatch, kernel, family):
    """Plain implementations of what is documented stand in for the kernels: only the arguments are tested here."""
    import sys
    from types import SimpleNamespace

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_varlen))
    monkeypatch.setattr(varlen, "has_flash_attn", lambda: kernel == "flash_attn")
    monkeypatch.setattr(varlen, "takes", lambda *tensors: True)
    model, rows = decoders.model(family), decoders.examples(LENGTHS)
    with Doubles():
        truth = padded_logits(model, rows)
        assert_equal_to_rounding({"logits": packed_logits(model, rows)}, {"logits": truth})


def test_which_kernel_takes_what(monkeypatch):
    """On a GPU; here the tensors only say that they are there."""
    from types import SimpleNamespace

    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 4, 43, 64))
    full = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(1, 4, 43, 64))
    monkeypatch.setattr(varlen, "has_flash_attn", lambda: False)
    takes = lambda x, layout=PLAIN, **asked: varlen.takes(x, x, layout, Scores(**asked))  # noqa: E731
    assert takes(on_gpu) and takes(on_gpu, window=5)
    odd = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 4, 43, 12))
    assert not takes(full) and not takes(odd) and not takes(inputs()[0])
    for asked in ({"softcap": 1.0}, {"sinks": torch.zeros(4)}, {"dropout": 0.1}, {"layout": LAYOUT}):
        assert not takes(on_gpu, **asked)
    monkeypatch.setattr(varlen, "has_flash_attn", lambda: True)
    assert takes(on_gpu, softcap=1.0) and not takes(on_gpu, softcap=1.0, layout=LAYOUT)
    assert flex.takes(full, Scores()) and not flex.takes(full, Scores(dropout=0.1))
    assert not flex.takes(odd, Scores()) and not flex.takes(inputs()[0], Scores())


def test_attention_that_packs_do_not_have_is_refused():
    x = torch.zeros(1, 1, 43, 8)
    for asked in ({"position_bias": x}, {"indices": x}, {"is_causal": False}, {"cache": x}):
        name = "not causal" if "is_causal" in asked else next(iter(asked))
        with pytest.raises(ValueError, match=rf"Layer asks for .* \({name}\): .*attn_implementation='eager'"):
            attention.packed_attention(Layer(), x, x, x, PLAIN.as_mask(), **asked)
