"""`fastpost best-of-n`: N answers to each prompt, the best of which is kept, and what fewer of them would have scored.

OUT/best.jsonl   a row a prompt, to train on; of answers with the same reward the earlier is the best
OUT/report.json  score and KL for n = 1, 2, 4, ..., N (`fastpost.stages.order_statistics`), lengths, ties
OUT/curve.png    the score against n and against the KL
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from math import sqrt
from operator import itemgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fastpost.stages.asking import asked, journal_of, read_prompts, schemas_of
from fastpost.stages.config import BestOfN
from fastpost.stages.demonstrations import demonstration
from fastpost.stages.groups import Answer, Group, judged
from fastpost.stages.jury import Jury
from fastpost.stages.order_statistics import expected_best, kl_bound, kl_of_shares
from fastpost.stages.policy import Policy
from fastpost.stages.rows import table, write_bytes, write_json, write_rows
from fastpost.trainers.log import say
from fastpost.trainers.options import check_config
from fastpost.trainers.world import check_alone
from fastpost.turns.metrics import turn_metrics

Point = dict[str, float]  # of the curve: n, kl_bound, kl, score, standard_error


def best_of_n(config: BestOfN) -> dict[str, Any]:
    """Writes the files and prints the curve; returns what report.json has."""
    check_config(config, BestOfN)
    check_alone("best-of-n")
    output, jury = Path(config.output_dir), Jury.of(config)
    policy = Policy.of(config)
    prompts = read_prompts(config, policy.tokenizer)
    work, schemas = journal_of(config), schemas_of(config)
    groups = list(
        asked(policy, prompts, config.num_generations, work, config.generation_batch_size, jury=jury),
    )
    chosen = [(group, found) for group in groups if (found := best(group.answers)) is not None]
    if not chosen:
        raise ValueError(f"reward {', '.join(config.reward)} applied to no answer of {config.dataset}")
    if len(chosen) < len(groups):
        say(f"best-of-n: no reward function applied to {len(groups) - len(chosen)} of {len(groups)} prompts")
    report = report_of([group for group, _ in chosen], [answer for _, answer in chosen], config.num_generations)
    write_rows(output / "best.jsonl", [demonstration(group, answer, schemas) for group, answer in chosen])
    write_json(output / "report.json", report)
    plot(output / "curve.png", report["curve"])
    print(table([shown(point) for point in report["curve"]]), flush=True)
    return report


def best(answers: Iterable[Answer]) -> Answer | None:
    """Of the highest reward, and the earliest of those; None: nobody judged any."""
    return max(judged(answers), key=itemgetter(0), default=(0.0, None))[1]


def report_of(groups: Sequence[Group], kept: Sequence[Answer], n: int) -> dict[str, Any]:
    """What is known of the groups and of the answer that was kept of each."""
    answers = [answer for group in groups for answer in group.answers]
    rewards = [[reward for reward, _ in judged(group.answers)] for group in groups]
    whole = [values for values in rewards if len(values) == n]
    return {
        "num_generations": n,
        "prompts": len(groups),
        "prompts_judged_in_part": len(groups) - len(whole),  # they are not of the curve
        "curve": curve(whole, n),
        "frac_reward_zero_std": fmean(len(set(values)) == 1 for values in rewards),
        "mean_length": fmean(answer.tokens for answer in answers),
        "mean_length_best": fmean(answer.tokens for answer in kept),
        "clipped_ratio": fmean(not answer.finished for answer in answers),
        "clipped_ratio_best": fmean(not answer.finished for answer in kept),
        **turn_metrics([answer.events or {} for answer in answers]),
    }


def curve(rewards: Sequence[Sequence[float]], n: int) -> list[Point]:
    """For 1, 2, 4, ... and n answers of each prompt; the error is that of a mean over prompts."""
    found = []
    for m in sorted({n, *(2**i for i in range(n.bit_length()) if 2**i < n)}) if rewards else ():
        scores = [expected_best(values, m) for values in rewards]
        error = stdev(scores) / sqrt(len(scores)) if len(scores) > 1 else 0.0
        kl = fmean(kl_of_shares(values, m) for values in rewards)
        found.append(
            {"n": m, "kl_bound": kl_bound(m), "kl": kl, "score": fmean(scores), "standard_error": error},
        )
    return found


def shown(point: Point) -> Point:
    """A line of the table."""
    names = {"kl_bound": "KL at most", "kl": "KL, with ties", "standard_error": "+-"}
    return {names.get(name, name): value for name, value in point.items()}


def plot(file: Path, points: Sequence[Point]) -> None:
    """The score against n, and against what that costs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine's display
    left, right = figure.subplots(1, 2, sharey=True)
    scores, errors = [point["score"] for point in points], [point["standard_error"] for point in points]
    left.errorbar([point["n"] for point in points], scores, errors, marker=".", capsize=2)
    left.set(xlabel="n", ylabel="score of the best")
    left.set_xscale("log", base=2)
    for name, label in (("kl_bound", "log n - (n-1)/n"), ("kl", "with the ties seen")):
        right.plot([point[name] for point in points], scores, marker=".", label=label)
    right.set(xlabel="KL to the policy, nats")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    picture = BytesIO()
    figure.savefig(picture, dpi=110)
    write_bytes(file, picture.getvalue())
