"""Distillation (arXiv:1503.02531): a divergence between student and teacher, over the whole vocabulary, in each place.

The places are those of the data's answers, of the student's own (GKD, arXiv:2306.13649: a share `lmbda` of the steps),
or of the teacher's (arXiv:1606.07947). The teacher reads the pack that the student reads, and its logits are never held
either; or it has read the data set once, and its likeliest tokens are in a cache (`fastpost.trainers.teacher_cache`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from fastpost import Batch, Head, Loss, Stats, TopK, fused_loss, losses, metrics
from fastpost.data import prompt_of
from fastpost.models.role import Role
from fastpost.packing import Packed, pack, placeholder
from fastpost.rollout import Completion, generate
from fastpost.trainers.balance import hidden_and_balance
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Distill
from fastpost.trainers.examples import read_examples
from fastpost.trainers.given import GivenTeacher, read_data
from fastpost.trainers.lessons import Lesson, answered, laid, read_lessons, remember
from fastpost.trainers.loop import autocast, bins, evaluating, seed_of, the_device, without_dropout
from fastpost.trainers.options import check_config
from fastpost.trainers.run import Run
from fastpost.trainers.start import Start, policy, start
from fastpost.trainers.teacher import TaughtParts, taught
from fastpost.trainers.world import ALONE, World
from fastpost.types import IGNORE
from fastpost.weights import Window, token_mean


def distill(config: Distill, **given: Unpack[GivenTeacher]) -> Any:
    """Trains config.model on what its teacher says, and leaves the result in config.output_dir; returns the model."""
    check_config(config, Distill)
    check_output_dir(config)
    rows = read_data(config, given, "distill")
    if config.teacher_cache is not None:
        remember(config, given, rows)
    begun = start(config, given, taught if config.teacher_cache is None else policy)
    model, teacher = begun.model, begun.parts.teacher if isinstance(begun.parts, TaughtParts) else None
    if config.disable_dropout:
        without_dropout(model)
    data, facts = read_examples(rows, "distill", begun.tokenizer, partial(read_lessons, begun, config))
    with Run("distill", config, begun, len(data["train"]), data=facts) as run:
        for _ in run.steps():
            window, shown = next_window(run, data["train"], begun, teacher, config)
            values = backward(model, window, teacher, config, run.world)
            run.update(values | shown, sum(len(lesson.example.input_ids) for lesson in window))
            if run.evaluates and "eval" in data:
                run.note(evaluate(begun, data["eval"], teacher, config))
    return run.finish()


# ---- what a step is about ----


def next_window(
    run: Run, lessons: Sequence[Lesson], begun: Start, teacher: Role | None, config: Distill
) -> tuple[list[Lesson], dict[str, float]]:
    """The next lessons, answered by whom this step's answers are of; and what the log shows of that."""
    first = run.taken
    window = [lessons[i] for i in run.take()]
    who = speaker(config, run.step)
    if who == "data":
        return window, {}
    began = time.perf_counter()
    seed, keys = seed_of(config.seed, run.step), range(first, first + len(window))
    completions = sampled(window, begun, teacher if who == "teacher" else None, config, seed, keys)
    run.clock.spend({"step_time/rollout": time.perf_counter() - began})
    window = answered(window, completions)
    run.show(_sample(run.step + 1, window[0], begun.tokenizer))
    lengths, finished = zip(*((len(c.ids), c.finished) for c in completions), strict=True)
    facts = metrics.floats(metrics.completions(torch.tensor(lengths), torch.tensor(finished)))
    return window, facts


def speaker(config: Distill, step: int) -> Literal["student", "teacher", "data"]:
    """Whose answers a step is about: a draw that depends on the seed and the step alone."""
    if random.Random(seed_of(config.seed, step)).random() < config.lmbda:
        return "student"
    return "teacher" if config.seq_kd else "data"


