"""The patch itself: what it puts where, and takes back; and the methods of the trainers that it replaces."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

import trl
from trl.trainer.utils import add_fused_lm_head as trls

import tiny
from fastpost.integrations import trl as on_fastpost
from fastpost.integrations import trl_heads
from rules import assert_close_to_truth
from trl_trainers import KINDS, SETTINGS, V, calls_of_the_head, data, forwards, inputs, train, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore")


def everything() -> dict[tuple[str, str], Any]:
    """Every attribute of every module of TRL's that is loaded, and of its trainers."""
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "trl"}
    found = {}
    for name, module in loaded.items():
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {(f"{name}.{attribute}", key): x for key, x in vars(value).items()}
    return found


def changed(before: dict[tuple[str, str], Any]) -> set[str]:
    after = everything()
    return {".".join(key) for key in before if after.get(key) is not before[key]}


PATCHED = {
    *(f"trl.trainer.{name}_trainer.add_fused_lm_head" for name in ("sft", "dpo", "kto", "grpo", "rloo")),
    *(f"trl.trainer.{name}_trainer.BaseTunerLayer" for name in ("sft", "dpo", "kto", "grpo", "rloo", "distillation")),
    "trl.trainer.distillation_trainer.DistillationTrainer.__init__",
    "trl.trainer.grpo_trainer.GRPOTrainer.__init__",
    "trl.experimental.cpo.cpo_trainer.CPOTrainer.__init__",
    "trl.experimental.orpo.orpo_trainer.ORPOTrainer.__init__",
}


@pytest.fixture
def before() -> dict[tuple[str, str], Any]:
    on_fastpost.patch().restore()  # every module it touches is loaded
    return everything()


def test_a_patch_is_taken_back_to_the_last_attribute(before):
    handle = on_fastpost.patch()
    assert changed(before) == PATCHED
    handle.restore()
    assert changed(before) == set()
    with pytest.raises(RuntimeError, match="from inside"), on_fastpost.patch():
        assert changed(before) == PATCHED
        raise RuntimeError("from inside")
    assert changed(before) == set()


def test_a_second_patch_changes_nothing_and_takes_nothing_back(before):
    with on_fastpost.patch():
        first = everything()
        with on_fastpost.patch() as inner:
            assert inner.changes == () and changed(first) == set()
        assert changed(before) == PATCHED
    assert changed(before) == set()


def test_what_somebody_else_put_there_since_stays(before, monkeypatch):
    handle, theirs = on_fastpost.patch(), lambda *_, **__: None
    trl.trainer.sft_trainer.add_fused_lm_head = theirs
    handle.restore()
    handle.restore()
    assert changed(before) == {"trl.trainer.sft_trainer.add_fused_lm_head"}
    assert trl.trainer.sft_trainer.add_fused_lm_head is theirs
    trl.trainer.sft_trainer.add_fused_lm_head = trls
    assert changed(before) == set()


def test_another_version_is_refused_untouched(before, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ValueError, match=r"knows how trl 1\.16\.0 .* this is trl 1\.17\.0: install trl==1\.16\.0"):
        on_fastpost.patch()
    monkeypatch.undo()
    assert changed(before) == set()


@pytest.mark.parametrize("path", sorted(on_fastpost.RELIES_ON))
def test_a_trl_without_what_is_relied_on_is_refused_untouched(path, before, monkeypatch):
    monkeypatch.delattr(path)
    here = everything()
    with pytest.raises(ValueError, match=f"has no {path}, which fastpost relies on"):
        on_fastpost.patch()
    assert changed(here) == set()


def test_a_trl_with_another_signature_is_refused_untouched(before, monkeypatch):
    monkeypatch.setattr("trl.trainer.rloo_trainer.add_fused_lm_head", lambda model, heat=1.0: None)
    here = everything()
    with pytest.raises(
        ValueError, match=r"another trl\.trainer\.rloo_trainer\.add_fused_lm_head .* takes model, heat,"
    ):
        on_fastpost.patch()
    assert changed(here) == set()


OURS = trl_heads.__name__


def test_what_counts_is_where_a_trainer_is_built(tmp_path, monkeypatch, saved):
    called, short = calls_of_the_head(monkeypatch), {"max_steps": 1}
    earlier = [trainer_of(name, tmp_path, saved, **short) for name in ("sft", "cpo", "distillation")]
    with on_fastpost.patch():
        inside = [trainer_of(name, tmp_path, saved, **short) for name in ("sft", "cpo", "distillation")]
        for trainer in earlier:
            trainer.train()
        assert called == []
    for trainer, function in zip(inside, ("token_stats", "token_stats", "fused_loss"), strict=True):
        called.clear()
        trainer.train()
        assert called == [function]
    assert forwards(trainer_of("sft", tmp_path, saved)) == "trl.trainer.utils"


def test_a_subclass_keeps_a_method_of_its_own(tmp_path, monkeypatch, saved):
    made, configured = KINDS["orpo"].classes()

    class Mine(made):
        def concatenated_forward(self, model: Any, batch: Any) -> Any:
            return super().concatenated_forward(model, batch)

    called = calls_of_the_head(monkeypatch)
    args = configured(**SETTINGS | {"output_dir": str(tmp_path), "max_steps": 1})
    with on_fastpost.patch():
        trainer = Mine(model=tiny.model(), args=args, processing_class=tiny.tokenizer(), train_dataset=data("dpo"))
        trainer.train()
    assert called == []


def test_the_mean_logits_of_cpo_are_of_what_is_scored(tmp_path, saved):
    with on_fastpost.patch():
        trainer = trainer_of("cpo", tmp_path, saved)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = trainer.concatenated_inputs(batch, padding_value=0)["concatenated_labels"]
    own = type(trainer).concatenated_forward
    with torch.no_grad():
        got, want = trainer.concatenated_forward(trainer.model, batch), own(trainer, trainer.model, batch)
        truth = own(trainer, trainer.model.double(), batch)
    for mine, same, exact, rows in zip(got[2:4], want[2:4], truth[2:4], labels.chunk(2), strict=True):
        scored = rows[:, 1:] != -100
        assert len(mine) == scored.sum()
        assert_close_to_truth(mine, *(x[:, :-1][scored].mean(-1) for x in (same, exact)), "logits")


def test_distillation_leaves_out_what_a_tool_said(tmp_path, saved):
    with on_fastpost.patch():
        trainer = trainer_of("distillation", tmp_path, saved, beta=0.5)
    ids, tools = torch.randint(5, V, (3, 9)), torch.rand(3, 5) < 0.5
    batch = {"prompt_ids": ids[:, :4], "completion_ids": ids[:, 4:], "tool_mask": tools.long()}
    batch |= {f"{part}_mask": torch.ones_like(batch[f"{part}_ids"]) for part in ("prompt", "completion")}
    got = trainer._compute_loss(trainer.model, batch, None)
    want = type(trainer)._compute_loss(trainer, trainer.model, batch, None)
    assert got[2] == want[2] == tools.sum() < tools.numel()
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach())


def test_mixed_precision_trains_and_is_unwrapped_without_loss(tmp_path, saved):
    with on_fastpost.patch():
        trainer = trainer_of("sft", tmp_path, saved, bf16=True, max_steps=8, learning_rate=1e-2)
    run = train(trainer)
    assert run.losses[-1] < run.losses[0]
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    assert forwards(trainer) == OURS and model(**inputs(), fused_lm_head=True).log_probs.shape == (3, 11)
