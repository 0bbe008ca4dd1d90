"""The page of a run: self-contained, well-formed, safe from what a model writes, and true to the run's numbers."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastpost.cli import main
from fastpost.report.chart import HEIGHT, LEFT, RIGHT, WIDTH, Series, line_chart, scatter, thinned
from fastpost.report.config import Report
from fastpost.report.html import Html, tag, together
from fastpost.report.page import page
from fastpost.report.parts import verdict
from fastpost.report.record import Record, read_record
from fastpost.report.scale import axis, labels, ticks

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='alert(3)'"
VOID = {"meta"}


class Reader(HTMLParser):
    """The elements of a page, with an assertion that each one is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, name: str, cls: str = "") -> list[dict[str, str | None]]:
        return [given for tag, given in self.elements if tag == name and cls in (given.get("class") or "").split(" ")]


def grpo_lines(number: int = 40) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for i in range(1, number + 1):
        yield {
            "step": 10 * i,
            "epoch": i / 10,
            "loss": draw.gauss(0, 0.01),
            "reward": i / 40 + draw.gauss(0, 0.02),
            f"rewards/{EVIL}/mean": 0.5,
            "rewards/number_match/mean": i / 40,
            "kl_budget/sequence": i / 4,
            "kl": i / 1000,
            "entropy": 1 - i / 80,
            "frac_reward_zero_std": 0.1,
            "completions/mean_length": 100 + draw.gauss(0, 5),
            "completions/min_length": 50.0,
            "completions/max_length": 200.0,
            "step_time/rollout": 3.0,
            "step_time/update": 1.0,
            "num_tokens": 1000 * i,
            "tokens_per_second": 250.0,
            "peak_memory_mb": 2048.0,
            "mine": 1.0,
            **({"eval_reward": i / 50} if i % 10 == 0 else {}),
        }


def completions() -> Iterator[dict[str, Any]]:
    for step in (10, 20, 30, 40, 50):
        for reward in (0.0, 0.5, 1.0):
            yield {
                "step": step,
                "prompt": f"ask {step}",
                "completion": f"tell {step} {reward} {EVIL}",
                "reward": reward,
            }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, lines in (("metrics", grpo_lines()), ("completions", completions())):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {
        "verb": "grpo",
        "config": {"model": EVIL, "dataset": "d.jsonl", "beta": 0.01, "reward": ["a", "b"], "bf16": None},
        "data": {"train": {"rows": 2000, "too_long": 10, "unsound": ["every answer is empty"]}, "eval": 7},
        "versions": {"torch": "2.13", "fastpost": "0.1"},
        "started": "2026-11-22T00:12:00",
        "total_steps": 500,
    }
    (tmp_path / "run.json").write_text(json.dumps(facts))
    return tmp_path


def written(run: Path) -> str:
    return page(read_record(run))


# ---- the page ----


