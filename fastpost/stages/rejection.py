"""`fastpost rejection`: rounds of sampling, selection by reward, and SFT on what was selected.

  RAFT              arXiv:2304.06767  the best answer of each prompt; each round trains the last round's model
  STaR              arXiv:2203.14465  right answers, and for the rest those of a hint; each round trains the base
  ReST, ReST-EM     arXiv:2308.08998, arXiv:2312.06585  all answers above a threshold; ReST-EM trains the base

OUT/round-1.jsonl  what round 1 trains on, in the order of the prompts; OUT/round-1/ is its run of `fastpost sft`
OUT/work.jsonl     every answer, and each round that is over: the same command goes on amid a round, its SFT included
OUT/report.json    a line a round, as in the table; the model of the last round is that of OUT itself
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fastpost.data import Prompt
from fastpost.data.chat import check_generation_mask
from fastpost.models.adapters import is_adapter
from fastpost.models.loading import load_tokenizer
from fastpost.models.saving import written_aside
from fastpost.stages.asking import asked, fits, journal_of, read_prompts, schemas_of
from fastpost.stages.config import Rejection
from fastpost.stages.demonstrations import demonstration
from fastpost.stages.diversity import distinct_answers, distinct_n
from fastpost.stages.groups import Answer, Group, judged
from fastpost.stages.hints import check_hint, hinted
from fastpost.stages.journal import Journal
from fastpost.stages.jury import Jury
from fastpost.stages.policy import Policy
from fastpost.stages.rows import table, write_json, write_rows
from fastpost.stages.selecting import selected
from fastpost.trainers import checkpoint
from fastpost.trainers.config import Sft
from fastpost.trainers.log import say
from fastpost.trainers.options import check_config
from fastpost.trainers.sft import sft
from fastpost.trainers.world import check_alone
from fastpost.turns.metrics import turn_metrics

Line = dict[str, Any]  # of the table
FREE = (checkpoint.FREE - {"eval_dataset"}) | {"rounds"}  # they decide nothing of a round that is over
OF_A_RUN = ("metrics.jsonl", "metrics.png", "run.json")  # what a directory has beside its model


@dataclass(frozen=True)
class Work:
    """What all rounds have in common."""

    config: Rejection
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]  # none: nothing is held out
    jury: Jury
    journal: Journal
    tokenizer: Any
    schemas: list[Any] | None  # of the tools that prompts show

    def asked(self, policy: Policy, prompts: Sequence[Prompt], n: int, turn: str, **more: Any) -> list[Group]:
        size = self.config.generation_batch_size
        return list(asked(policy, prompts, n, self.journal, size, jury=self.jury, turn=turn, **more))


def rejection(config: Rejection) -> list[Line]:
    """Does the rounds that are not done yet and prints a line each; returns what report.json has."""
    check_config(config, Rejection)
    check_alone("rejection")
    work = _begun(config)
    for number in range(config.rounds + 1):
        if f"round/{number}" not in work.journal:
            work.journal.add({f"round/{number}": _round(work, number)})
        say(table([work.journal[f"round/{number}"]]))
    lines = [work.journal[f"round/{number}"] for number in range(config.rounds + 1)]
    output = Path(config.output_dir)
    write_json(output / "report.json", lines)
    _leave(Path(model_after(config, config.rounds)), output)
    print(table(lines), flush=True)
    return lines


def _begun(config: Rejection) -> Work:
    jury = Jury.of(config)
    tokenizer, _ = load_tokenizer(config.model, config.trust_remote_code)
    prompts = read_prompts(config, tokenizer)
    held_out = read_prompts(replace(config, dataset=config.eval_dataset), tokenizer) if config.eval_dataset else []
    if config.hint is not None:
        check_hint(config.hint, prompts)
    if config.converses:
        check_generation_mask({"prompt": prompts[0].prompt}, tokenizer)
    work = journal_of(config, free=FREE)
    return Work(config, prompts, held_out, jury, work, tokenizer, schemas_of(config))


def model_after(config: Rejection, number: int) -> str:
    """The model that a round left; 0: the one before all."""
    return str(Path(config.output_dir) / f"round-{number}") if number else config.model


# ---- a round ----


def _round(work: Work, number: int) -> Line:
    """Samples, selects, trains, and looks how good that is; round 0 looks only."""
    line: Line = {"round": number}
    if number:
        if f"trained/{number}" not in work.journal:
            rows, found = _selected(work, number)
            write_rows(Path(work.config.output_dir) / f"round-{number}.jsonl", rows)
            sft(config_of_round(work.config, number))
            work.journal.add({f"trained/{number}": found})
        line |= work.journal[f"trained/{number}"]
    if work.held_out:
        line["held_out"] = _held_out_score(work, number)
    return line


def _selected(work: Work, number: int) -> tuple[list[dict[str, Any]], Line]:
    """The rows that a round trains on, and what is known of all its answers."""
    config = work.config
    policy = Policy.of(config, model_after(config, number - 1))
    groups = work.asked(policy, work.prompts, config.num_generations, f"round-{number}")
    kept = {group.key: (group, _kept(group, config)) for group in groups}
    failed = [key for key, (_, answers) in kept.items() if not answers]
    if config.hint is not None and failed:
        prompts = hinted([work.prompts[key] for key in failed], config.hint, work.tokenizer, work.schemas)
        hints = {key: prompt for key, prompt in zip(failed, prompts, strict=True) if fits(policy, prompt)}
        if len(hints) < len(failed):
            say(f"rejection: {len(failed) - len(hints)} prompts leave the model no positions for the hint as well")
        again = work.asked(
            policy, list(hints.values()), config.num_generations, f"round-{number}-hint", keys=list(hints)
        )
        kept |= {group.key: (group, _kept(group, config)) for group in again}
    chosen = [(group, answer) for group, answers in kept.values() for answer in answers]
    if not chosen:
        least = "" if config.select_threshold is None else f" and got at least {config.select_threshold:g}"
        raise ValueError(
            f"round {number} has nothing to train on: of {len(groups)} prompts with {config.num_generations} answers "
            f"each, none has one that ended{least}"
        )
    rescued = sum(bool(kept[key][1]) for key in failed)
    line = line_of(groups, [answer for _, answer in chosen])
    line |= {"yield": 1 - len(failed) / len(groups), "hinted": rescued / len(groups)}
    return [demonstration(group, answer, work.schemas) for group, answer in chosen], line


def _kept(group: Group, config: Rejection) -> list[Answer]:
    return selected(group.answers, config.selected_at_most, config.select_threshold, config.deduplicate)


def line_of(groups: Sequence[Group], kept: Sequence[Answer]) -> Line:
    """What is known of all answers of a round, and of those that it trains on."""
    answers = [answer for group in groups for answer in group.answers]
    rewards = [reward for reward, _ in judged(answers)]
    turns = turn_metrics([answer.events or {} for answer in answers])
    return {
        "reward": fmean(rewards) if rewards else None,
        "clipped_ratio": fmean(not answer.finished for answer in answers),
        "distinct_answers": distinct_answers([[answer.text for answer in group.answers] for group in groups]),
        "rows": len(kept),
        "mean_length": fmean(answer.tokens for answer in kept),
        "distinct_2": distinct_n((answer.text for answer in kept), 2),
        **({"calls": turns["tools/call_frequency"]} if turns else {}),
    }


def config_of_round(config: Rejection, number: int) -> Sft:
    """Its run of `fastpost sft`, which goes on where it was stopped."""
    output, last = Path(config.output_dir), number == config.rounds
    given = {field.name: getattr(config, field.name) for field in fields(Sft)}
    given |= {"dataset": str(output / f"round-{number}.jsonl"), "eval_dataset": None, "seed": config.seed + number}
    given |= {"output_dir": model_after(config, number), "run_name": f"{config.run_name or output.name}-{number}"}
    given |= {"push_to_hub": config.push_to_hub and last, "hub_model_id": config.hub_model_id or output.name}
    given["assistant_only_loss"] |= config.converses  # what tools and users said is not the model's to say
    given["resume_from_checkpoint"] = "latest" if Path(model_after(config, number)).exists() else None
    if config.train_from == "last":
        given["model"] = model_after(config, number - 1)
        given["lora_r"] = 0 if is_adapter(given["model"]) else config.lora_r  # it trains on, where it is there
    return Sft(**given)


def _held_out_score(work: Work, number: int) -> float | None:
    """The mean reward of greedy answers."""
    policy = Policy.of(work.config, model_after(work.config, number))
    greedy = replace(policy, sampling=replace(policy.sampling, temperature=0.0))
    groups = work.asked(greedy, work.held_out, 1, f"held-out-{number}")
    rewards = [reward for group in groups for reward, _ in judged(group.answers)]
    return fmean(rewards) if rewards else None


def _leave(model: Path, output: Path) -> None:
    """A copy of a round's model, for who loads OUT."""
    with written_aside(output) as aside:
        for file in sorted(path for path in model.iterdir() if path.is_file() and path.name not in OF_A_RUN):
            shutil.copy2(file, aside)
