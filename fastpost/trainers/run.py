"""What goes on around a step, whatever the verb: seeds, rows, the learning rate, the optimizer, lines of the log, and
evaluations and checkpoints where they are due. The loop itself is the verb's:

    with Run("sft", config, start, len(examples)) as run:
        for _ in run.steps():
            window = [examples[i] for i in run.take()]
            run.update(backward(model, window, config, run.world), tokens)
            if run.evaluates:
                run.note(evaluate(...))
    return run.finish()

A system that ends the process by SIGTERM gets a checkpoint after the step at hand, and exit code 143.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

from fastpost.models.saving import written_aside
from fastpost.rollout.record import Where, prune
from fastpost.trainers import checkpoint
from fastpost.trainers.audience import Audience
from fastpost.trainers.checkpoint import State
from fastpost.trainers.clock import Clock
from fastpost.trainers.config import Training
from fastpost.trainers.log import Log, append, read_lines, say, written_until
from fastpost.trainers.loop import due, last_row, learning_rate, order, rounds_left, seed_step
from fastpost.trainers.plots import plot_metrics
from fastpost.trainers.start import Start


class Run:
    """A run from `start` to its last step. `rows` is how many there are, `each` how many a round takes in a process,
    and a round is `iterations` optimizer steps, between which nothing is saved. `data`: of each split, what became of
    its rows."""

    def __init__(
        self,
        verb: str,
        config: Training,
        start: Start,
        rows: int,
        *,
        each: int | None = None,
        iterations: int = 1,
        data: Mapping[str, Any] | None = None,
    ):
        self.config, self.start, self.world = config, start, start.world
        self.rows, self.each, self.iterations = rows, (each or config.rows_per_step) * self.world.size, iterations
        self.last_row = last_row(config, rows)
        self.output = Path(config.output_dir)
        self.step = start.state.step  # optimizer steps that are done
        self.taken, self.extra = start.state.rows, start.state.extra
        left = rounds_left(config, rows, self.each, iterations, self.step, self.taken - self.extra)
        self.total = self.step + left * iterations
        if not left and self.world.first:
            say(f"nothing is left to train: {self.step} steps are done; max_steps or num_train_epochs say how many")
        if (then := start.state.examples) not in (0, rows) and self.world.first:
            say(f"resuming with {rows} examples to train on, not {then} as before: their order is another")
        self.kept: dict[str, Any] = dict(start.state.kept)  # what a verb wants to find again on resume; JSON
        self._best = start.state.best
        self._round = self.step  # where the round at hand began
        self.clock = Clock()
        self._evaluated: dict[str, float] = {}
        self._asked_to_stop = False
        self.audience = None
        if self.world.first:
            checkpoint.clear(self.output)
            checkpoint.set_later_aside(self.output, self.step)
            behind = written_until(self.output, self.step)
            self.audience = Audience(verb, config, self.total, self.step, behind, data or {})
        state = start.state
        self.log = Log(self.output, self.step, state.num_tokens, state.pending, self.audience, self.world.first)

    # ---- the loop ----

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *raised: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
        if self.audience is not None:
            self.audience.close()

    def steps(self) -> Iterator[int]:
        """The first step of every round that is left. What is due after a round is done when the next one is asked
        for."""
        for first in range(self.step, self.total, self.iterations):
            seed_step(self.config.seed, first, self.world.rank)
            self._round = first
            self.clock.start()
            yield first
            assert self.step == first + self.iterations, "a round makes `iterations` updates"
            self._end_round()

    def take(self, count: int | None = None) -> list[int]:
        """The next rows: those of a round, of which the last may have fewer; or so many besides."""
        own = min(self.taken + self.each, self.last_row + self.extra)
        stop = int(own) if count is None else self.taken + count
        found = order(self.rows, self.config.seed, self.taken, stop)
        self.taken, self.extra = stop, self.extra + (count or 0)
        return found

    def update(self, values: Mapping[str, float], tokens: int, *, learns: bool = True) -> None:
        """An optimizer step on the gradients at hand, and its line in the log. `tokens` are those the model read.

        learns=False: there is no gradient, and the step is counted alone; AdamW would move the model by momentum.
        """
        rate = learning_rate(self.config, self.step, self.total)
        norm = self.start.descend(rate, self.config.max_grad_norm) if learns else 0.0
        seconds = self.clock.step()
        self.log.add({**values, "grad_norm": norm, "learning_rate": rate, **seconds}, tokens)
        self.step += 1

    @property
    def first_round(self) -> bool:
        """Whether this is the first round of the process."""
        return self._round == self.start.state.step

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation is due at the end of this round."""
        done = self._round + self.iterations
        return due(self._round, done, self.config.eval_steps) or done == self.total

    def note(self, values: Mapping[str, float]) -> None:
        """What an evaluation found."""
        self._evaluated |= values
        self.log.note(values)

    @property
    def logs(self) -> bool:
        """Whether a line is written at the end of this round."""
        done = self._round + self.iterations
        return self.evaluates or due(self._round, done, self.config.logging_steps) or done == self.total

    def show(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Lines of completions.jsonl, where the log has one, too."""
        if self.logs and self.audience is not None:
            lines = list(samples)
            append(self.output / "completions.jsonl", lines)
            self.audience.sample(lines[0])

    def finish(self) -> Any:
        """Writes the model and the curves; the model, for who wants to go on with it."""
        with self.world.on_host():
            if self.audience is not None:
                with written_aside(self.output) as aside:
                    self.start.save_model(aside)
                plot_metrics(self.output)
                address = self.audience.finish(read_lines(self.output / "metrics.jsonl")[-1])
                say(f"saved {self.config.output_dir}" + (f", and {address}" if address else ""))
        self.world.wait()
        return self.start.model

    # ---- after a round ----

    def _end_round(self) -> None:
        if self.logs:
            self.log.write(self.step, self.taken / self.rows)
        better = self._is_best()
        self._evaluated = {}
        self._asked_to_stop = self.world.any(self._asked_to_stop)
        if better or self._asked_to_stop or due(self._round, self.step, self.config.save_steps):
            where = (self.step, self.taken, self.log.num_tokens)
            state = State(*where, self.kept, self._best, self.extra, self.log.pending, self.rows)
            checkpoint.save(self.config, self.start, state)
            prune(Where(self.output), checkpoint.oldest(self.output))
        if self._asked_to_stop:
            say(f"stopped by SIGTERM after step {self.step}: go on with --resume_from_checkpoint latest")
            raise SystemExit(128 + signal.SIGTERM)

    def _is_best(self) -> bool:
        """Whether this round's evaluation is the best so far; notes it."""
        name = self.config.metric_for_best_model
        if name is None or not self._evaluated:
            return False
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in self._evaluated:
            raise ValueError(
                f"metric_for_best_model {name!r} is none of an evaluation's: {', '.join(sorted(self._evaluated))}"
            )
        value, greater = self._evaluated[name], self.config.greater_is_better
        sign = 1 if (not name.endswith("loss") if greater is None else greater) else -1
        if math.isnan(value) or (self._best is not None and sign * value <= sign * self._best["value"]):
            return False
        self._best = {"step": self.step, "value": value}
        return True

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._asked_to_stop = True
