"""Distillation from a teacher that is asked: the gradient of a step against float64 and against TRL's loss, whose
answers a step is about, exact resume, and that it learns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny
from distill_runs import config_of, role_of, teacher_model, window, write_files
from fastpost.cli import main
from fastpost.data import distill_examples, prompt_of
from fastpost.files import read_rows
from fastpost.models.loading import load_model
from fastpost.trainers.distill import backward, distill, speaker
from fastpost.trainers.log import read_lines
from fastpost.trainers.start import start
from fastpost.trainers.teacher import TaughtParts, taught
from preference_runs import gradient, lines, weights
from rules import assert_close_to_truth, assert_gradient_close_to_truth

# ---- a step ----

Equation = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits (n, V) of student and teacher, tokens (n,) -> the sum


def by_trl(beta: float, temperature: float = 1.0) -> Equation:
    def loss(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
        of = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
        return of(p[None], q[None], labels=tokens[None], beta=beta, temperature=temperature, reduction="sum")

    return loss


def kd(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """alpha 0.3, temperature 2."""
    nll = -p.log_softmax(-1).gather(1, tokens[:, None]).sum()
    p, q = (p / 2).log_softmax(-1), (q / 2).log_softmax(-1)
    return 0.3 * nll + 0.7 * 4 * (q.exp() * (q - p)).sum()


EQUATIONS: dict[str, tuple[Equation, dict]] = {
    "the default": (by_trl(1.0), {}),
    "gkd at 0": (by_trl(0.0), {"beta": 0.0}),
    "gkd between, at a temperature": (by_trl(0.3, 0.7), {"beta": 0.3, "temperature": 0.7}),
    "forward_kl": (by_trl(0.0, 2.0), {"loss_type": "forward_kl", "temperature": 2.0}),
    "reverse_kl": (by_trl(1.0), {"loss_type": "reverse_kl"}),
    "kd": (kd, {"loss_type": "kd", "alpha": 0.3, "temperature": 2.0}),
}


def plain(model: nn.Module, teacher: nn.Module, equation: Equation) -> Tensor:
    """The mean over all predicted tokens, by Hugging Face's own logits, one sequence at a time."""
    total, count = torch.zeros((), dtype=next(model.parameters()).dtype), 0
    for example in (lesson.example for lesson in window()):
        ids, at = torch.tensor([example.input_ids]), torch.tensor(example.predicted)
        p, q = (each(input_ids=ids).logits[0, at - 1] for each in (model, teacher))
        total, count = total + equation(p, q.detach(), ids[0, at]), count + len(at)
    return total / count


@pytest.mark.parametrize("rows", [{"per_device_train_batch_size": 3}, {"max_tokens_per_batch": 16}])
@pytest.mark.parametrize("kind", EQUATIONS)
def test_a_window_has_the_gradient_of_the_mean_over_all_its_tokens(kind: str, rows: dict):
    equation, changes = EQUATIONS[kind]
    model = tiny.model("qwen3").train()
    values = backward(model, window(), role_of(teacher_model()), config_of(**changes, **rows))
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    same, truth = ((tiny.model("qwen3").to(d), teacher_model().to(d)) for d in (torch.float32, torch.float64))
    loss32, loss64 = plain(*same, equation), plain(*truth, equation)
    assert_gradient_close_to_truth(ours, gradient(loss32, same[0]), gradient(loss64, truth[0]))
    assert_close_to_truth(torch.tensor(values["loss"]), loss32, loss64)


def test_both_kls_of_a_step_are_logged_whatever_it_descends():
    values = backward(tiny.model("qwen3"), window(), role_of(teacher_model()), config_of(beta=0.5))
    for name, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0)):
        same, truth = (
            plain(tiny.model("qwen3").to(d), teacher_model().to(d), by_trl(beta))
            for d in (torch.float32, torch.float64)
        )
        assert_close_to_truth(torch.tensor(values[name]), same, truth)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    model = tiny.model("qwen3")
    values = backward(model, window(), role_of(tiny.model("qwen3")), config_of())
    assert values["loss"] == values["forward_kl"] == values["reverse_kl"] == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


# ---- rows ----


