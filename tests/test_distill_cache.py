"""A teacher that is stored: next to one that is asked; made once; of what it was made of, and of nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny
from distill_runs import config_of, role_of, teacher_model, window, write_files
from fastpost.trainers import teacher_cache
from fastpost.trainers.config import Distill
from fastpost.trainers.distill import backward, distill
from fastpost.trainers.lessons import Lesson
from fastpost.trainers.teacher import said
from fastpost.trainers.world import ALONE
from preference_runs import gradient, lines, weights
from rules import assert_close_to_truth, assert_gradient_close_to_truth

V = tiny.SHAPE["vocab_size"]


def stored(K: int, **changes: Any) -> list[Lesson]:
    """The window, with what its teacher said of it."""
    config, examples = config_of(teacher_top_k=K, **changes), [lesson.example for lesson in window()]
    answers = said(role_of(teacher_model()), examples, config, ALONE)
    return [Lesson(example, lambda both=both: both) for example, both in zip(examples, answers, strict=True)]


# ---- a step ----


@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
@pytest.mark.parametrize("changes", [{"beta": 0.3, "temperature": 0.7}, {"loss_type": "kd", "temperature": 2.0}])
def test_a_stored_teacher_of_the_whole_vocabulary_is_the_teacher_itself(changes: dict, rest: str):
    config = config_of(**changes, teacher_rest=rest)
    found = []
    for lessons, teacher in ((stored(V, **changes), None), (window(), role_of(teacher_model()))):
        model = tiny.model("qwen3")
        values = backward(model, lessons, teacher, config)
        found.append((values["loss"], torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.testing.assert_close(*(torch.tensor(loss) for loss, _ in found))
    torch.testing.assert_close(*(gradient for _, gradient in found))


def plain(dtype: torch.dtype, rest: str, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean forward KL over the teacher's K tokens and their rest, by Hugging Face's own logits; its gradient."""
    model, teacher = tiny.model("qwen3").to(dtype), teacher_model().to(dtype)
    total, count = torch.zeros((), dtype=dtype), 0
    for example in (lesson.example for lesson in window()):
        ids, at = torch.tensor([example.input_ids]), torch.tensor(example.predicted)
        p, q = (each(input_ids=ids).logits[0, at - 1].log_softmax(-1) for each in (model, teacher))
        best, named = q.detach().topk(K)
        if rest == "renormalize":
            best = best.log_softmax(-1)
        total = total + (best.exp() * (best - p.gather(1, named))).sum()
        if rest == "bucket":
            left = 1 - best.exp().sum(-1)
            others = p.exp().scatter(1, named, 0.0).sum(-1)
            total = total + (left * (left.log() - others.log())).sum()
        count += len(at)
    loss = total / count
    return loss.detach(), gradient(loss, model)


@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
def test_few_tokens_and_their_rest_have_the_gradient_of_their_divergence(rest: str):
    config, model = config_of(beta=0.0, teacher_rest=rest, per_device_train_batch_size=3), tiny.model("qwen3").train()
    values = backward(model, stored(5), None, config)
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    (loss32, grad32), (loss64, grad64) = plain(torch.float32, rest, 5), plain(torch.float64, rest, 5)
    assert_gradient_close_to_truth(ours, grad32, grad64)
    assert_close_to_truth(torch.tensor(values["loss"]), loss32, loss64)
    assert ("reverse_kl" in values) == (rest == "bucket")


# ---- whole runs ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def made(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Distill:
    """A run that has made a cache of 8 tokens a place."""
    out = tmp_path_factory.mktemp("runs")
    cache = {"teacher_cache": out / "cache", "teacher_top_k": 8, "eval_dataset": files / "sums.jsonl"}
    config = config_of(files, out / "straight", **cache)
    distill(config)
    return config


def part_of(config: Distill, name: str = "train") -> Path:
    assert config.teacher_cache is not None
    return Path(config.teacher_cache) / name


def test_whoever_has_the_cache_needs_no_teacher_and_resumes_to_the_bit(made: Distill, tmp_path: Path):
    checkpoint = Path(made.output_dir) / "checkpoint-3"
    again = replace(made, teacher_model=None, output_dir=str(tmp_path / "again"))
    distill(again)
    distill(replace(again, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(checkpoint)))
    for name in ("again", "resumed"):
        assert weights(tmp_path / name) == weights(Path(made.output_dir))
    assert lines(tmp_path / "again") == lines(Path(made.output_dir))
    assert lines(tmp_path / "resumed") == lines(Path(made.output_dir))[3:]
    assert lines(tmp_path / "again")[-1]["loss"] < lines(tmp_path / "again")[0]["loss"]


