"""`fastpost constitution` (arXiv:2212.08073): a model corrects its own answers by principles, and compares them.

  revise   answer -> critique by a principle -> revision, several times: rows for SFT, in OUT/revisions.jsonl
  prefer   two answers, and which of them its principle is for, as the model itself sees it, from the probabilities of
           the verdict in both orders: rows for a reward model or for DPO, in OUT/preferences.jsonl

Both leave OUT/report.json. `fastpost sft`, `reward` and `dpo` go on from the rows (recipes/constitution).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpost.evaluation.refusal import refuses
from fastpost.judging import Judge, JudgeSpec, Panel, load_judge
from fastpost.judging.asking import Cache
from fastpost.judging.local import Local
from fastpost.stages import comparisons, revisions
from fastpost.stages.asking import Asker, journal_of, read_prompts
from fastpost.stages.config import Constitution
from fastpost.stages.jury import Jury
from fastpost.stages.policy import Policy
from fastpost.stages.principles import Principle, read_principles
from fastpost.stages.rows import table, write_json, write_rows
from fastpost.trainers.log import say
from fastpost.trainers.options import check_config
from fastpost.trainers.world import check_alone


def constitution(config: Constitution) -> dict[str, Any]:
    """Runs a phase on the prompts of config.dataset; returns what is in OUT/report.json."""
    check_config(config, Constitution)
    check_alone("constitution")
    principles, out = read_principles(config.constitution), Path(config.output_dir)
    asker = Asker(Policy.of(config), config, journal_of(config))
    jury = Jury.of(config) if config.reward else None
    if config.phase == "revise":
        report = _revise(asker, principles, jury, config, out)
    else:
        report = _prefer(asker, principles, jury, config, out)
    write_json(out / "report.json", report)
    say(f"saved {out}")
    return report


def _revise(
    asker: Asker, principles: Sequence[Principle], jury: Jury | None, config: Constitution, out: Path
) -> dict[str, Any]:
    tokenizer, report = asker.policy.tokenizer, {}
    for name, path in (("dataset", config.dataset), ("benign_dataset", config.benign_dataset)):
        if path is None:
            continue
        prompts = read_prompts(config, tokenizer, path)
        chains = revisions.revised(asker, prompts, principles, config.revisions, name)
        if jury is not None:
            chains = revisions.measured(chains, jury, tokenizer)
        if name == "dataset":
            write_rows(out / "revisions.jsonl", [chain.row for chain in chains])
        report[name] = revisions.report(chains, refuses)
        outgrown = sum(chain.outgrown for chain in chains)
        if outgrown:
            say(f"{name}: {outgrown} conversations outgrew the model's positions, and keep the revision that they had")
        print(f"{name}\n{table(report[name])}")
    return report


def _prefer(
    asker: Asker, principles: Sequence[Principle], jury: Jury | None, config: Constitution, out: Path
) -> dict[str, Any]:
    panel = _itself(asker, config) if config.judge is None else load_judge(config.judge)
    prompts = read_prompts(config, asker.policy.tokenizer)
    pairs = comparisons.compared(asker, prompts, principles, panel.prefer, config.num_generations, jury)
    rows = [row for pair in pairs if (row := pair.row(config.confidence)) is not None]
    write_rows(out / "preferences.jsonl", rows)
    report = comparisons.report(pairs, config.confidence)
    print(table(report))
    if unanswered := sum(not pair.preference.answered for pair in pairs):
        say(f"{unanswered} of {len(pairs)} pairs were not answered: the same command asks again")
    if not rows:
        say("no pair was decided: nothing is left to learn from")
    return {"principles": report}


def _itself(asker: Asker, config: Constitution) -> Panel:
    """The model as a judge that gives no reasons: P(A) and P(B) after the question."""
    spec = JudgeSpec(model=config.model, rubric="$principle", reasoning=False, soft=True, ties=False)
    policy = asker.policy
    local = Local(policy.model, policy.tokenizer, None, max(1, config.generation_batch_size // 2))
    return Panel([Judge(spec, local, Cache(None, {}))])
