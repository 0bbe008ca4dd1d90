"""Mathematical answers, equal as mathematics is: \\boxed{\\frac{1}{2}} is 0.5. By math-verify, in a process of its own.

sympy can take for ever over what a model writes, in code that no signal stops and no thread can leave. A process can be
killed, and another started: an answer that takes longer than `timeout` seconds is wrong, and counted.
"""

from __future__ import annotations

import importlib.util
import json
import math
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpost.rewards.texts import text_of, wanted

WORKER = Path(__file__).with_name("math_worker.py")
STARTING = 120.0  # seconds in which sympy is imported, on a busy machine
Log = Callable[[str, float], None]


@dataclass
class _Worker:
    """The process, once it is wanted. It ends with us, for then its stdin does."""

    process: subprocess.Popen[bytes] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def compare(self, right: str, text: str, seconds: float) -> float | None:
        """1, 0, or None where the right answer cannot be read. TimeoutError: that took too long, and was ended."""
        with self.lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([right, text]).encode() + b"\n")
                process.stdin.flush()
                return _line(process, seconds)
            except (TimeoutError, BrokenPipeError):
                self.close()
                raise TimeoutError from None

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            # -P: our own directory holds no modules for it.
            command = [sys.executable, "-P", str(WORKER)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            try:
                _line(self.process, STARTING)
            except TimeoutError:
                self.close()
                raise RuntimeError("math-verify did not start") from None
        return self.process

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _line(process: subprocess.Popen[bytes], seconds: float) -> Any:
    """What it says within so many seconds. TimeoutError: nothing, or it has ended."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    line = process.stdout.readline() if ready else b""
    if not line:
        raise TimeoutError
    return json.loads(line)


@dataclass(frozen=True)
class Accuracy:
    """1 where the \\boxed{} of the completion, or without one the LaTeX of "the answer is $...$", is right; else 0.

    The right answer is the column `solution`, or `answer`; where it is not mathematics the sample is not judged (None).
    TRL's accuracy_reward. `timeout`: seconds for an answer.
    """

    timeout: float = 5.0
    _worker: _Worker = field(default_factory=_Worker, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {self.timeout}")
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("mathematical answers are compared by math-verify: pip install math-verify")

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        log_metric: Log | None = None,
        **_: Any,
    ) -> list[float | None]:
        right = wanted(solution, answer)
        return self.compared([text_of(completion) for completion in completions], right, log_metric)

    def compared(self, texts: Sequence[str], right: Sequence[Any], log_metric: Log | None) -> list[float | None]:
        """Of texts."""
        rewards: list[float | None] = []
        late = 0
        for text, one in zip(texts, right, strict=True):
            try:
                rewards.append(None if one is None else self._worker.compare(str(one), text, self.timeout))
            except TimeoutError:
                rewards.append(0.0)
                late += 1
        if log_metric is not None:
            log_metric("math_timeouts", late)
        return rewards


@dataclass(frozen=True)
class ReasoningAccuracy(Accuracy):
    """The same of what follows the last `delimiter`, and 0 without one. TRL's reasoning_accuracy_reward."""

    delimiter: str = "</think>"

    def compared(self, texts: Sequence[str], right: Sequence[Any], log_metric: Log | None) -> list[float | None]:
        ends = [text.rpartition(self.delimiter) for text in texts]
        judged = [one if found else None for (_, found, _), one in zip(ends, right, strict=True)]
        rewards = super().compared([end for _, _, end in ends], judged, log_metric)
        return [reward if found else 0.0 for reward, (_, found, _) in zip(rewards, ends, strict=True)]


@dataclass(frozen=True)
class CosineScaled(Accuracy):
    """b + (a - b) (1 + cos(pi min(1, length / max_len))) / 2: from a at no tokens to b at `max_len` and beyond. A right
    answer goes from max_value_correct down to min_value_correct, a wrong one from min_value_wrong up to
    max_value_wrong. arXiv:2502.03373, C.1; TRL's get_cosine_scaled_reward."""

    max_len: int = 1024
    min_value_wrong: float = -1.0
    max_value_wrong: float = -0.5
    min_value_correct: float = 0.5
    max_value_correct: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_len < 1:
            raise ValueError(f"max_len must be at least 1 token, got {self.max_len}")

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        right = super().__call__(completions, **columns)
        return [
            None if one is None else self._scaled(one == 1, len(ids))
            for one, ids in zip(right, completion_ids, strict=True)
        ]

    def _scaled(self, correct: bool, length: int) -> float:
        first = self.max_value_correct if correct else self.min_value_wrong
        last = self.min_value_correct if correct else self.max_value_wrong
        return last + 0.5 * (first - last) * (1 + math.cos(min(1.0, length / self.max_len) * math.pi))
