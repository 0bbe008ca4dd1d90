"""The live view of a run: a picture where the stream is a terminal, else a line of text a line of metrics.jsonl.

It writes to stderr, since stdout is for results. A step costs it microseconds: it only notes the numbers, and a thread
draws them a few times a second.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from fastpost.watching.board import Board, Sample, draw, plain
from fastpost.watching.curves import Line, is_number
from fastpost.watching.text import said
from fastpost.watching.warnings import warnings

REFRESHES = 4  # a second
RARELY = 0.05  # share by which the lines have grown when they are read for warnings again


class View:
    """start, then step, line and sample as they come, and close; say whenever there is something to say."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter):
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._live: Any = None  # rich's, on a terminal

    def start(
        self,
        verb: str,
        total: int,  # optimizer steps of the whole run
        first: int = 0,  # how many of them are done
        *,
        lines: Sequence[Line] = (),  # of metrics.jsonl, where the run goes on from a checkpoint
        target_kl: float | None = None,
    ) -> None:
        self._board = Board(verb, total, first, self._clock)
        self._lines, self._target_kl, self._read_at = list(lines), target_kl, 0
        for line in lines:
            self._board.line(line)
        if self._stream.isatty():
            self._live = self._opened()

    def step(self, values: Mapping[str, Any]) -> None:
        """One optimizer step is done, and this is what was measured in it."""
        self._board.step(values)

    def line(self, values: Line) -> None:
        """One line was written to metrics.jsonl."""
        self._lines.append(values)
        self._board.line(values)
        if self._live is None:
            print(plain(self._board, values), file=self._stream, flush=True)
        self._warn()

    def sample(self, prompt: Any, completion: Any, reward: float | None = None) -> None:
        """The latest completion: text, or messages."""
        reward = reward if is_number(reward) else None
        self._board.sample = Sample(said(prompt), said(completion), reward)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """The last picture stays. Closing twice does no harm."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _warn(self) -> None:
        """Says each warning once. Reading all lines takes longer the more there are, and is done the more rarely."""
        if len(self._lines) < self._read_at:
            return
        self._read_at = len(self._lines) * (1 + RARELY)
        known = {warning.name for warning in self._board.warnings}
        for warning in warnings(self._lines, self._board.verb, self._target_kl):
            if warning.name not in known:
                self._board.warnings = [*self._board.warnings, warning]
                self.say(f"warning: {warning}")

    def _opened(self) -> Any:
        """The picture, drawn from now on; None where the terminal cannot move its cursor."""
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream)
        if console.is_dumb_terminal:
            return None
        live = Live(
            get_renderable=lambda: draw(self._board, console.width, console.height),
            console=console,
            refresh_per_second=REFRESHES,
            redirect_stdout=sys.stdout.isatty(),  # results that are piped on stay where they belong
        )
        live.start()
        return live
