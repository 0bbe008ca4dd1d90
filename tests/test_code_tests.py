"""Code against unit tests as a reward: what passes, how it is cut out of a completion, and what is counted."""

from __future__ import annotations

import pytest

from fastpost import sandbox
from fastpost.rewards import load_reward, score
from fastpost.rewards.code_tests import CodeTests, code_of

try:
    sandbox.check()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

SMALL = {"seconds": 60.0, "cpu_seconds": 1, "memory_mb": 256, "workers": 2}
ADD = "def add(a, b):\n    return a + b\n"
ASSERTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
SUM = "print(sum(map(int, input().split())))\n"
PAIRS = [{"input": "1 2", "output": "3"}, {"input": "4 5\n", "output": "9 \n\n"}]


def test_code_that_passes_and_code_that_does_not():
    completions = [
        f"So:\n```python\n{ADD}```\nThat is it.",
        [{"role": "assistant", "content": SUM}],
        "no code",
        ADD,
        ADD,
    ]
    tests = [ASSERTS, PAIRS, ASSERTS, None, []]
    assert CodeTests(**SMALL)(completions, tests=tests) == [1.0, 1.0, 0.0, None, None]


def test_a_part_of_the_tests():
    half = "def add(a, b):\n    return 3\n"
    tests = [ASSERTS, "assert add(0, 0) == 3", [*ASSERTS, {"input": "", "output": ""}], [PAIRS[0], PAIRS[1]]]
    completions = [half, half, half, "print(3)"]
    assert CodeTests(**SMALL)(completions, tests=tests) == [0.0, 1.0, 0.0, 0.0]
    assert CodeTests(partial=True, **SMALL)(completions, tests=tests) == [0.5, 1.0, 2 / 3, 0.5]


def test_data_sets_write_tests_in_several_ways():
    human_eval = "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)"
    kod_code = "from solution import add\ndef test_add():\n    assert add(1, 2) == 3\n"
    mbpp = "assert math.isclose(add(1, 2), 3) and seen == []"
    tests, setup = [human_eval, kod_code, mbpp], [None, None, "import math\nseen = []"]
    reward = CodeTests(**SMALL)
    assert reward([ADD] * 3, tests=tests, setup=setup) == [1.0, 1.0, 1.0]
    assert reward([ADD.replace("+", "-")] * 3, tests=tests, setup=setup) == [0.0, 0.0, 0.0]
    assert reward([ADD], tests=[mbpp], setup=["import no_such_module"]) == [0.0]


def test_a_program_is_not_judged_by_what_it_says_of_itself():
    completions = [
        "print('passed'); raise SystemExit(0)",
        "import os\nprint(3, flush=True)\nos._exit(0)",
        "print(3); 1 / 0",
    ]
    assert CodeTests(**SMALL)(completions, tests=[PAIRS] * 3) == [0.0, 0.0, 0.0]


def test_the_code_of_a_completion():
    assert code_of("a\n```python\nx = 1\n```\nb\n```py\ny = 2\n```\n") == "y = 2\n"
    assert code_of("```python\nx = 1\n```</think>\n```\ny = 2\n```") == "y = 2\n"
    assert code_of("```python\nx = 1\n") == "x = 1\n"
    assert code_of("x = 1") == "x = 1"


def test_what_was_contained_is_counted():
    completions = [ADD, "while True: pass", "import os\nwhile True: os.fork()", "x = bytearray(1 << 30)"]
    reward = load_reward("code_tests(seconds=60, cpu_seconds=1, memory_mb=256)")
    given = {"prompts": ["q"] * 4, "completions": completions, "completion_ids": [[1]] * 4}
    scores = score([reward], None, **given, columns={"tests": [ASSERTS] * 4}, timeout=120.0)
    assert scores.rewards.tolist() == [1.0, 0.0, 0.0, 0.0]
    counted = {name: value for name, value in scores.metrics.items() if value}
    assert counted == {"code_tests/cpu": 0.25, "code_tests/error": 0.25, "code_tests/memory": 0.25}


def test_tests_that_are_none_are_named():
    with pytest.raises(ValueError, match=r"the test 'assert add\(1' is not Python: '\(' was never closed"):
        CodeTests(**SMALL)([ADD], tests=[["assert add(1"]])
    with pytest.raises(ValueError, match=r"a test must be Python, or an object .* got \{'input': 3\}"):
        CodeTests(**SMALL)([ADD], tests=[[{"input": 3}]])
    with pytest.raises(ValueError, match=r"the test 'def check\(f\).* defines things and tests nothing"):
        CodeTests(**SMALL)([ADD], tests=["def check(f):\n    assert f(1, 2) == 3\n"])
    for value in ('["assert add(1, 2) == 3"]', "import math\nadd(1, 2) == 4"):
        with pytest.raises(ValueError, match=r"is a value and tests nothing: assert it, .* several tests are a list"):
            CodeTests(**SMALL)([ADD], tests=[value])
    with pytest.raises(ValueError, match=r"'code_tests\(memory_mb=0\)': memory_mb must be above 0"):
        load_reward("code_tests(memory_mb=0)")


def test_without_a_sandbox_the_run_is_refused_before_it_begins(monkeypatch):
    monkeypatch.setattr("fastpost.sandbox.inside.landlock.version", lambda: 0)
    with pytest.raises(ValueError, match="'code_tests': code that a model wrote needs Landlock"):
        load_reward("code_tests")