def test_every_format_gives_a_prompt_and_an_answer_but_texts_and_prompts_alone(tmp_path: Path):
    files, tokenizer = write_files(tmp_path), tiny.tokenizer()
    read = lambda name: distill_examples(read_rows(files / f"{name}.jsonl"), tokenizer, 1024)[0][0]  # noqa: E731
    said = lambda ids: tokenizer.decode(ids)  # noqa: E731
    for name, prompt, whole in (
        ("sums", "0+0=", "0+0=0<eos>"),
        ("chats", "<|user|>0+0=<|assistant|>", "<|user|>0+0=<|assistant|>0<eos>"),
        ("prompts", "0+0=", "0+0="),
        ("texts", "", "0+0=0<eos>"),
    ):
        example = read(name)
        assert (said(prompt_of(example)), said(example.input_ids)) == (prompt, whole)
        assert len(example.predicted) == len(example.input_ids) - max(1, len(prompt_of(example)))


def test_a_conversation_ends_with_an_answer():
    with pytest.raises(ValueError, match="row 0, column 'messages' must end with what the assistant answers"):
        distill_examples([{"messages": [{"role": "user", "content": "a"}]}], tiny.tokenizer(), None)


def test_a_share_of_the_steps_is_the_students_and_none_or_all_of_them_at_the_ends():
    some, always, never = (config_of(lmbda=share, seq_kd=share == 0) for share in (0.3, 1, 0))
    who = [speaker(some, step) for step in range(2000)]
    assert set(who) == {"student", "data"}
    # the share of so many draws has a deviation of 0.01: six of them
    assert abs(who.count("student") / 2000 - 0.3) < 6 * (0.3 * 0.7 / 2000) ** 0.5
    assert {speaker(always, step) for step in range(200)} == {"student"}
    assert {speaker(never, step) for step in range(200)} == {"teacher"}


# ---- whole runs ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And a teacher that is an adapter of the student's base."""
    from fastpost.trainers.config import Sft
    from fastpost.trainers.sft import sft

    found = write_files(tmp_path_factory.mktemp("files"))
    common = {"model": found / "model", "dataset": found / "sums.jsonl", "max_steps": 2, "save_steps": 0}
    sft(Sft(**common, output_dir=found / "adapter", lora_r=4, learning_rate=0.1))
    return found


