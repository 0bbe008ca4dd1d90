"""`fastpost guided`: answers searched step by step, where a reward of what is written so far says which way to go on.

Beam search by a process reward model (arXiv:2408.03314): B x M first steps are sampled; the best B are kept, and each
is gone on from M times, until all that are kept have ended. At every step B x M answers are alive, so that it costs as
much as the best of N = B M, which chooses once, at the end. The reward is of prompt and answer so far: that of
`fastpost prm`, `last` for its newest step, or any other that can judge half an answer.

OUT/best.jsonl    a row a prompt, to train on
OUT/report.json   rewards, the tokens that were sampled, steps
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fastpost.data import Prompt
from fastpost.stages.asking import asked, fits, journal_of, read_prompts
from fastpost.stages.config import Guided
from fastpost.stages.demonstrations import demonstration
from fastpost.stages.groups import Answer, Group
from fastpost.stages.journal import Journal
from fastpost.stages.jury import Jury
from fastpost.stages.policy import Policy
from fastpost.stages.rows import table, write_json, write_rows
from fastpost.stages.step_labels import begin
from fastpost.trainers.log import say
from fastpost.trainers.options import check_config
from fastpost.trainers.world import check_alone


@dataclass(frozen=True)
class Beam:
    """An answer so far."""

    answer: Answer
    steps: tuple[str, ...] = ()
    ends_a_step: bool = True  # and may go on

    @property
    def rank(self) -> float:
        return -math.inf if self.answer.reward is None else self.answer.reward


START = Beam(Answer("", 0, False))


def guided(config: Guided) -> dict[str, Any]:
    """Writes the files and prints a table; returns what report.json has."""
    check_config(config, Guided)
    check_alone("guided")
    output, jury, policy = Path(config.output_dir), Jury.of(config), Policy.of(config)
    stop = (*policy.sampling.stop, config.step_separator)
    policy = replace(policy, sampling=replace(policy.sampling, stop=stop))
    prompts, work = read_prompts(config, policy.tokenizer), journal_of(config)
    beams, sampled = [[START] for _ in prompts], 0
    for depth in range(config.max_solution_steps):
        if not any(beam.ends_a_step for kept in beams for beam in kept):
            break
        beams, tokens = widened(beams, depth, prompts, policy, jury, work, config)
        sampled += tokens
    chosen = [max(kept, key=lambda beam: (not beam.ends_a_step, beam.rank)) for kept in beams]
    groups = [Group(i, prompt.prompt, prompt.columns, []) for i, prompt in enumerate(prompts)]
    known = [(group, beam) for group, beam in zip(groups, chosen, strict=True) if beam.answer.reward is not None]
    if not known:
        raise ValueError(f"reward {', '.join(config.reward)} applied to no answer of {config.dataset}")
    if len(known) < len(groups):
        say(f"guided: no reward function applied to {len(groups) - len(known)} of {len(groups)} prompts")
    report = report_of([beam for _, beam in known], sampled / len(groups), config)
    write_rows(output / "best.jsonl", [demonstration(group, beam.answer) for group, beam in known])
    write_json(output / "report.json", report)
    print(table([{name: x for name, x in report.items() if name != "rewards"} | report["rewards"]]), flush=True)
    return report


def widened(
    beams: Sequence[Sequence[Beam]],
    depth: int,
    prompts: Sequence[Prompt],
    policy: Policy,
    jury: Jury,
    work: Journal,
    config: Guided,
) -> tuple[list[list[Beam]], int]:
    """The best of all that goes on by a step, and of what has ended; and how many tokens were sampled."""
    B, separator = config.num_beams, config.step_separator
    places = [(p, b) for p, kept in enumerate(beams) for b, beam in enumerate(kept) if beam.ends_a_step]
    begun = {(p, b): begin(policy.tokenizer, prompts, (p, beams[p][b].steps), separator) for p, b in places}
    going = {place: prompt for place, prompt in begun.items() if not depth or fits(policy, prompt)}
    if len(going) < len(begun):
        say(f"guided: {len(begun) - len(going)} answers outgrew the model's positions, and end with step {depth}")
    found = [
        [replace(beam, ends_a_step=False) for b, beam in enumerate(kept) if (p, b) not in going]
        for p, kept in enumerate(beams)
    ]
    each, tokens = config.num_expansions * (1 if depth else B), 0
    keys, size = [p * B + b for p, b in going], config.generation_batch_size
    groups = asked(policy, list(going.values()), each, work, size, jury=jury, turn=f"step {depth}", keys=keys)
    for (p, b), group in zip(going, groups, strict=True):
        found[p] += [longer(beams[p][b], answer, separator) for answer in group.answers]
        tokens += sum(answer.tokens for answer in group.answers)
    return [sorted(kept, key=lambda beam: -beam.rank)[:B] for kept in found], tokens


def longer(beam: Beam, answer: Answer, separator: str) -> Beam:
    """By a step, or by its end."""
    text, goes_on = beam.answer.text + answer.text, answer.finished and answer.text.endswith(separator)
    both = [x.logp for x in (beam.answer, answer) if x.logp is not None]
    logp = sum(both) if answer.logp is not None else None
    steps = (*beam.steps, answer.text.removesuffix(separator))
    whole = replace(answer, text=text, tokens=beam.answer.tokens + answer.tokens, logp=logp)
    return Beam(replace(whole, finished=answer.finished and not goes_on), steps, goes_on)


def report_of(chosen: Sequence[Beam], tokens_a_prompt: float, config: Guided) -> dict[str, Any]:
    """Of the answers that were chosen, and what they cost."""
    names = dict.fromkeys(name for beam in chosen for name in beam.answer.rewards or ())
    given = {name: [x for beam in chosen if (x := (beam.answer.rewards or {}).get(name)) is not None] for name in names}
    return {
        "num_beams": config.num_beams,
        "num_expansions": config.num_expansions,
        "prompts": len(chosen),
        "score": fmean(beam.rank for beam in chosen),
        "rewards": {name: fmean(numbers) for name, numbers in given.items() if numbers},
        "steps": fmean(len(beam.steps) for beam in chosen),
        "clipped_ratio": fmean(not beam.answer.finished for beam in chosen),
        "tokens_a_prompt": tokens_a_prompt,
    }
