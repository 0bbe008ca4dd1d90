"""One forward of a fused model, by the name and the arguments of TRL's, field by field."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("peft")

from trl.trainer.utils import add_fused_lm_head as trls

import tiny
from fastpost.integrations.trl_heads import Asked, add_fused_lm_head, fuse
from problems import schedules_of
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from trl_trainers import V, experts, inputs

pytestmark = pytest.mark.filterwarnings("ignore")
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.2},
    "phi": {},  # a bias
}


def from_logits(model: Any, ids: Tensor, labels: Tensor, temperature: float) -> dict[str, Tensor]:
    logits = model(input_ids=ids).logits[:, :-1] / temperature
    logp, scored = logits.log_softmax(-1), labels[:, 1:] != -100
    found = {
        "log_probs": logp.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == labels[:, 1:],
    }
    return {name: torch.where(scored, x, 0) for name, x in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_exact(family):
    model, given = tiny.model(family, **FAMILIES[family]), inputs()
    truth = from_logits(model.double(), given["input_ids"], given["labels"], 0.7)
    plain = from_logits(model.float(), given["input_ids"], given["labels"], 0.7)
    add_fused_lm_head(model, 0.7, outputs=FIELDS)
    out = model(**given, fused_lm_head=True)
    for name in FIELDS:
        assert_close_to_truth(out[name], plain[name], truth[name].double(), name)
    scored = given["labels"][:, 1:] != -100
    assert torch.equal(out.label_mask, scored)
    torch.testing.assert_close(out.loss, -out.log_probs.sum() / scored.sum())
    torch.testing.assert_close(model(**given, fused_lm_head=True, num_items_in_batch=7).loss, -out.log_probs.sum() / 7)
    assert out.log_probs.requires_grad and not out.mean_logits.requires_grad


def entropy_of(model: Any, given: dict[str, Tensor]) -> Tensor:
    return model(**given, fused_lm_head=True).entropy


def slope_of_the_entropy(model: Any, given: dict[str, Tensor]) -> Tensor:
    from_logits(model, given["input_ids"], given["labels"], 1.0)["entropy"].sum().backward()
    return model.model.layers[0].mlp.up_proj.weight.grad


@pytest.mark.parametrize("frozen", [False, True])
def test_an_entropy_is_looked_at_or_differentiated_as_was_asked(frozen):
    model, given = tiny.model(), inputs()
    model.lm_head.requires_grad_(not frozen)
    add_fused_lm_head(model, outputs=FIELDS)
    out = model(**given, fused_lm_head=True)
    assert schedules_of(out.log_probs) == {"FrozenLogp" if frozen else "LazyStats"}
    with pytest.raises(RuntimeError, match="this entropy is for looking at"):
        out.entropy.sum().backward()
    fuse(model, Asked(outputs=FIELDS, differentiable_entropy=True))
    weight = model.model.layers[0].mlp.up_proj.weight
    (got,) = torch.autograd.grad(entropy_of(model, given).sum(), weight)
    same, truth = (slope_of_the_entropy(tiny.model().to(dtype), given) for dtype in (torch.float32, torch.float64))
    assert_gradient_close_to_truth(got, same, truth)


def test_a_head_cast_to_fp32_is_multiplied_in_fp32_under_autocast_too():
    model, given = tiny.model().bfloat16(), inputs()
    model.lm_head.float().weight.data.normal_(0, 0.2)  # not what bfloat16 can hold
    add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = model(**given, fused_lm_head=True).log_probs
        hidden = model.model(given["input_ids"]).last_hidden_state[:, :-1]
    target, scored = given["labels"][:, 1:, None].clamp(min=0), given["labels"][:, 1:] != -100
    same, truth = (
        (hidden.to(dtype) @ model.lm_head.weight.to(dtype).T).log_softmax(-1).gather(-1, target)[..., 0] * scored
        for dtype in (torch.float32, torch.float64)
    )
    assert_close_to_truth(got, same, truth)


def test_labels_that_are_shifted_already_are_scored_where_they_stand():
    model, given = tiny.model(), inputs()
    add_fused_lm_head(model)
    out = model(**given, fused_lm_head=True)
    shifted = torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
    same = model(input_ids=given["input_ids"], shift_labels=shifted, fused_lm_head=True)
    assert same.log_probs.shape == (3, 12) and out.log_probs.shape == (3, 11)
    assert torch.equal(same.log_probs[:, :-1], out.log_probs)
    assert torch.equal(same.log_probs[:, -1], torch.zeros(3))


def test_nothing_to_score_is_a_zero_with_a_gradient_of_zero():
    model, given = tiny.model(), inputs()
    add_fused_lm_head(model, outputs=FIELDS)
    out = model(input_ids=given["input_ids"], labels=torch.full_like(given["labels"], -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0
    assert all(w.grad is not None and not w.grad.any() for w in model.parameters())


def test_without_the_flag_the_forward_is_the_models_own():
    model, given = tiny.model(), inputs()
    before = model(**given)
    add_fused_lm_head(model)
    after = model(**given)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    ids = given["input_ids"]
    assert torch.equal(model.generate(ids, max_new_tokens=3), tiny.model().generate(ids, max_new_tokens=3))


def test_a_copy_of_a_fused_model_is_a_model_of_its_own():
    model, given = tiny.model(), inputs()
    add_fused_lm_head(model)
    copied = copy.deepcopy(model)
    copied.lm_head.weight.data.zero_()
    torch.testing.assert_close(copied(**given, fused_lm_head=True).loss, torch.tensor(V).log())
    assert not copied(**given).logits.any() and model(**given).logits.any()


def test_the_loss_of_the_routers_is_trls():
    ours, theirs, given = experts(), experts(), inputs()
    add_fused_lm_head(ours)
    trls(theirs)
    got, want = (model(**given, fused_lm_head=True) for model in (ours, theirs))
    assert torch.equal(got.aux_loss, want.aux_loss) and got.aux_loss > 0
    torch.testing.assert_close(got.loss, -got.log_probs.sum() / got.label_mask.sum() + 0.3 * want.aux_loss)
    assert ours(**given, fused_lm_head=True, output_router_logits=False).aux_loss is None
