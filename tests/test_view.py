"""The live view: lines in a log, a picture on a terminal, nothing on stdout, and next to no time."""

from __future__ import annotations

import io
import re
import statistics
import time
from collections.abc import Iterator
from itertools import count

import pytest

pytest.importorskip("rich")

from fastpost.watching.board import Board, Sample, draw
from fastpost.watching.text import count as counted
from fastpost.watching.text import duration, first_lines, memory, number, printable, said, sparkline
from fastpost.watching.view import View

LINE = {
    "step": 2,
    "epoch": 0.5,
    "reward": 0.25,
    "completions/mean_terminated_length": None,
    "completions/mean_length": 310.4,
    "kl": 2e-5,
    "tokens_per_second": 14321.0,
    "peak_memory_mb": 2048.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    return Terminal()


def ticks() -> Iterator[float]:
    """A clock that goes on by a second whenever it is read."""
    return map(float, count())


def played(view: View) -> None:
    view.say("train: 8 prompts")
    view.start("grpo", 10)
    for _ in range(2):
        view.step({"loss": 0.5, "reward": 0.25})
    view.line(LINE)
    view.sample(
        [{"role": "user", "content": "2+2?"}], [{"role": "assistant", "content": "it is [red]4[/red]\x1b[2J"}], 1
    )
    view.say("saved [out]")
    view.close()
    view.close()
    view.say("after")


def pictured(board: Board, width: int = 100, height: int = 30) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(draw(board, width, height))
    return console.file.getvalue()


def test_a_log_gets_a_line_of_text_for_a_line_of_metrics(capsys: pytest.CaptureFixture):
    log, clock = io.StringIO(), ticks()
    played(View(log, lambda: next(clock)))
    assert log.getvalue().splitlines() == [
        "train: 8 prompts",
        "grpo 2/10  reward 0.25  KL 2e-5  length 310  14.3k tokens/s  2.0 GiB  0:08 left",
        "saved [out]",
        "after",
    ]
    assert capsys.readouterr() == ("", "")


def test_without_a_stream_it_is_stderr(capsys: pytest.CaptureFixture):
    played(View())
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("train: 8 prompts\ngrpo 2/10") and "\x1b" not in err


def test_a_terminal_gets_a_picture_that_stays(terminal: Terminal, capsys: pytest.CaptureFixture):
    played(View(terminal))
    shown = terminal.getvalue()
    for text in (
        "train: 8 prompts\n",
        "fastpost grpo",
        "step 2/10",
        "reward",
        "0.25",
        "2.0 GiB",
        "saved [out]",
        "2+2?",
    ):
        assert text in shown
    assert "it is [red]4[/red]�[2J" in shown and "\x1b[2J" not in shown  # text is shown, never obeyed
    assert shown.endswith("after\n")
    assert capsys.readouterr() == ("", "")


def test_what_is_printed_to_stdout_stays_there(terminal: Terminal, capsys: pytest.CaptureFixture):
    view = View(terminal)
    view.start("sft", 3)
    print('{"result": 1}')
    view.close()
    assert capsys.readouterr().out == '{"result": 1}\n' and "result" not in terminal.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    played(View(terminal))
    assert "\x1b" not in terminal.getvalue() and "grpo 2/10  reward" in terminal.getvalue()


def test_a_warning_is_said_once():
    log = io.StringIO()
    view = View(log)
    view.start("grpo", 1000)
    for step in range(1, 41):
        view.line({"step": step, "frac_reward_zero_std": 1.0})
    said = [line for line in log.getvalue().splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and said[0].startswith("warning: groups without variance, from step 5: In 100% of")


def test_a_resumed_run_goes_on_where_it_was():
    log = io.StringIO()
    view = View(log)
    earlier = [{"step": step, "frac_reward_zero_std": 1.0, "reward": 0.1} for step in range(1, 5)]
    view.start("grpo", 10, 4, lines=earlier)
    view.step({})
    view.line({"step": 5, "frac_reward_zero_std": 1.0, "reward": 0.2})
    assert "grpo 5/10  reward 0.2" in log.getvalue() and "warning: groups without variance" in log.getvalue()


def test_the_picture_fits_the_terminal():
    board = Board("ppo", 100, 0)
    board.step(dict.fromkeys(["loss", "reward", "kl", "entropy", "grad_norm"], 1.0))
    board.sample = Sample("ask " * 100, "tell\n" * 100, None)
    for width, height in ((100, 30), (60, 20), (200, 50), (40, 12)):
        rows = pictured(board, width, height).splitlines()
        assert len(rows) <= height and all(len(row) <= width for row in rows)
    assert "tell" in pictured(board, 100, 30) and "tell" not in pictured(board, 40, 12)


def test_the_time_left_is_that_of_the_last_steps():
    now = [0.0]
    board = Board("sft", 1100, 0, lambda: now[0])
    assert board.left is None
    for _ in range(500):
        now[0] += 100
        board.step({})
    for _ in range(100):
        now[0] += 1
        board.step({})
    assert board.left == 500


def test_a_long_curve_keeps_its_whole_course():
    board = Board("sft", 5000, 0)
    for step in range(5000):
        board.step({"loss": float(step)})
    (row,) = (row for row in pictured(board).splitlines() if "loss" in row)
    drawn = re.findall("[▁-█]", row)
    assert (
        len(drawn) > 50 and drawn == sorted(drawn) and max(map(drawn.count, drawn)) <= 2 * min(map(drawn.count, drawn))
    )


def test_a_step_costs_less_than_a_millisecond(terminal: Terminal):
    view = View(terminal)
    view.start("grpo", 1000)
    values = dict.fromkeys(["loss", "reward", "kl", "entropy", "grad_norm", *map(str, range(40))], 1.0)
    spent = []
    for _ in range(300):
        began = time.perf_counter()
        view.step(values)
        spent.append(time.perf_counter() - began)
    view.close()
    assert statistics.median(spent) < 1e-3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.6931, "0.693"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (2e-5, "2e-5"),
        (-3.1e7, "-3.1e7"),
        (100, "100"),
    ],
)
def test_numbers_are_short(value: float, text: str):
    assert number(value) == text


def test_other_words():
    assert [counted(x) for x in (950, 12_300, 2_490_000, 7e9)] == ["950", "12.3k", "2.49M", "7B"]
    assert [memory(x) for x in (512.3, 2048)] == ["512 MiB", "2.0 GiB"]
    assert [duration(x) for x in (7, 750, 11_550)] == ["0:07", "12:30", "3:12:30"]
    assert sparkline([0, 1, 2, 3], 4) == "▁▃▆█" and sparkline([1.0] * 9, 3) == "▁▁▁" and sparkline([], 5) == ""
    assert sparkline(list(range(1000)), 8) == "▁▂▃▄▅▆▇█"
    assert first_lines("one two three\nfour", 9, 8) == "one two\nthree\nfour"
    assert first_lines("one two three\nfour", 2, 8) == "one two\nthree…"
    assert printable("a\tb\n\x1b[0mü\u202e") == "a b\n�[0mü�"
    assert said([{"role": "user", "content": "x"}]) == said("x") == "x"
