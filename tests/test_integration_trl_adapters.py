"""An adapter on the head, which TRL refuses, under TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("peft")

from peft import LoraConfig

from fastpost.integrations import trl as on_fastpost
from rules import assert_close_to_truth, assert_gradient_close_to_truth
from trl_trainers import KINDS, ON_HEAD, train, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "grpo", "rloo", "distillation"])
def test_without_the_patch_an_adapter_on_the_head_is_refused_as_ever(name, tmp_path, saved):
    on_fastpost.patch().restore()
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer_of(name, tmp_path, saved, lora=ON_HEAD)


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_on_the_head_is_trained(name, tmp_path, saved):
    options = {"beta": 0.1} if name in ("grpo", "rloo") else {}  # a reference: the model without its adapters
    with on_fastpost.patch():
        trainer = trainer_of(name, tmp_path, saved, lora=ON_HEAD, max_steps=12, **options)
    lora = trainer.model.get_output_embeddings()
    before = {part: getattr(lora, part)["default"].weight.detach().clone() for part in ("lora_A", "lora_B")}
    frozen = lora.base_layer.weight.detach().clone()
    run = train(trainer)
    assert all(not torch.equal(getattr(lora, part)["default"].weight, before[part]) for part in before)
    assert torch.equal(lora.base_layer.weight, frozen)
    if name not in ("grpo", "rloo"):  # whose losses are advantages that sum to nothing
        assert run.losses[-4:].mean() < run.losses[:4].mean()


def first_step(trainer: Any, loss_of: Callable[[Any, Any], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the first batch, and its gradient in each adapter."""
    loss = loss_of(trainer, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    return loss.detach(), {n: w.grad for n, w in trainer.model.named_parameters() if w.requires_grad}


def of_the_trainer(trainer: Any, batch: Any) -> Tensor:
    return trainer.compute_loss(trainer.model, batch)


def of_logits(trainer: Any, batch: Any) -> Tensor:
    """By PEFT's own forward, without a fused head."""
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@torch.no_grad()
def merged(trainer: Any) -> Tensor:
    """By the weights W + s B A, with no adapter left."""
    trainer.model.double()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model = trainer.model.merge_and_unload()
    return of_logits(trainer, batch)


def test_the_first_step_with_an_adapter_on_the_head_is_that_of_merged_weights(tmp_path, saved):
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with on_fastpost.patch():
        trainers = [trainer_of("sft", tmp_path, saved, lora=lora) for _ in range(4)]
    trainers[2].model.double()
    loss, gradients = first_step(trainers[0], of_the_trainer)
    same, same_gradients = first_step(trainers[1], of_logits)
    truth, true_gradients = first_step(trainers[2], of_logits)
    assert_close_to_truth(loss, same, merged(trainers[3]), "loss of merged weights")
    assert_close_to_truth(loss, same, truth, "loss")
    assert sum("lm_head" in name for name in gradients) == 2
    for name in gradients:
        assert_gradient_close_to_truth(gradients[name], same_gradients[name], true_gradients[name], name)


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_that_head_of_refuses_is_refused_at_once(name, tmp_path, saved):
    dora = LoraConfig(r=4, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    with on_fastpost.patch(), pytest.raises(ValueError, match="the head carries"):
        trainer_of(name, tmp_path, saved, lora=dora)


def test_an_fp32_head_and_an_adapter_on_it_are_refused(tmp_path, saved):
    with on_fastpost.patch(), pytest.raises(ValueError, match="cast_lm_head_to_fp32=True would take the adapter off"):
        trainer_of("grpo", tmp_path, saved, lora=ON_HEAD, cast_lm_head_to_fp32=True)