def test_its_size_is_said_before_it_is_written_and_is_its_size(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = config_of(files, tmp_path / "out", teacher_cache=tmp_path / "cache", teacher_top_k=8, max_steps=1)
    distill(config)
    err = capsys.readouterr().err
    places = json.loads((tmp_path / "cache" / "train" / "teacher.json").read_text())["tokens"]
    assert f"8 tokens in each of {places} places, {places * 64 / 1e9:.3g} GB" in err
    (shard,) = (tmp_path / "cache" / "train").glob("*.safetensors")
    assert places * 64 < shard.stat().st_size < places * 64 + 1000  # the file's own header beside them


def test_several_files_are_the_one(made: Distill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teacher_cache, "SHARD", 64 * 7)  # seven places
    config = replace(made, teacher_cache=str(tmp_path / "cache"), output_dir=str(tmp_path / "out"))
    distill(config)
    assert len(list(part_of(config).glob("*.safetensors"))) > 5
    assert lines(tmp_path / "out") == lines(Path(made.output_dir))


def test_fewer_tokens_than_are_stored_are_the_likeliest_of_them(made: Distill, files: Path, tmp_path: Path):
    few = {"teacher_top_k": 3, "max_steps": 2}
    distill(replace(made, **few, output_dir=str(tmp_path / "of 8")))
    distill(replace(made, **few, output_dir=str(tmp_path / "of 3"), teacher_cache=str(tmp_path / "cache")))
    assert lines(tmp_path / "of 8") == lines(tmp_path / "of 3")


def test_a_cache_that_was_cut_off_is_not_there(made: Distill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = replace(made, teacher_cache=str(tmp_path / "cache"), output_dir=str(tmp_path / "out"))

    def full(path: Path) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr("fastpost.models.saving._sync", full)
    with pytest.raises(ValueError, match=r"teacher_cache .*train could not be written: No space left on device"):
        distill(config)
    assert not list((tmp_path / "cache").iterdir()) and not (tmp_path / "out").exists()


# ---- a cache of something else ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "chats"}, "is of other data, which predict 40 tokens, and these 40"),
        ({"max_length": 5}, "is of other data, which predict 40 tokens, and these 20"),
        ({"temperature": 2.0}, "is of temperature 1, and temperature is 2"),
        ({"teacher_top_k": 9}, "is of the 8 likeliest tokens, and teacher_top_k is 9"),
        ({"model": "words"}, "is of another tokenizer"),
    ],
)
def test_a_cache_of_something_else_is_refused(made: Distill, files: Path, tmp_path: Path, changes: dict, message: str):
    words = shutil.copytree(files / "model", tmp_path / "words")
    text = (words / "tokenizer.json").read_text()
    (words / "tokenizer.json").write_text(
        text.replace('"a":', '"swap":').replace('"b":', '"a":').replace('"swap":', '"b":')
    )
    paths = {"dataset": str(files / "chats.jsonl"), "model": str(words)}
    changes = {name: paths.get(name, x) for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        distill(replace(made, **changes, teacher_model=None, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_cache_of_another_teacher_is_refused(made: Distill, files: Path, tmp_path: Path):
    teacher_model(num_hidden_layers=1).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is of another teacher, .*teacher, than teacher_model .*other"):
        distill(replace(made, teacher_model=str(tmp_path / "other"), output_dir=str(tmp_path / "out")))


def test_teachers_of_a_hub_are_told_apart_by_their_names(made: Distill, tmp_path: Path):
    config = replace(made, teacher_cache=str(tmp_path / "cache"), output_dir=str(tmp_path / "out"))
    shutil.copytree(part_of(made), part_of(config))
    facts = json.loads((part_of(config) / "teacher.json").read_text())
    (part_of(config) / "teacher.json").write_text(json.dumps(facts | {"teacher": None, "teacher_model": "hub/one"}))
    with pytest.raises(ValueError, match="is of another teacher, hub/one, than teacher_model hub/two"):
        distill(replace(config, teacher_model="hub/two"))


def test_a_cache_of_a_larger_vocabulary_is_refused(made: Distill, files: Path, tmp_path: Path):
    tiny.model("qwen3", vocab_size=120).save_pretrained(tmp_path / "larger")
    tiny.tokenizer().save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="is of a vocabulary of 97, and the model has one of 120"):
        distill(replace(made, model=str(tmp_path / "larger"), teacher_model=None, output_dir=str(tmp_path / "out")))


def test_a_spoilt_cache_is_refused_by_its_file(made: Distill, tmp_path: Path):
    shutil.copytree(Path(part_of(made)).parent, tmp_path / "cache")
    file = tmp_path / "cache" / "train" / "00000.safetensors"
    whole = file.read_bytes()
    file.unlink()
    config = replace(made, teacher_cache=str(tmp_path / "cache"), output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"teacher_cache .*train is spoilt: 00000.safetensors is missing"):
        distill(config)
    file.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"teacher_cache .*train is spoilt: 00000.safetensors cannot be read"):
        distill(config)
    save_file({name: torch.zeros(2, 3) for name in ("ids", "logp")}, file)
    with pytest.raises(ValueError, match=r"train is spoilt: 00000.safetensors holds \[2, 3\], and not \["):
        distill(config)
    (tmp_path / "cache" / "train" / "teacher.json").write_text("{")
    with pytest.raises(ValueError, match=r"teacher_cache .*train cannot be read"):
        distill(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lmbda": 0.5}, "not of sampled ones: give lmbda 0, and no seq_kd; got lmbda 0.5"),
        ({"seq_kd": True}, "got lmbda 0 and seq_kd"),
        ({"teacher_rest": "renormalize"}, "the reverse KL to a renormalised teacher is infinite"),
    ],
)
def test_what_a_cache_cannot_say_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config_of(teacher_cache="c", **changes)


def test_a_cache_needs_a_teacher_once_answers_and_a_vocabulary(files: Path, tmp_path: Path):
    config = config_of(files, tmp_path / "out", teacher_cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"teacher_cache .*train is not there: give teacher_model, which makes it"):
        distill(replace(config, teacher_model=None))
    with pytest.raises(ValueError, match="teacher_top_k must be at most 97, the vocabulary, got 98"):
        distill(replace(config, teacher_top_k=98))
    with pytest.raises(ValueError, match="the rows of train are prompts alone: without answers teacher_cache has"):
        distill(replace(config, dataset=str(files / "prompts.jsonl")))
    with pytest.raises(ValueError, match="made by a teacher in a directory: save it, and give that as teacher_model"):
        distill(config, teacher_model=teacher_model())
    assert not (tmp_path / "cache").exists()
