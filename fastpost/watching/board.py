"""What a live view shows of a run: the numbers as they stand, and their picture for a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastpost.watching.curves import Line, is_number
from fastpost.watching.text import count, duration, first_lines, memory, number, printable, sparkline
from fastpost.watching.warnings import RunWarning

# A row of the picture: its name, and the metrics of which it shows the first that a run has.
ROWS: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss", "loss/policy_avg"),
    "reward": ("reward", "objective/scores", "rewards/margins", "margin"),
    "held out": ("eval_reward", "eval_accuracy", "eval_rewards/accuracies", "eval_loss"),
    "accuracy": ("accuracy", "rewards/accuracies", "mean_token_accuracy"),
    "KL": ("kl_budget/sequence", "objective/kl", "kl"),
    "entropy": ("entropy", "policy/entropy_avg"),
    "length": ("completions/mean_length",),
    "gradient": ("grad_norm",),
}
PACE = 50  # steps that the time left is reckoned from
COMPLETION, PROMPT = 6, 2  # lines of a sample
FRAME = 7  # lines that are neither curves nor sample


class Sample(NamedTuple):
    prompt: str
    completion: str
    reward: float | None


@dataclass
class Board:
    """Written by the training loop while another thread draws it: what is there only grows, or is replaced whole."""

    verb: str
    total: int
    done: int
    clock: Callable[[], float] = time.perf_counter
    values: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    of_steps: set[str] = field(default_factory=set)  # names
    times: list[float] = field(default_factory=list)  # at which the last steps ended
    sample: Sample | None = None
    warnings: list[RunWarning] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.times.append(self.began)

    def step(self, values: Mapping[str, Any]) -> None:
        self.done += 1
        self.times = [*self.times[-PACE:], self.clock()]
        self.of_steps |= values.keys()
        self._note(values)

    def line(self, values: Line) -> None:
        """What steps give, too, is here a mean of what is known."""
        self._note({name: value for name, value in values.items() if name not in self.of_steps})

    def _note(self, values: Mapping[str, Any]) -> None:
        """The numbers among the values are the latest ones, and points of the curves that are drawn."""
        self.values.update({name: value for name, value in values.items() if is_number(value)})
        for label, names in ROWS.items():
            name = next((name for name in names if name in self.values), None)
            if name is not None and is_number(values.get(name)):
                self.curves.setdefault(label, []).append(float(values[name]))

    @property
    def left(self) -> float | None:
        """Seconds."""
        steps = len(self.times) - 1
        return (self.total - self.done) * (self.times[-1] - self.times[0]) / steps if steps else None


def value_of(values: Mapping[str, Any], label: str) -> float | None:
    """Of the row of this name."""
    return next((values[name] for name in ROWS[label] if is_number(values.get(name))), None)


def plain(board: Board, line: Line) -> str:
    """A line of a log: those values that the picture shows, by the same names."""
    parts = [f"{board.verb} {line['step']}/{board.total}"]
    parts += [f"{row} {number(value)}" for row in ROWS if (value := value_of(line, row)) is not None]
    parts += facts(line)
    return "  ".join(parts if board.left is None else [*parts, f"{duration(board.left)} left"])


def facts(values: Mapping[str, Any]) -> list[str]:
    """Speed and memory."""
    shown = (("tokens_per_second", lambda x: f"{count(x)} tokens/s"), ("peak_memory_mb", memory))
    return [show(values[name]) for name, show in shown if is_number(values.get(name))]


# ---- the picture ----


def draw(board: Board, width: int, height: int) -> Any:
    """A renderable of rich, at most about `height` lines."""
    from rich import box
    from rich.console import Group
    from rich.panel import Panel

    parts = [_progress(board, width), "", _curves(board, width)]
    if board.warnings:
        parts.append(_warned(board.warnings))
    room = height - len(board.curves) - FRAME - PROMPT
    if board.sample is not None and room > 0:
        parts.append(_sample(board.sample, width - 6, min(COMPLETION, room)))
    title = f"[bold]fastpost {board.verb}[/]"
    return Panel(Group(*parts), title=title, title_align="left", box=box.ROUNDED, border_style="dim", padding=(0, 2))


def _progress(board: Board, width: int) -> Any:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    share = f"step {board.done:,}/{board.total:,}"
    spent = f"{duration(board.clock() - board.began)} spent"
    left = [] if board.left is None else [f"{duration(board.left)} left"]
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(ratio=1)
    row.add_column(justify="right")
    row.add_row(
        ProgressBar(total=max(1, board.total), completed=board.done),
        Text(" · ".join([share, spent, *left, *(facts(board.values) if width >= 90 else [])]), style="dim"),
    )
    return row


def _curves(board: Board, width: int) -> Any:
    from rich.table import Table

    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    rows.add_column(justify="right")
    rows.add_column(style="cyan")
    for label in ROWS:
        points = board.curves.get(label)
        if points:
            rows.add_row(label, number(points[-1]), sparkline(points, max(8, min(60, width - 32))))
    return rows


def _warned(warnings: list[RunWarning]) -> Any:
    from rich.text import Text

    return Text("warned of: " + ", ".join(warning.name for warning in warnings), style="yellow")


def _sample(sample: Sample, width: int, lines: int) -> Any:
    from rich.text import Text

    reward = "" if sample.reward is None else f", reward {number(sample.reward)}"
    asked = first_lines(printable(sample.prompt), PROMPT, width)
    answered = first_lines(printable(sample.completion), lines, width)
    return Text.assemble((f"\nthe latest sample{reward}\n", "bold"), (f"{asked}\n", "dim"), answered)
