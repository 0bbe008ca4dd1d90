"""Code against unit tests, in the sandbox (`fastpost.sandbox`): no files, no network, no other process, and limits."""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastpost import sandbox
from fastpost.rewards.texts import after_thinking, text_of
from fastpost.sandbox import Limits
from fastpost.sandbox.limits import Status

FENCED = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
Test = str | Mapping[str, str]


@dataclass(frozen=True)
class CodeTests:
    """1 where the code passes all tests of the column `tests`; else 0, or with `partial` the share that it passes.

    A test is Python that uses what the code defines, `assert add(1, 2) == 3`, or {"input": ..., "output": ...}, for
    code that is a program: what it reads and what it has to print, spaces at the ends of lines aside. The column
    holds a list of them, or one; empty: not judged (None). A column `setup` is Python that goes before the tests. The
    code is the last fenced block after </think>, or all of it.
    The rest are the limits of each process (sandbox/limits.py), and how many samples are run at a time (0: a CPU each).
    """

    partial: bool = False
    seconds: float = Limits.seconds
    cpu_seconds: int = Limits.cpu_seconds
    memory_mb: int = Limits.memory_mb
    files_mb: int = Limits.files_mb
    output_kb: int = Limits.output_kb
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        self._limits()
        sandbox.check()

    def _limits(self) -> Limits:
        return Limits(self.seconds, self.cpu_seconds, self.memory_mb, self.files_mb, self.output_kb)

    def __call__(
        self,
        completions: Sequence[Any],
        tests: Sequence[Any],
        setup: Sequence[str | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        wanted = [_tests(one) for one in tests]
        codes = [code_of(text_of(completion)) for completion in completions]
        with ThreadPoolExecutor(self.workers or os.cpu_count()) as pool:
            judged = list(pool.map(self._judged, codes, wanted, [None] * len(codes) if setup is None else setup))
        if log_metric is not None:
            ended = Counter(status for _, status in judged)
            for status in ("error", "timeout", "cpu", "memory", "output", "files", "threads"):
                log_metric(f"code_tests/{status}", ended[status] / max(1, len(judged)))
        return [reward for reward, _ in judged]

    def _judged(self, code: str, tests: Sequence[Test], setup: str | None) -> tuple[float | None, Status]:
        """The reward, and how the code's processes ended: the first of them that did not end well."""
        if not tests:
            return None, "ok"
        limits = self._limits()
        asserts = [test for test in tests if isinstance(test, str)]
        tested = sandbox.run_tests(code, asserts, limits, setup=setup or "") if asserts else None
        passed = list(tested.passed) if tested else []
        worst: Status = tested.status if tested else "ok"
        for test in tests:
            if isinstance(test, str):
                continue
            if not (all(passed) or self.partial):
                break
            outcome = sandbox.run(code, test["input"], limits)
            passed.append(outcome.status == "ok" and _lines(outcome.stdout) == _lines(test["output"]))
            worst = outcome.status if worst == "ok" else worst
        share = sum(passed) / len(tests)
        return share if self.partial else float(share == 1), worst


def code_of(text: str) -> str:
    """The last fenced block after </think>, or all that is there."""
    text = after_thinking(text)
    blocks = FENCED.findall(text)
    return blocks[-1] if blocks else text


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _tests(given: Any) -> Sequence[Test]:
    """A sample's tests; a ValueError for what is none."""
    tests = [] if given is None else [given] if isinstance(given, str | Mapping) else list(given)
    for test in tests:
        if isinstance(test, Mapping) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
            continue
        if not isinstance(test, str):
            raise ValueError(f"a test must be Python, or an object of texts 'input' and 'output', got {test!r:.80}")
        _check_python(test)
    return tests


def _check_python(test: str) -> None:
    """A test that only defines things, or whose value nobody looks at, would pass whatever the code is."""
    try:
        body = ast.parse(test).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the test {test!r:.80} is not Python: {error}") from None
    if all(_defines(one) or _is_value(one) for one in body):
        wrong = "is a value" if any(map(_is_value, body)) else "defines things"
        raise ValueError(
            f"the test {test!r:.80} {wrong} and tests nothing: assert it, call what it defines, name a function "
            "test_..., or move it to the column 'setup'; several tests are a list, not the text of one"
        )


def _defines(one: ast.stmt) -> bool:
    idle = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    return isinstance(one, idle) and not getattr(one, "name", "").startswith("test_")


def _is_value(one: ast.stmt) -> bool:
    """A comparison without `assert`, or a literal: `["assert ..."]` say, a list that is still JSON."""
    if not isinstance(one, ast.Expr):
        return False
    return isinstance(one.value, ast.Compare) or not any(isinstance(node, ast.Name) for node in ast.walk(one))
