"""`fastpost eval`: models on prompts, rewards on pairs; OUT/report.json, OUT/report.png, and a table on stdout."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastpost.evaluation.comparison import Comparison, compared
from fastpost.evaluation.config import Eval
from fastpost.evaluation.extraction import extraction
from fastpost.evaluation.pairs import PairAccuracy, judged_pairs, pair_accuracy
from fastpost.evaluation.plot import drawn, panels_of
from fastpost.evaluation.samples import Bench, answers_of
from fastpost.evaluation.summary import Summary, summary
from fastpost.evaluation.table import table
from fastpost.rewards import load_rewards
from fastpost.stages.journal import Journal
from fastpost.stages.rows import write_bytes, write_json
from fastpost.trainers.log import say
from fastpost.trainers.options import check_config
from fastpost.trainers.world import check_alone


@dataclass(frozen=True)
class Report:
    """What was found."""

    models: list[Summary] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    pairs: dict[str, PairAccuracy] = field(default_factory=dict)  # by reward


def _models(config: Eval) -> tuple[list[Summary], list[Comparison]]:
    asked = config.dataset or config.harmful_dataset or config.benign_dataset
    if not asked:
        return [], []
    bench = Bench.of(config)
    extract = extraction(config.answer, [] if bench.rewards is None else [r.name for r in bench.rewards.rewards])
    answers = [answers_of(config, path, name, bench) for path, name in zip(config.model, config.names, strict=True)]
    summaries = [summary(each, config, extract) for each in answers]
    for each in summaries:
        if config.dataset and "accuracy" not in each.estimates:
            say(f"eval: {config.reward[0]} applied to no greedy answer of {each.name}: it has no accuracy")
    return summaries, compared(answers, summaries, config)


def _pairs(config: Eval) -> dict[str, PairAccuracy]:
    path, found = config.pairs_dataset, {}
    specs = (config.pairs_reward or config.reward) if path is not None else ()
    for spec, reward in zip(specs, load_rewards(specs), strict=True):
        size = config.generation_batch_size
        journal = Journal(Path(config.output_dir) / "pairs" / f"{reward.name}.jsonl", {"reward": spec, "dataset": path})
        judged = judged_pairs(str(path), reward, journal, size, config.reward_timeout)
        found[reward.name] = pair_accuracy(judged, config.intervals)
    return found


def as_json(report: Report, config: Eval) -> dict[str, Any]:
    """Everything but the numbers of single prompts, which the journals have."""
    models = {
        each.name: {
            "path": path,
            "metrics": {name: asdict(of) for name, of in each.estimates.items()},
            "calibration": {name: asdict(of) for name, of in each.calibration.items()},
        }
        for each, path in zip(report.models, config.model, strict=False)
    }
    return {
        "settings": {name: value for name, value in asdict(config).items() if value not in (None, (), "")},
        "models": models,
        "comparisons": [asdict(each) for each in report.comparisons],
        "pairs": {name: asdict(of) for name, of in report.pairs.items()},
    }


def evaluate(config: Eval) -> Report:
    """Asks, judges, counts; what was asked and judged before is not asked again."""
    check_config(config, Eval)
    check_alone("eval")
    report = Report(*_models(config), _pairs(config))
    output = Path(config.output_dir)
    write_json(output / "report.json", as_json(report, config))
    if panels := panels_of(report.models, report.pairs, config.ks):
        write_bytes(output / "report.png", drawn(panels))
    print(table(report.models, report.comparisons, report.pairs), flush=True)
    return report