def sampled(
    lessons: Sequence[Lesson], begun: Start, teacher: Role | None, config: Distill, seed: int, keys: Sequence[int]
) -> list[Completion]:
    """An answer to each prompt, by the teacher, or the student where that is None. Every process asks for some."""
    prompts, world = [prompt_of(lesson.example) for lesson in lessons], begun.world
    own, own_keys = world.slice(prompts), world.slice(keys)
    how = {"sampling": config.sampling(seed), "batch_size": config.generation_batch_size}
    ask = partial(generate, prompt_ids=own, keys=own_keys, **how)
    with autocast(config), world.whole(), nullcontext() if teacher is None else teacher.using():
        model = begun.model if teacher is None else teacher.model
        return world.gathered(ask(model, begun.tokenizer) if own else [])


def _sample(step: int, lesson: Lesson, tokenizer: Any) -> Iterator[Mapping[str, Any]]:
    """A line of completions.jsonl."""
    ids, prompt = lesson.example.input_ids, prompt_of(lesson.example)
    asked, said = tokenizer.batch_decode([prompt, ids[len(prompt) :]], skip_special_tokens=True)
    yield {"step": step, "prompt": asked, "completion": said}


# ---- a step ----


def backward(
    model: Any, window: Sequence[Lesson], teacher: Role | None, config: Distill, world: World = ALONE
) -> dict[str, float]:
    """Adds the gradient of the mean loss over all predicted tokens of the window, and of a router's; returns means."""
    lengths = [len(lesson.example.input_ids) for lesson in window]
    whole = Window(sum(len(lesson.example.predicted) for lesson in window), len(window), world.size)
    seen = {}
    for rows in world.turns(world.share(bins(lengths, config), lengths)):
        lessons = [window[i] for i in rows]
        packed = pack([lesson.example for lesson in lessons] or placeholder())
        packed = replace(packed, batch=replace(packed.batch, weight=token_mean(packed.batch, whole)))
        says = laid(lessons, packed.batch, config.teacher_rest) if teacher is None else teacher
        packed = packed.to(the_device())
        with autocast(config):
            work = partial(_losses, model, packed, says, sum(lengths) / world.size, config)
            loss, balance, stats, of_router = world.through(work)
        if torch.is_grad_enabled():
            (loss + balance).backward()
        of_step = {"loss": metrics.total(loss / world.size)}
        seen = metrics.joined(seen, of_step, _seen(stats, packed.batch), of_router)
    return metrics.floats(metrics.over_ranks(seen))


def _losses(
    model: Any, packed: Packed, teacher: Role | TopK, tokens: float, config: Distill
) -> tuple[Tensor, Tensor | float, Stats, dict[str, metrics.Part]]:
    """What a pack adds to a step of so many tokens: its loss, and that of a router."""
    hidden, balance, of_router = hidden_and_balance(model, packed, tokens, config)
    reference = teacher if isinstance(teacher, TopK) else (teacher.hidden(packed), teacher.head())
    infinite = isinstance(teacher, TopK) and teacher.rest == "renormalize"
    loss, stats = fused_loss(
        objective(config),
        hidden,
        Head.of(model),
        packed.batch,
        reference=reference,
        temperature=config.temperature,
        jsd_beta=config.beta,
        outputs=("entropy", "top1", "forward_kl", *(() if infinite else ("reverse_kl",))),
        return_stats=True,
    )
    return loss, balance, stats, of_router


def objective(config: Distill) -> Loss:
    return losses.kd.bind(alpha=config.alpha) if config.loss_type == "kd" else getattr(losses, config.loss_type)


def _seen(stats: Stats, batch: Batch) -> dict[str, metrics.Part]:
    """forward_kl KL(teacher || student) and reverse_kl KL(student || teacher), nats a token, and those of sft."""
    apart = {"forward_kl": stats.forward_kl, "reverse_kl": stats.reverse_kl}
    kept = batch.target != IGNORE
    return metrics.sft(stats, batch) | {name: metrics.mean(x, kept) for name, x in apart.items() if x is not None}


@torch.no_grad()
def evaluate(begun: Start, lessons: Sequence[Lesson], teacher: Role | None, config: Distill) -> dict[str, float]:
    """The same means over held-out rows: on their answers, or where they have none on the student's own."""
    if not lessons[0].example.predicted:
        completions = sampled(lessons, begun, None, config, config.seed, range(len(lessons)))
        lessons = answered(lessons, completions)
    with evaluating(begun.model):
        values = backward(begun.model, lessons, teacher, config, begun.world)
    return {f"eval_{name}": value for name, value in values.items()}
