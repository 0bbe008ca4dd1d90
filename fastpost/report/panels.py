"""Which charts a page has: those of the metrics that a run has, by TRL's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastpost.report.chart import Series, line_chart, scatter
from fastpost.report.html import Html, tag, together
from fastpost.report.record import Record
from fastpost.watching.curves import joined
from fastpost.watching.levels import KL_PER_COMPLETION, KL_PER_TOKEN, KL_TARGETS
from fastpost.watching.text import number

COLOURS = 6  # of page.css
ACROSS = 3  # charts of a row, on a wide screen
OTHERS, SPEED = "Other metrics", "Speed and memory"


@dataclass(frozen=True)
class Panel:
    title: str
    curves: Mapping[str, str]  # metric -> its name in the legend
    unit: str = ""
    band: tuple[str, str] | None = None  # metrics below and above the first curve


@dataclass(frozen=True)
class Section:
    title: str
    panels: tuple[Panel, ...]
    against: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # "Reward against ..." -> metrics of x
    joins: bool = True  # another section's row


REWARDS = ("reward", "objective/scores")
KL_COMPLETION = Panel("KL", {"kl_budget/sequence": "", "objective/kl": ""}, "nats a completion")
KL_TOKEN = Panel("KL", {"kl_budget/token": "", "kl": ""}, "nats a token")
REWARD = Section(
    "Reward",
    (
        Panel(
            "Reward",
            {
                "reward": "training",
                "objective/scores": "score",
                "objective/rlhf_reward": "less KL",
                "eval_reward": "held out",
            },
        ),
        KL_COMPLETION,
        KL_TOKEN,
        Panel("Spread within a group", {"reward_std": ""}),
        Panel("Coefficient of the KL", {"objective/kl_coef": ""}),
    ),
    {"KL": (*KL_COMPLETION.curves, *KL_TOKEN.curves)},
)
SECTIONS = (
    REWARD,
    Section(
        "Preferences",
        (
            Panel(
                "Implicit rewards",
                {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
            ),
            Panel(
                "Margin",
                {
                    "rewards/margins": "training",
                    "margin": "training",
                    "eval_rewards/margins": "held out",
                    "eval_margin": "held out",
                },
            ),
            Panel(
                "Accuracy",
                {
                    "rewards/accuracies": "training",
                    "accuracy": "training",
                    "eval_rewards/accuracies": "held out",
                    "eval_accuracy": "held out",
                },
                "share of pairs",
            ),
            Panel("Log-probabilities", {"logps/chosen": "chosen", "logps/rejected": "rejected"}, "nats"),
            Panel(
                "Less likely than under the reference",
                {"displacement/chosen_falling": "chosen", "displacement/both_falling": "both"},
                "share of pairs",
            ),
            Panel(
                "Accuracy by length",
                {"accuracy/longer_chosen": "the longer is better", "accuracy/shorter_chosen": "the shorter"},
                "share of pairs",
            ),
            Panel("Scores", {"mean_reward": "mean"}, band=("min_reward", "max_reward")),
        ),
    ),
    Section(
        "Loss",
        (
            Panel("Loss", {"loss": "training", "eval_loss": "held out"}),
            Panel("Losses", {"loss/policy_avg": "policy", "loss/value_avg": "value"}),
            Panel(
                "Apart from the teacher",
                {
                    "forward_kl": "forward KL",
                    "reverse_kl": "reverse KL",
                    "eval_forward_kl": "forward, held out",
                    "eval_reverse_kl": "reverse, held out",
                },
                "nats a token",
            ),
            Panel(
                "Right tokens",
                {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held out"},
                "share",
            ),
            Panel("Load balancing", {"aux_loss": ""}),
        ),
    ),
    Section(
        "Length",
        (
            Panel(
                "Completions",
                {"completions/mean_length": "mean", "completions/mean_terminated_length": "of those that end"},
                "tokens",
                ("completions/min_length", "completions/max_length"),
            ),
            Panel("Cut off at the limit", {"completions/clipped_ratio": ""}, "share"),
            Panel("Correlation with the reward", {"reward_length_correlation": ""}),
        ),
        {"length": ("completions/mean_length",)},
    ),
    Section(
        "Health",
        (
            Panel(
                "Entropy",
                {"entropy": "training", "policy/entropy_avg": "training", "eval_entropy": "held out"},
                "nats a token",
            ),
            Panel("Gradient", {"grad_norm": "norm"}),
            Panel(
                "Groups without variance",
                {"frac_reward_zero_std": ""},
                "share",
            ),
            Panel(
                "Clipped tokens",
                {
                    "clip_ratio/low_mean": "low",
                    "clip_ratio/high_mean": "high",
                    "policy/clipfrac_avg": "policy",
                    "val/clipfrac_avg": "value",
                },
                "share",
            ),
            Panel("Variance that the critic explains", {"val/explained_variance": ""}, "share"),
            Panel("Importance weight", {"sampling/importance_sampling_ratio/mean": "mean"}),
            Panel(
                "Sampler and trainer differ",
                {"sampling/sampling_logp_difference/mean": "mean"},
                "nats a token",
            ),
            Panel("Learning rate", {"learning_rate": ""}),
        ),
    ),
    Section(
        SPEED,
        (
            Panel("Tokens a second", {"tokens_per_second": ""}),
            Panel("Peak memory", {"peak_memory_mb": ""}, "MiB"),
        ),
        joins=False,
    ),
)
# Not drawn at all: places, or drawn as something else.
ELSEWHERE = re.compile(
    r"step$|epoch$|num_tokens$|step_time/|completions/(min|max)|(min|max)_reward$|rewards/.+/(mean|std)$"
    r"|clip_ratio/(region_mean|low_min|high_max)$|sampling/.+/(min|max)$"
)


def sections(run: Record) -> list[tuple[str, Html]]:
    """(title, charts) of what a run has; a section that fits into the empty places of the last row goes there."""
    rows: list[tuple[str, list[Html]]] = []
    for section in (*SECTIONS, _others(run)):
        charts = _charts(run, section)
        if charts and rows and section.joins and -len(rows[-1][1]) % ACROSS >= len(charts):
            title, before = rows.pop()
            rows.append((f"{title} and {section.title.lower()}", before + charts))
        elif charts:
            rows.append((section.title, charts))
    return [(title, tag("div", *charts, cls_="charts")) for title, charts in rows]


def _charts(run: Record, section: Section) -> list[Html]:
    charts = [chart for panel in section.panels if (chart := _chart(run, panel))]
    at = min(2, len(charts))  # beside the two that it compares
    charts[at:at] = [chart for name, metrics in section.against.items() if (chart := _against(run, name, metrics))]
    if section is REWARD and (functions := reward_functions(run)):
        charts += filter(None, [_chart(run, Panel("Reward functions", functions))])
    return charts


def _others(run: Record) -> Section:
    """A panel for every metric that no other has."""
    drawn = {name for section in SECTIONS for panel in section.panels for name in panel.curves}
    names = {name for line in run.lines for name in line} - drawn - reward_functions(run).keys()
    panels = (Panel(name, {name: ""}) for name in sorted(names) if not ELSEWHERE.match(name))
    return Section(OTHERS, tuple(panels), joins=False)


def reward_functions(run: Record) -> dict[str, str]:
    """The means of a run's reward functions, where there are several."""
    names = sorted({name for line in run.lines for name in line if re.fullmatch(r"rewards/.+/mean", name)})
    return {name: name.removeprefix("rewards/").removesuffix("/mean") for name in names} if len(names) > 1 else {}


