"""`fastpost judge DATA --judge judge.yaml`: pairs -> pairs labelled by a judge, and a report on the judge."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastpost.data.chat import rendered
from fastpost.files import read_rows
from fastpost.judging.config import JudgePairs
from fastpost.judging.judge import Panel
from fastpost.judging.load import load_judge
from fastpost.judging.pairs import Judged, read_judged
from fastpost.judging.report import lines, reported
from fastpost.judging.verdicts import Preference
from fastpost.stages.journal import Journal
from fastpost.stages.rows import table, write_json, write_rows
from fastpost.trainers.log import say
from fastpost.trainers.options import check_config
from fastpost.trainers.world import check_alone


def judge(config: JudgePairs) -> dict[str, Any]:
    """Writes OUT/judged.jsonl, every pair; OUT/pairs.jsonl, those with a winner, as dpo and reward read them; and
    OUT/report.json, which it prints as a table and returns."""
    check_config(config, JudgePairs)
    check_alone("judge")
    pairs = read_judged(read_rows(config.dataset), config.dataset, config.seed)
    panel, out = load_judge(config.judge), Path(config.output_dir)
    journal = Journal(out / "work.jsonl", _facts(config, panel))
    found = _judged(panel, pairs, journal, config.batch_size)
    both = list(zip(pairs, found, strict=True))
    write_rows(out / "judged.jsonl", [_row(pair, one) for pair, one in both])
    write_rows(out / "pairs.jsonl", [row for pair, one in both for row in _labelled(pair, one)])
    report = reported(pairs, found, _names(config, panel))
    write_json(out / "report.json", report)
    print(_counts(report))
    if shown := lines(report):
        print(f"\n{table(shown)}")
    return report


def _facts(config: JudgePairs, panel: Panel) -> dict[str, Any]:
    """What decides what is found."""
    judges = [one.spec.facts | dict(one.cache.facts) for one in panel.judges]
    each = {f"{name} of judge {i}": value for i, facts in enumerate(judges) for name, value in facts.items()}
    return {"stage": "judge", "dataset": config.dataset, "seed": config.seed, "judges": len(judges), **each}


def _names(config: JudgePairs, panel: Panel) -> set[str]:
    """Under which an author may be one of the judges."""
    if config.own is not None:
        return {config.own}
    return {name for one in panel.judges for name in (one.spec.model, Path(one.spec.model).name)}


def _judged(panel: Panel, pairs: list[Judged], journal: Journal, size: int) -> list[Preference | None]:
    """Of each pair; what is in the journal is not asked again, and what nobody answered is not in it."""
    left = [i for i in range(len(pairs)) if str(i) not in journal]
    for start in range(0, len(left), size):
        rows = left[start : start + size]
        batch = [pairs[i] for i in rows]
        names = sorted({name for pair in batch for name in pair.columns})
        columns = {name: [pair.columns.get(name) for pair in batch] for name in names}
        found = panel.prefer([p.prompt for p in batch], [p.first for p in batch], [p.second for p in batch], columns)
        journal.add({str(i): asdict(one) for i, one in zip(rows, found, strict=True) if one.answered})
        say(f"judge: {min(start + size, len(left))} of {len(left)} pairs")
    return [Preference.of(journal[str(i)]) if str(i) in journal else None for i in range(len(pairs))]


def _row(pair: Judged, found: Preference | None) -> dict[str, Any]:
    verdict = None if found is None else asdict(found) | {"winner": found.winner}
    return {"prompt": pair.prompt, "first": pair.first, "second": pair.second, "label": pair.label, "verdict": verdict}


def _labelled(pair: Judged, found: Preference | None) -> list[dict[str, Any]]:
    """A row of preferences, or none."""
    if found is None or found.p is None or found.winner == "tie":
        return []
    answers = (pair.first, pair.second) if found.winner == "first" else (pair.second, pair.first)
    row = {"prompt": pair.prompt, "chosen": answers[0], "rejected": answers[1], **rendered(pair.columns)}
    return [row | {"p": max(found.p, 1 - found.p)}]


def _counts(report: dict[str, Any]) -> str:
    missing = f"; {report['unanswered']} were not answered: the same command asks again" * bool(report["unanswered"])
    return (
        f"{report['pairs']} pairs: {report['decided']} decided, {report['ties']} of them ties; "
        f"{report['undecided']} without a verdict{missing}"
    )
