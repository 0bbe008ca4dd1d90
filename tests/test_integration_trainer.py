"""fuse_head inside transformers.Trainer: the steps it takes with logits, judged by float64 (tests/rules.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import tiny
from fastpost.integrations.transformers import fuse_head
from rules import assert_close_to_truth, assert_gradient_close_to_truth

WINDOWS = ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
IDS = ["one batch", "four microbatches"]
MIXTURE = {"num_local_experts": 4, "output_router_logits": True, "experts_implementation": "eager"}
Steps = tuple[Tensor, Tensor]  # (losses, gradient norms), one of each a step


def examples() -> list[dict[str, list[int]]]:
    """Forty sequences of unequal length, with prompts of unequal length."""
    rows = torch.Generator().manual_seed(0)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=rows))  # noqa: E731
    made = []
    for _ in range(40):
        length = draw(4, 12)
        prompt, ids = draw(1, length - 1), torch.randint(5, 97, (length,), generator=rows).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    padded = lambda lists, fill: torch.tensor([x + [fill] * (longest - len(x)) for x in lists])  # noqa: E731
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(x) for x in ids], 0),
        "labels": padded([row["labels"] for row in rows], -100),
    }


def trainer(model: nn.Module, folder: Path, kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    names = ("compute_metrics", "compute_loss_func")
    rest = {name: changes.pop(name) for name in names if name in changes}
    arguments = {
        "max_steps": 10,
        "learning_rate": 0.1,
        "optim": "sgd",  # Adam makes a step of full size out of the rounding of a gradient that is nearly zero
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    args = TrainingArguments(output_dir=str(folder), **(arguments | changes))
    return kind(model, args, train_dataset=examples(), eval_dataset=examples()[:6], data_collator=collate, **rest)


def steps(made: Trainer) -> Steps:
    made.train()
    log = [entry for entry in made.state.log_history if "loss" in entry]
    return torch.tensor([e["loss"] for e in log]).double(), torch.tensor([e["grad_norm"] for e in log]).double()


def assert_same_steps(ours: tuple[nn.Module, Steps], same: tuple[nn.Module, Steps], truth: tuple[nn.Module, Steps]):
    for name, *values in zip(("losses", "gradient norms"), ours[1], same[1], truth[1], strict=True):
        assert len(values[0]) == 10
        assert_close_to_truth(*values, name)
    for (name, p), q, r in zip(ours[0].named_parameters(), same[0].parameters(), truth[0].parameters(), strict=True):
        if p.requires_grad:
            assert_gradient_close_to_truth(p, q, r, f"final {name}")


def lora(model: nn.Module, **changes: Any) -> nn.Module:
    changes = {"target_modules": ["q_proj", "v_proj"]} | changes
    config = peft.LoraConfig(r=2, init_lora_weights=False, **changes)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


MODELS = {
    "llama": lambda: tiny.model(),
    "tied gemma2": lambda: tiny.model("gemma2", head_dim=8, final_logit_softcapping=2.0, tie_word_embeddings=True),
    "mixtral": lambda: tiny.model("mixtral", **MIXTURE),
    "lora": lambda: lora(tiny.model(), task_type="CAUSAL_LM"),
    "lora on the head": lambda: lora(tiny.model(), task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]),
    "lora, modules_to_save": lambda: lora(tiny.model(), task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("window", WINDOWS, ids=IDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_steps_as_with_logits(name, window, tmp_path):
    ours, same, truth = MODELS[name](), MODELS[name](), MODELS[name]().double()
    start = [p.clone() for p in ours.parameters()]
    plain = [steps(trainer(model, tmp_path, **window)) for model in (same, truth)]
    with fuse_head(ours):
        made = trainer(ours, tmp_path, **window)
        assert made.model_accepts_loss_kwargs
        fused = steps(made)
    assert_same_steps((ours, fused), (same, plain[0]), (truth, plain[1]))
    assert any(not torch.equal(p, q) for p, q in zip(start, ours.parameters(), strict=True))


def test_accumulation_is_one_big_batch(tmp_path):
    models = [tiny.model() for _ in WINDOWS]
    taken = []
    for model, window in zip(models, WINDOWS, strict=True):
        with fuse_head(model):
            taken.append(steps(trainer(model, tmp_path, **window)))
    same, truth = tiny.model(), tiny.model().double()
    plain = [steps(trainer(model, tmp_path, **WINDOWS[0])) for model in (same, truth)]
    assert_same_steps((models[1], taken[1]), (same, plain[0]), (truth, plain[1]))


def test_label_smoothing_is_an_argument_of_fuse_head(tmp_path):
    ours, same, truth = tiny.model(), tiny.model(), tiny.model().double()
    plain = [steps(trainer(model, tmp_path, label_smoothing_factor=0.2)) for model in (same, truth)]
    with fuse_head(ours, label_smoothing=0.2):
        fused = steps(trainer(ours, tmp_path))
    assert_same_steps((ours, fused), (same, plain[0]), (truth, plain[1]))


def test_what_wants_logits_is_refused_with_what_to_do(tmp_path):
    model = tiny.model()
    with fuse_head(model):
        smoothed = trainer(model, tmp_path, label_smoothing_factor=0.1)
        with pytest.raises(ValueError, match="leave label_smoothing_factor at 0 and pass label_smoothing to fuse_head"):
            smoothed.train()
        own = trainer(
            model, tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
        )
        with pytest.raises(ValueError, match=r"in place of compute_loss_func override Trainer.compute_loss"):
            own.train()


class Confident(Trainer):
    """A loss of one's own, as the error message advises: here DFT's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        if out.logits is None:
            logp = out.logp
        else:
            labels = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
            logp = out.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            logp = torch.where(labels == -100, 0.0, logp)
        loss = -(logp.detach().exp() * logp).sum() / num_items_in_batch
        return (loss, out) if return_outputs else loss