def _chart(run: Record, panel: Panel) -> Html | None:
    """A figure of the panel's curves; of those with one name in the legend the first that the run has."""
    if panel is KL_TOKEN and run(*KL_COMPLETION.curves):
        return None  # the same in another unit
    found: dict[str, Series] = {}
    for metric, label in panel.curves.items():
        points = run(metric)
        if points and label not in found and len(found) < COLOURS:
            low, high = (run(name) or None for name in panel.band) if panel.band and not found else (None, None)
            found[label] = Series(label, points, len(found), low, high)
    if not found:
        return None
    limit = kl_limit(run, panel)
    keys = [_key(one) for one in found.values()]
    if limit is not None:
        keys.append(tag("span", f"budget {limit:g}", cls_="key"))
    return _figure(panel.title, panel.unit, keys, line_chart(list(found.values()), limit))


def kl_limit(run: Record, panel: Panel) -> float | None:
    """The budget that `fastpost.watching.levels` warns by, in the panel that it is of."""
    if panel is KL_COMPLETION:
        return KL_PER_COMPLETION if run.target_kl is None else KL_TARGETS * run.target_kl
    return KL_PER_TOKEN if panel is KL_TOKEN else None


def _against(run: Record, name: str, metrics: tuple[str, ...]) -> Html | None:
    """The reward against another metric."""
    points = joined(run(*metrics), run(*REWARDS))
    if len(points) < 3:
        return None
    keys = [tag("span", "faint: early; ring: last", cls_="key")]
    unit = "tokens" if name == "length" else "nats"
    return _figure(f"Reward against {name}", "", keys, scatter(points, unit))


def _key(one: Series) -> Html:
    """A colour, its name, and the last value."""
    colour = tag("i", cls_=f"c{one.colour}")
    label = f"{one.label} " if one.label else ""
    return tag("span", colour, label, tag("output", number(one.points[-1][1])), cls_="key")


def _figure(title: str, unit: str, keys: list[Html], drawing: Html) -> Html:
    named = together(title, tag("span", f" {unit}", cls_="key")) if unit else together(title)
    return tag("figure", tag("figcaption", tag("h3", named), *keys), drawing)
