"""A prompt that goes through the trunk once gives what it gives before each completion: logits and every gradient."""

from itertools import chain

import pytest
import torch

pytest.importorskip("transformers")

import decoders
import fastpost as fp
from decoders import FAMILIES, Doubles
from fastpost import losses
from fastpost.models import attention
from fastpost.models.trunk import hidden_states
from fastpost.packing import Example, pack
from fastpost.shared_prompt import share_prompts
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from test_packed_attention import assert_equal_to_rounding


def group(prompt, *completions, seed):
    """Random tokens behind one random prompt; completions alone are predicted, and differ in their first token."""
    ids = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(8, 97, (n,), generator=ids).tolist()  # noqa: E731
    said = draw(prompt)
    rows = [[*said, i, *draw(n - 1)] for i, n in enumerate(completions)]
    return [Example(row, [i >= prompt for i in range(len(row))]) for row in rows]


def repeated():
    """A group, a pair whose prompt is shorter than a window, a row alone, twins, and two that share nothing."""
    twin = group(4, 5, seed=3)
    return [
        *(group(9, 8, 3, 11, seed=0) + group(2, 1, 6, seed=1) + group(3, 4, seed=2)),
        *(twin + twin + group(0, 2, 4, seed=4)),
    ]


UNITS = [3, 2, 1, 2, 2]


@pytest.fixture(autouse=True)
def registered():
    attention.register()


def test_the_layout_written_out():
    rows = [Example([5, 6, 7, 8], [False, False, True, True]), Example([5, 6, 9], [False, False, True])]
    shared = share_prompts(pack(rows, advantage=[[0.1, 0.2], [0.3]]), 2)
    assert shared.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert shared.lengths.tolist() == [2, 2, 1] and shared.continues.tolist() == [-1, 0, 0]
    assert shared.copies.tolist() == [2, 2, 1, 1, 1] and shared.longest == 4
    assert shared.rows.tolist() == [1, 2, 1]  # the prompt's last token predicts 7 and 9
    assert shared.ends.tolist() == [3, 4] and shared.num_tokens == 7
    batch = shared.batch
    assert batch.target.tolist() == [7, 8, 9] and batch.lengths.tolist() == [2, 1]
    torch.testing.assert_close(batch.advantage, torch.tensor([0.1, 0.2, 0.3]))
    assert batch.kept.tolist() == [0, 1, 2] and batch.kept_lengths.tolist() == [2, 1]


def test_every_prompt_is_there_once():
    rows = repeated()
    shared = share_prompts(pack(rows), UNITS)
    assert shared.input_ids.shape[1] == 9 + 22 + 2 + 7 + 7 + 9 + 6  # twins are all prefix, strangers have none
    assert int(shared.copies.sum()) == shared.num_tokens == sum(len(row.input_ids) for row in rows)
    assert shared.input_ids[0, shared.ends].tolist() == [row.input_ids[-1] for row in rows]
    assert shared.batch.target.tolist() == list(chain(*([row.input_ids[i] for i in row.predicted] for row in rows)))
    moved = shared.to("meta")
    assert moved.rows.is_meta and moved.ends.is_meta and moved.batch.target.is_meta
    assert moved.lengths.device.type == moved.continues.device.type == "cpu"


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_is_repeated_in_float64(family):
    model, rows = decoders.model(family), repeated()
    plain = pack(rows)
    with Doubles():
        truth = decoders.padded_logits(model, rows)[plain.batch.kept]
        true_gradients = decoders.gradients(model, truth)
        model.set_attn_implementation(attention.NAME)
        ours = decoders.logits(model, hidden_states(model, share_prompts(plain, UNITS)))
        assert_equal_to_rounding({"logits": ours}, {"logits": truth})
        assert_equal_to_rounding(decoders.gradients(model, ours), true_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_shared_rounds_no_more_than_repeated(family, dtype, device):
    """(With heads as wide as flex_attention wants them on a GPU.)"""
    rows = repeated()
    plain, wide = pack(rows), {"hidden_size": 64, "head_dim": 16}
    exact_model, model = decoders.model(family, **wide), decoders.model(family, dtype, **wide).to(device)
    with Doubles():
        truth = decoders.padded_logits(exact_model, rows)[plain.batch.kept]
        true_gradients = decoders.gradients(exact_model, truth)
    theirs = decoders.padded_logits(model, rows)[plain.batch.kept]
    their_gradients = decoders.gradients(model, theirs)
    model.set_attn_implementation(attention.NAME)
    ours = decoders.logits(model, hidden_states(model, share_prompts(plain, UNITS).to(device)))
    our_gradients = decoders.gradients(model, ours)
    assert_close_to_truth(ours, theirs, truth)
    for name, of_truth in true_gradients.items():
        assert_gradient_close_to_truth(our_gradients[name], their_gradients[name], of_truth, name)


@pytest.mark.parametrize("name", ["sft", "grpo", "gspo", "dpo"])
def test_a_loss_cannot_tell_them_apart(name):
    """Of tokens, of sequences, of pairs: the same number, and the same gradient of every weight."""
    rows = group(9, 8, 3, 11, 2, seed=0) + group(5, 4, 6, seed=1)
    count = sum(len(row.predicted) for row in rows)
    fields = {
        "advantage": torch.randn(len(rows)),
        "ref_logp": [[0.1 * i - 5.0 for i in range(len(row.predicted))] for row in rows],
    }
    model = decoders.model("qwen3")
    model.set_attn_implementation(attention.NAME)
    found = []
    for packed in (pack(rows, **fields), share_prompts(pack(rows, **fields), [4, 2])):
        with Doubles():
            hidden = hidden_states(model, packed)
        value, stats = fp.fused_loss(getattr(losses, name), hidden, fp.Head.of(model), packed.batch, return_stats=True)
        model.zero_grad()
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters())])
        assert int((packed.batch.target != -100).sum()) == count == int(stats.logp.count_nonzero())
    torch.testing.assert_close(found[1], found[0])


def test_gradient_checkpointing_changes_nothing():
    model, shared = decoders.model("mistral").train(), share_prompts(pack(repeated()), UNITS)
    model.set_attn_implementation(attention.NAME)
    plain = decoders.gradients(model, hidden_states(model, shared))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = decoders.gradients(model, hidden_states(model, shared))
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_what_cannot_be_shared_is_said():
    plain = pack(repeated())
    for units in (3, 0, [3, 2], [3, 0, 7]):
        with pytest.raises(ValueError, match=r"units must be the sizes, .* of the pack's 10 sequences, got"):
            share_prompts(plain, units)
    weighed = pack(repeated(), weight=torch.ones(10))
    with pytest.raises(ValueError, match="before it has a weight"):
        share_prompts(weighed, 2)
    model = decoders.model("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        ValueError, match="shared prompts need attn_implementation='fastpost', but LlamaModel has 'sdpa'"
    ):
        hidden_states(model, share_prompts(plain, UNITS))
