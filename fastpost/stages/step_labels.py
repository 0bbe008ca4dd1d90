"""`fastpost prm-label`: which steps of a policy's own solutions are right, by how often they can still be completed.

Math-Shepherd (arXiv:2312.08935): of each step K completions go on from there, and those that the rewards find right
count. The soft label of a step is their share, an estimate with the standard error sqrt(p (1 - p) / K); the hard label
is whether there is one at all. The last step needs none: the solution itself is right or not. So one wrong step makes
the labels fall, and no person has read it.

OUT/steps.jsonl   a row a solution: prompt, completions (the steps), labels, and soft_labels; what `fastpost prm` reads
OUT/report.json   right steps by their place

Beginnings that several solutions of a prompt share are completed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fastpost.data import Prompt
from fastpost.data.chat import rendered
from fastpost.data.steps import laid_out, steps_of
from fastpost.stages.asking import asked, fits, journal_of, read_prompts
from fastpost.stages.config import PrmLabel
from fastpost.stages.groups import Answer, Group, judged
from fastpost.stages.jury import Jury
from fastpost.stages.policy import Policy
from fastpost.stages.rows import table, write_json, write_rows
from fastpost.trainers.log import say
from fastpost.trainers.options import check_config
from fastpost.trainers.world import check_alone

Beginning = tuple[int, tuple[str, ...]]  # the number of a prompt, and the steps so far


@dataclass(frozen=True)
class Begun(Prompt):
    """A prompt with the beginning of its answer, of which a sampler writes the rest."""

    beginning: str = ""

    def answered(self, text: str) -> Any:
        return super().answered(self.beginning + text)


@dataclass(frozen=True)
class Solution:
    """An answer in steps."""

    group: Group
    steps: tuple[str, ...]
    right: bool

    def beginnings(self) -> Iterator[Beginning]:
        """Up to each step but the last."""
        for n in range(1, len(self.steps)):
            yield self.group.key, self.steps[:n]


def prm_label(config: PrmLabel) -> dict[str, Any]:
    """Writes the files and prints a table; returns what report.json has."""
    check_config(config, PrmLabel)
    check_alone("prm-label")
    output, jury, policy = Path(config.output_dir), Jury.of(config), Policy.of(config)
    prompts, work = read_prompts(config, policy.tokenizer), journal_of(config)
    size = config.generation_batch_size
    groups = asked(policy, prompts, config.num_generations, work, size, jury=jury, turn="solutions")
    solutions = solutions_of(list(groups), config)
    of_all = dict.fromkeys(beginning for solution in solutions for beginning in solution.beginnings())
    begun = {beginning: begin(policy.tokenizer, prompts, beginning, config.step_separator) for beginning in of_all}
    begun = {beginning: prompt for beginning, prompt in begun.items() if fits(policy, prompt)}
    say(f"prm-label: {len(solutions)} solutions, {len(begun)} beginnings to be completed")
    if len(begun) < len(of_all):
        say(
            f"prm-label: {len(of_all) - len(begun)} beginnings leave the model no positions for a completion: their "
            "solutions are left out; lower max_completion_length"
        )
    completed = asked(policy, list(begun.values()), config.num_completions, work, size, jury=jury, turn="completions")
    shares = {beginning: share_right(g.answers, config) for beginning, g in zip(begun, completed, strict=True)}
    rows = [row for solution in solutions if (row := labelled(solution, shares, config.labels)) is not None]
    report = report_of(rows, len(solutions), len(begun))
    write_rows(output / "steps.jsonl", rows)
    write_json(output / "report.json", report)
    print(table(report["by_place"]), flush=True)
    return report


def solutions_of(groups: Sequence[Group], config: PrmLabel) -> list[Solution]:
    """The different solutions of all prompts that somebody judged. ValueError if there is none."""
    found: dict[tuple[int, tuple[str, ...]], Solution] = {}
    for group in groups:
        for reward, answer in judged(group.answers):
            steps = tuple(steps_of(answer.text, config.step_separator))
            found.setdefault((group.key, steps), Solution(group, steps, reward > config.right_above))
    if not found:
        raise ValueError(f"reward {', '.join(config.reward)} applied to no answer of {config.dataset}")
    return list(found.values())


def begin(tokenizer: Any, prompts: Sequence[Prompt], beginning: Beginning, separator: str) -> Begun:
    """What is asked to go on, in the tokens that a model of steps will read."""
    key, steps = beginning
    prompt = prompts[key]
    ids, _ = laid_out(tokenizer, prompt.input_ids, steps, separator)
    return Begun(prompt.prompt, ids, prompt.columns, "".join(step + separator for step in steps))


def share_right(answers: Sequence[Answer], config: PrmLabel) -> float | None:
    """Of those that were judged."""
    rewards = [reward for reward, _ in judged(answers)]
    return fmean(reward > config.right_above for reward in rewards) if rewards else None


def labelled(solution: Solution, shares: Mapping[Beginning, float | None], labels: str) -> dict[str, Any] | None:
    """A row for `fastpost prm`; None where nobody judged what became of a step, or nothing could."""
    soft = [*(shares.get(beginning) for beginning in solution.beginnings()), float(solution.right)]
    if None in soft:
        return None
    hard = [share is not None and share > 0 for share in soft]
    row = {"prompt": solution.group.prompt, "completions": list(solution.steps), **rendered(solution.group.columns)}
    return row | {"labels": hard if labels == "hard" else soft, "soft_labels": soft}


def report_of(rows: Sequence[Mapping[str, Any]], solutions: int, beginnings: int) -> dict[str, Any]:
    """What the labels are, by the place of a step."""
    longest = max((len(row["completions"]) for row in rows), default=0)
    places = []
    for i in range(longest):
        soft = [row["soft_labels"][i] for row in rows if len(row["completions"]) > i]
        hard = fmean(share > 0 for share in soft)
        places.append({"step": i + 1, "steps": len(soft), "can be completed": hard, "completed": fmean(soft)})
    return {
        "solutions": len(rows),
        "not_judged": solutions - len(rows),
        "beginnings_completed": beginnings,
        "right": fmean(row["soft_labels"][-1] for row in rows) if rows else None,
        "by_place": places,
    }