def test_a_loss_of_ones_own_is_built_from_logp(tmp_path):
    ours, same, truth = tiny.model(), tiny.model(), tiny.model().double()
    plain = [steps(trainer(model, tmp_path, Confident)) for model in (same, truth)]
    with fuse_head(ours, differentiable=True):
        fused = steps(trainer(ours, tmp_path, Confident))
    assert_same_steps((ours, fused), (same, plain[0]), (truth, plain[1]))


def test_evaluation_returns_the_loss_and_the_statistics(tmp_path):
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {}

    model = tiny.model()
    plain = [trainer(model, tmp_path, per_device_eval_batch_size=n).evaluate()["eval_loss"] for n in (4, 6)]
    with fuse_head(model):
        for changes in ({}, {"prediction_loss_only": True}):
            found = trainer(model, tmp_path, per_device_eval_batch_size=4, **changes).evaluate()
            assert found["eval_loss"] == pytest.approx(plain[0])
        trainer(model, tmp_path, compute_metrics=metrics, per_device_eval_batch_size=4).evaluate()
    (prediction,) = seen
    target = np.pad(prediction.label_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    logp = torch.tensor(prediction.predictions)[torch.tensor(target != -100)]
    assert logp.shape == (sum(sum(y != -100 for y in row["labels"][1:]) for row in examples()[:6]),)
    assert float(-logp.mean()) == pytest.approx(plain[1])


def test_mixed_precision_trains_fused_and_leaves_the_model_usable(tmp_path):
    model = tiny.model()
    handle = fuse_head(model)
    first = trainer(model, tmp_path, bf16=True, save_strategy="steps", save_steps=10)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    losses, _ = steps(first)
    assert torch.isfinite(losses).all()
    model.lm_head._forward_hooks.clear()
    handle.restore()
    ids = torch.arange(5, 12)[None]
    again = type(model).from_pretrained(tmp_path / "checkpoint-10")
    for parameter, saved in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, saved)
    assert model(ids, labels=ids).logits.shape == (1, 7, 97)