def test_a_run_learns_what_its_teacher_says_of_the_data(files: Path, tmp_path: Path):
    out = tmp_path / "out"
    distill(config_of(files, out, max_steps=40, eval_dataset=files / "sums.jsonl", eval_steps=10, save_steps=0))
    first, *_, last = lines(out)
    assert last["loss"] < 0.5 * first["loss"] and last["eval_loss"] < 0.5 * first["loss"]
    names = {"forward_kl", "reverse_kl", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"}
    assert names | {"eval_forward_kl", "eval_reverse_kl"} <= last.keys()
    assert not (out / "completions.jsonl").exists()


def test_on_its_own_answers_a_student_comes_nearer_to_its_teacher_on_prompts_it_never_saw(files: Path, tmp_path: Path):
    out, held_out = tmp_path / "out", files / "held_out.jsonl"
    changes = {"lmbda": 1.0, "max_steps": 40, "learning_rate": 1e-2, "save_steps": 0, "eval_dataset": held_out}
    distill(config_of(files, out, "prompts", **changes))
    first, *_, last = lines(out)
    assert last["eval_loss"] == pytest.approx(last["eval_reverse_kl"])
    assert last["eval_loss"] < 0.5 * first["loss"]
    assert last["completions/max_length"] <= 5
    assert read_lines(out / "metrics.jsonl")[-1]["step_time/rollout"] > 0
    sample = read_lines(out / "completions.jsonl")[-1]
    assert sample["step"] == 40 and sample["prompt"][1] == "+"


KINDS: dict[str, tuple[str, dict]] = {
    "the data's answers": ("sums", {}),
    "its own": ("prompts", {"lmbda": 1.0}),
    "some of each, packed": ("sums", {"lmbda": 0.5, "max_tokens_per_batch": 30, "beta": 0.5}),
    "the teacher's, and its own": ("chats", {"lmbda": 0.5, "seq_kd": True, "loss_type": "kd"}),
    "an adapter with dropout": ("sums", {"lora_r": 4, "lora_dropout": 0.3, "lmbda": 0.5}),
    "two adapters of one base": ("sums", {"lora_r": 4, "teacher_model": "adapter", "lmbda": 0.5, "seq_kd": True}),
    "checkpointed": ("sums", {"lora_r": 4, "teacher_model": "adapter", "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_k_steps_and_a_resume_give_the_bits_of_the_straight_run(files: Path, tmp_path: Path, kind: str):
    rows, changes = KINDS[kind]
    changes = {name: str(files / x) if name == "teacher_model" else x for name, x in changes.items()}
    straight = config_of(files, tmp_path / "straight", rows, **changes)
    distill(straight)
    checkpoint = str(tmp_path / "straight" / "checkpoint-3")
    distill(replace(straight, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint))
    assert weights(tmp_path / "resumed") == weights(tmp_path / "straight")
    assert lines(tmp_path / "resumed") == lines(tmp_path / "straight")[3:]
    begun, _ = load_model(tmp_path / "straight" / "checkpoint-3")
    ended, _ = load_model(tmp_path / "straight")
    assert any(not torch.equal(a, b) for a, b in zip(begun.parameters(), ended.parameters(), strict=True))


def test_a_teacher_on_the_students_base_says_what_it_says_apart(files: Path, tmp_path: Path):
    """And costs no model of its own, trains nothing, and is not saved."""
    config = config_of(files, tmp_path / "shared", lora_r=4, teacher_model=files / "adapter", max_steps=2)
    begun = start(config, {}, taught)
    assert isinstance(begun.parts, TaughtParts) and begun.parts.teacher.model is begun.model
    distill(config)
    apart, _ = load_model(files / "adapter")
    distill(replace(config, teacher_model=None, output_dir=str(tmp_path / "apart")), teacher_model=apart)
    assert lines(tmp_path / "shared") == lines(tmp_path / "apart")
    assert weights(tmp_path / "shared") == weights(tmp_path / "apart")
    saved = {path.name for path in (tmp_path / "shared").iterdir()}
    assert "adapter_model.safetensors" in saved and "teacher" not in saved


def test_the_base_of_an_adapter_can_teach_it(files: Path, tmp_path: Path):
    config = config_of(files, tmp_path / "out", model=files / "adapter", teacher_model=files / "model")
    begun = start(config, {}, taught)
    assert isinstance(begun.parts, TaughtParts)
    assert begun.parts.teacher.model is begun.model and begun.parts.teacher.adapter is None
    distill(config)
    first, *_, last = lines(tmp_path / "out")
    assert 0 < last["loss"] < first["loss"]


# ---- bad input ----


def smaller_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def test_another_vocabulary_is_refused_by_the_names_of_both(files: Path, tmp_path: Path):
    teacher_model().save_pretrained(tmp_path / "words")
    smaller_tokenizer().save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=r"teacher_model .*words' has another vocabulary than the model .*model'"):
        distill(config_of(files, tmp_path / "out", teacher_model=tmp_path / "words"))
    with pytest.raises(ValueError, match="teacher has a vocabulary of 120 and the policy one of 97"):
        distill(config_of(files, tmp_path / "out", teacher_model=None), teacher_model=teacher_model(vocab_size=120))
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_the_student_is_refused(files: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"teacher_model '.*' is the model itself: there is nothing to learn"):
        config_of(files, teacher_model=files / "model" / ".." / "model")
    model, tokenizer = load_model(files / "model")
    with pytest.raises(ValueError, match="teacher_model is the model itself, which trains"):
        config = config_of(files, tmp_path / "out", model="", teacher_model=None)
        distill(config, model=model, processing_class=tokenizer, teacher_model=model)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ("sums", {"teacher_model": None}, "teacher_model must be given: a directory in the config"),
        ("prompts", {"lmbda": 0.5}, "dataset has prompts alone, .* give lmbda 1, or seq_kd; got lmbda 0.5"),
        ("texts", {"lmbda": 0.5}, "texts without a prompt, and nothing to answer: give lmbda 0, and no seq_kd"),
        ("sums", {"lmbda": 1, "max_completion_length": 125}, "129 tokens together, more than the positions .*, 128"),
        ("sums", {"lmbda": 1, "max_tokens_per_batch": 8}, "9 tokens together, more than max_tokens_per_batch, 8"),
    ],
)
def test_rows_that_cannot_be_learnt_from_so_are_refused(
    files: Path, tmp_path: Path, rows: str, changes: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        distill(config_of(files, tmp_path / "out", rows, **changes))
    assert not (tmp_path / "out").exists()


def test_a_knob_that_the_loss_has_not_is_refused():
    with pytest.raises(ValueError, match="loss_type gkd has no alpha: leave it out, or take kd"):
        config_of(alpha=0.2)
    with pytest.raises(ValueError, match="loss_type kd has no beta"):
        config_of(loss_type="kd", beta=0.2)


def test_the_command_line_runs_it(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["--model", str(files / "model"), "--dataset", str(files / "sums.jsonl"), "--max_steps", "1"]
    words += ["--teacher_model", str(files / "teacher"), "--lmbda", "0", "--output_dir", str(tmp_path / "out")]
    assert main(["distill", *words]) == 0
    assert len(lines(tmp_path / "out")) == 1
    assert "train: 20 rows, 20 examples" in capsys.readouterr().err