def test_the_command_writes_the_page_and_prints_where(run: Path, capsys: pytest.CaptureFixture):
    assert main(["report", str(run)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{run / 'report.html'}\n" and err == ""
    assert (run / "report.html").read_text() == written(run)


def test_it_needs_nothing_from_elsewhere(run: Path):
    text = written(run)
    elements = Reader(text).elements
    assert not [(name, given) for name, given in elements if {"src", "href", "xlink:href", "srcset"} & given.keys()]
    assert not {"link", "img", "iframe", "object", "embed", "image", "use"} & {name for name, _ in elements}
    style = re.search("<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_what_comes_from_data_is_text_and_nothing_else(run: Path):
    """The prompt, the completion, a metric's name, the config: each holds what would run if it were markup."""
    text = written(run)
    read = Reader(text)
    assert len(read.all("script")) == 1 and not read.all("img")
    assert not [given for _, given in read.elements if any(name.startswith("on") for name in given)]
    assert text.count("alert(1)") >= 3 and "<script>alert" not in text
    assert any(EVIL in part for part in read.text)


def test_every_class_has_its_style_and_every_colour_is_there(run: Path):
    text = written(run)
    style = re.search("<style>(.*?)</style>", text, re.DOTALL).group(1)
    used = {name for _, given in Reader(text).elements for name in (given.get("class") or "").split()}
    assert {name for name in used if f".{name}" not in style} == set()
    colours = set(re.findall(r"var\((--[\w-]+)\)", style)) - {"--colour"}
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    assert all(f"{name}:" in light and f"{name}:" in dark.split("@media")[0].split("* {")[0] for name in colours)


def test_its_sections_follow_what_the_run_has(run: Path):
    titles = re.findall("<h2>(.*?)</h2>", written(run))
    assert titles == ["Reward and loss", "Length", "Health", "Samples", "Where time goes", "Data", "Config"]


def test_a_metric_of_ones_own_gets_a_chart(run: Path):
    text = written(run)
    assert "<summary>Other metrics</summary>" in text
    others = text[text.index("<summary>Other metrics") :]
    assert "<h3>mine</h3>" in others and others.count("<figure>") == 1


def test_one_line_of_metrics_is_enough(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null, "entropy": 0.5}\n')
    text = written(tmp_path)
    Reader(text)
    assert "sft: " in text and "NaN" not in text and "<h3>Entropy" in text
    assert "came out as no number" in text


def test_a_half_written_run_json_and_lines_cut_off_are_passed_over(run: Path):
    (run / "run.json").write_text('{"verb": "gr')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41')
    text = written(run)
    assert "<h1>grpo: " in text  # by its metrics
    assert "In 400 steps the held-out reward rose from 0.2 to 0.8." in text


@pytest.mark.parametrize(("files", "word"), [([], "has none"), (["metrics.jsonl"], "no line of it yet")])
def test_a_directory_without_a_run_is_named(files: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in files:
        (tmp_path / name).touch()
    assert main(["report", "--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "run must be the output_dir of a run" in error and str(tmp_path) in error and word in error


# ---- its parts ----


def test_the_head_says_what_became_of_it(run: Path):
    text = written(run)
    assert "In 400 of 500 steps the held-out reward rose from 0.2 to 0.8." in text
    assert "2026-11-22 00:12:00" in text
    tiles = dict(re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span></div>', text))
    assert {name: value for value, name in tiles.items()} == {
        "held-out reward": "0.8",
        "steps": "400",
        "epochs": "4",
        "tokens": "40k",
        "tokens a second": "250",
        "peak memory": "2.0 GiB",
    }


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"loss": lambda i: 4 - i // 10}, "In 40 steps the loss fell from 4 to 1."),
        ({"loss": lambda i: 1 + i // 10}, "In 40 steps the loss rose from 1 to 4, the wrong way."),
        ({"reward": lambda i: random.Random(i).gauss(1, 0.2)}, "In 40 steps the reward stayed where it was"),
        ({"eval_reward": lambda i: 1.0}, "In 40 steps the held-out reward stayed where it was, at 1."),
        ({"eval_reward": lambda i: 12.0 if i in (10, 30) else None}, "In 40 steps the held-out reward stayed where it"),
        ({"accuracy": lambda i: i // 10 / 4, "loss": lambda i: 1.0}, "In 40 steps the accuracy rose from 0 to 0.75."),
        ({"x": lambda i: i}, "40 steps; nothing was measured twice."),
    ],
)
def test_the_verdict_is_in_words(values: dict, text: str):
    lines = [{"step": i} | {name: f(i) for name, f in values.items()} for i in range(40)]
    lines[-1]["step"] = 40
    assert verdict(Record(Path("r"), lines, [], {})).startswith(text)


def test_warnings_stand_before_the_curves(run: Path):
    assert "Nothing to warn of" in written(run)
    lines = [line | {"kl_budget/sequence": 80.0} for line in grpo_lines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = written(run)
    assert text.index("80 nats a completion, and the budget is 50") < text.index("<figure>")
    assert "Raise beta" in text and "Nothing to warn of" not in text


def test_samples_are_the_best_and_the_worst_of_the_first_middle_and_last(run: Path):
    text = written(run)
    shown = re.findall(r"tell (\d+) ([\d.]+)", text)
    assert shown == [(step, reward) for step in ("10", "30", "50") for reward in ("1.0", "0.0")]


def test_time_is_shares_of_a_step(run: Path):
    text = written(run)
    shares = [float(share) for share in re.findall(r'style="flex: ([\d.]+)"', text)]
    assert shares == [0.75, 0.25] and "rollout 75%, 3 s" in text and "4 s a step" in text


def test_counts_config_and_versions_are_there(run: Path):
    text = written(run)
    assert "<td>too long</td><td>10</td>" in text and "<td>rows</td><td>2,000</td>" in text
    assert '<p class="warning">every answer is empty</p>' in text and "<td>unsound</td>" not in text
    assert "<dt>reward</dt><dd>a, b</dd>" in text and "<dt>bf16</dt><dd>none</dd>" in text
    assert "torch 2.13, fastpost 0.1" in text


def test_the_budget_is_drawn_where_the_kl_is(run: Path):
    text = written(run)
    assert text.count('class="limit"') == 1 and "budget 50" in text
    facts = json.loads((run / "run.json").read_text())
    facts["config"]["target_kl"] = 6.0
    (run / "run.json").write_text(json.dumps(facts))
    assert "budget 12" in written(run)


# ---- charts ----


def numbers(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+),([-\d.]+)", path)]


def test_a_curve_is_where_its_numbers_are():
    points = [(0.0, 0.0), (5.0, 10.0), (10.0, 5.0)]
    read = Reader(line_chart([Series("a", points, 0)]))
    (line,) = read.all("path", "line")
    (x0, y0), (x1, y1), (x2, y2) = numbers(line["d"])
    assert (x0, x2) == (LEFT, WIDTH - RIGHT) and x1 == (x0 + x2) / 2
    assert y1 < y2 < y0 <= HEIGHT and math.isclose((y0 - y2) / (y0 - y1), 0.5, abs_tol=0.01)
    assert not read.all("path", "raw") and len(read.all("circle", "dot")) == 3
    assert json.loads(read.all("svg")[0]["data-curves"]) == [[[0, 5, 10], [0, 10, 5]]]


def test_a_noisy_curve_has_its_raw_one_behind():
    points = [(float(i), random.Random(i).gauss(0, 1)) for i in range(200)]
    read = Reader(line_chart([Series("a", points, 1)]))
    (raw,), (line,) = read.all("path", "raw"), read.all("path", "line")
    rough = lambda path: sum(abs(a[1] - b[1]) for a, b in zip(numbers(path["d"]), numbers(path["d"])[1:], strict=False))  # noqa: E731
    assert rough(raw) > 5 * rough(line)


def test_a_long_curve_is_thinned_and_keeps_its_end():
    points = [(float(i), float(i)) for i in range(10_001)]
    few = thinned(points)
    assert len(few) <= 400 and few[-1][0] == 10_000 and few[0][1] < 26
    assert thinned(points[:400]) == points[:400]


def test_one_metric_against_another_has_a_dot_a_line():
    read = Reader(scatter([(10, 1.0, 2.0), (20, 2.0, 3.0), (30, 3.0, 1.0)], "nats"))
    dots = read.all("circle", "dot")
    opacity = [float(dot["opacity"]) for dot in dots]
    assert len(dots) == 3 and opacity == sorted(opacity) and opacity[-1] == 1
    (ring,) = read.all("circle", "ring")
    assert (ring["cx"], ring["cy"]) == (dots[-1]["cx"], dots[-1]["cy"])
    assert "step 20: 2, 3" in read.text


@pytest.mark.parametrize("seed", range(200))
def test_ticks_are_round_and_few_and_within(seed: int):
    draw = random.Random(seed)
    low = draw.choice([0.0, draw.gauss(0, 1), -draw.random()]) * 10 ** draw.randint(-7, 9)
    high = low + draw.random() * 10 ** draw.randint(-6, 9) + 1e-6 * abs(low)
    at = ticks(low, high)
    assert 2 <= len(at) <= 5
    slack = 1e-8 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in at)
    assert len(set(labels(at))) == len(at)
    assert f"{at[1] - at[0]:.3e}".split("e")[0] in ("1.000", "2.000", "5.000")


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.1, 0.9], (0, 0.94)),
        ([5.0, 6.0], (4.95, 6.05)),
        ([3.0, 3.0 + 1e-12], (0, 4.5)),
        ([0.0], (0, 1)),
        ([-2.0], (-3, 0)),
    ],
)
def test_axes_begin_at_zero_where_it_is_near(values: list[float], ends: tuple[float, float]):
    found = axis(values, 0, 100)
    assert (found.low, found.high) == pytest.approx(ends)
    assert found(found.low) == 0 and found(found.high) == pytest.approx(100)


def test_only_what_tag_made_is_markup():
    assert (
        tag("p", "a < b", tag("b", "&"), cls_="x", title='"', hidden=None)
        == '<p class="x" title="&quot;">a &lt; b<b>&amp;</b></p>'
    )
    assert isinstance(together("<"), Html) and together("<", Html("<br>")) == "&lt;<br>"
    assert tag("line", x1=1.25, y2=3) == '<line x1="1.2" y2="3"></line>'


def test_the_run_is_one_field():
    assert Report(run="runs/grpo").run == "runs/grpo"


def test_a_real_run_has_its_page_and_is_told_what_is_wrong_with_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A random model writes two tokens a completion: none ends by itself."""
    pytest.importorskip("transformers")
    import tiny

    for made in (tiny.model("llama"), tiny.tokenizer()):
        made.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{c} "}) + "\n" for c in "abcdef"))
    (tmp_path / "reward.py").write_text(
        "def length_of_set(completions, **columns):\n    return [len(set(text)) / 2 for text in completions]\n"
    )
    fields = {
        "model": tmp_path / "model",
        "dataset": tmp_path / "prompts.jsonl",
        "output_dir": tmp_path / "out",
        "reward": f"{tmp_path / 'reward.py'}:length_of_set",
        "max_completion_length": 2,
        "num_generations": 4,
        "max_steps": 6,
        "logging_steps": 1,
    }
    assert main(["grpo", *(word for name, value in fields.items() for word in (f"--{name}", str(value)))]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out' / 'report.html'}\n"
    assert err.startswith("warning: completions do not end, from step 5: ")
    text = (tmp_path / "out" / "report.html").read_text()
    Reader(text)
    for word in ("<h1>grpo: out</h1>", "Samples", "Where time goes", "<h3>Reward", "completions do not end"):
        assert word in text
    assert "Other metrics" not in text  # every metric of the verb has its place
