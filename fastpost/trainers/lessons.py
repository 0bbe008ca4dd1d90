"""What a student learns on: sequences, each with what its teacher said of it, where that is stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpost import Batch, Head, TopK
from fastpost.data import Counts, distill_examples, prompt_of
from fastpost.files import Rows
from fastpost.models.loading import load_tokenizer
from fastpost.models.trunk import positions
from fastpost.packing import Example
from fastpost.rollout import Completion
from fastpost.trainers import teacher_cache as cache
from fastpost.trainers.config import Distill
from fastpost.trainers.given import GivenTeacher
from fastpost.trainers.loop import check_lengths, the_device
from fastpost.trainers.start import Start
from fastpost.trainers.teacher import alone, said
from fastpost.trainers.world import World


@dataclass(frozen=True)
class Lesson:
    """A sequence, and what reads the teacher's likeliest tokens in it."""

    example: Example
    known: Callable[[], cache.TopTokens] | None = None  # None: the teacher is there to be asked


def read_lessons(begun: Start, config: Distill, name: str, rows: Rows) -> tuple[list[Lesson], Counts]:
    """Those of "train" or "eval", of which each fits in the model and in a pack."""
    limits = config.max_length, config.max_prompt_length
    examples, counts = distill_examples(rows, begun.tokenizer, *limits, path=name)
    _check_answers(name, examples, config)
    room = positions(begun.model)
    check_lengths([len(example.input_ids) for example in examples], room, config)
    if config.samples:
        _check_room(examples, room, config)
    if config.teacher_cache is None:
        return [Lesson(example) for example in examples], counts
    return _stored(name, examples, begun, config), counts


def answered(lessons: Sequence[Lesson], completions: Sequence[Completion]) -> list[Lesson]:
    """The prompts with these answers to them."""
    prompts = [prompt_of(lesson.example) for lesson in lessons]
    pairs = zip(prompts, completions, strict=True)
    return [Lesson(Example([*p, *c.ids], [False] * len(p) + [True] * len(c.ids))) for p, c in pairs]


def laid(lessons: Sequence[Lesson], batch: Batch, rest: Any) -> TopK:
    """What is stored, in the places that predict its tokens; in the others, which nobody looks at, anything."""
    assert batch.kept is not None
    known = [lesson.known() for lesson in lessons if lesson.known is not None]
    T, K = batch.target.numel(), known[0][0].shape[1] if known else 1
    ids, logp = torch.zeros(T, K, dtype=torch.int64), torch.zeros(T, K)
    if known:
        ids[batch.kept], logp[batch.kept] = (torch.cat(each) for each in zip(*known, strict=True))
    return TopK(ids.to(the_device()), logp.to(the_device()), rest)


# ---- what can be learnt of them ----


def _check_answers(name: str, examples: Sequence[Example], config: Distill) -> None:
    """Whoever is to answer must be there, and must be asked something."""
    if not examples[0].predicted:
        if config.teacher_cache is not None:
            raise ValueError(f"the rows of {name} are prompts alone: without answers teacher_cache has nothing to say")
        if name == "train" and config.lmbda < 1 and not config.seq_kd:
            raise ValueError(
                "dataset has prompts alone, so every answer must be the student's or the teacher's: give lmbda 1, or "
                f"seq_kd; got lmbda {config.lmbda:g}"
            )
    if name == "train" and config.samples and not all(prompt_of(example) for example in examples):
        raise ValueError("dataset has texts without a prompt, and nothing to answer: give lmbda 0, and no seq_kd")


def _check_room(examples: Sequence[Example], room: int | None, config: Distill) -> None:
    """For the longest prompt and an answer to it."""
    longest = max(len(prompt_of(example)) for example in examples) + config.max_completion_length
    for limit, what in ((room, "the positions of the model"), (config.max_tokens_per_batch, "max_tokens_per_batch")):
        if limit is not None and longest > limit:
            raise ValueError(
                f"max_completion_length {config.max_completion_length} and the longest prompt are {longest} tokens "
                f"together, more than {what}, {limit}"
            )


# ---- what is stored ----


def _stored(name: str, examples: Sequence[Example], begun: Start, config: Distill) -> list[Lesson]:
    part = _part(config, name)
    facts = cache.read_facts(part)
    cache.check(part, facts, begun.tokenizer, examples, config.temperature, config.teacher_top_k)
    with begun.world.whole():
        V = Head.of(begun.model).vocabulary
    if facts.vocabulary != V:
        raise ValueError(
            f"teacher_cache {part} is of a vocabulary of {facts.vocabulary}, and the model has one of {V}: they must "
            "be the same"
        )
    known = cache.readers(part, examples, facts, config.teacher_top_k)
    return [Lesson(example, read) for example, read in zip(examples, known, strict=True)]


def remember(config: Distill, given: GivenTeacher, rows: dict[str, Rows]) -> None:
    """Writes what the cache does not have yet. The teacher is loaded for it, and gone before the student comes."""
    if given.get("teacher_model") is not None:
        raise ValueError("teacher_cache is made by a teacher in a directory: save it, and give that as teacher_model")
    missing = [name for name in rows if not cache.is_there(_part(config, name))]
    _check_teacher(config, [name for name in rows if name not in missing])
    if not missing:
        return
    if config.teacher_model is None:
        raise ValueError(f"teacher_cache {_part(config, missing[0])} is not there: give teacher_model, which makes it")
    tokenizer = given.get("processing_class") or load_tokenizer(config.model, config.trust_remote_code)[0]
    teacher, world = alone(config, tokenizer), World.here()
    V = teacher.head().vocabulary
    if config.teacher_top_k > V:
        raise ValueError(f"teacher_top_k must be at most {V}, the vocabulary, got {config.teacher_top_k}")
    for name in missing:
        examples, _ = distill_examples(rows[name], tokenizer, config.max_length, config.max_prompt_length, path=name)
        _check_answers(name, examples, config)
        facts = cache.Facts(
            tokenizer=cache.digest_of_tokenizer(tokenizer),
            data=cache.digest_of_data(examples),
            teacher=cache.digest_of_teacher(config.teacher_model),
            teacher_model=config.teacher_model,
            vocabulary=V,
            temperature=config.temperature,
            top_k=config.teacher_top_k,
            tokens=sum(len(example.predicted) for example in examples),
        )
        shards = cache.shards_of(examples, config.teacher_top_k)
        answers = (said(teacher, [examples[i] for i in rows], config, world) for rows in shards)
        if world.first:
            cache.write(_part(config, name), facts, answers)
        else:
            deque(answers, maxlen=0)
    world.wait()


def _check_teacher(config: Distill, there: Sequence[str]) -> None:
    """A teacher that is named must be the one who said it."""
    if config.teacher_model is None or not there:
        return
    own = cache.digest_of_teacher(config.teacher_model)
    for name in there:
        facts = cache.read_facts(_part(config, name))
        said, here = (facts.teacher, own) if facts.teacher and own else (facts.teacher_model, config.teacher_model)
        if said != here:
            raise ValueError(
                f"teacher_cache {_part(config, name)} is of another teacher, {facts.teacher_model}, than teacher_model "
                f"{config.teacher_model}: choose another directory for this one, or leave teacher_model out"
            )


def _part(config: Distill, name: str) -> Path:
    assert config.teacher_cache is not None
    return Path(config.teacher_cache).expanduser() / name
