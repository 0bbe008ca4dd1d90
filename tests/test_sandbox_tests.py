"""Unit tests on an answer: what passes, what fails, and that no answer can say of itself that it passed."""

from __future__ import annotations

import textwrap
from dataclasses import replace

import pytest

from fastpost import sandbox
from fastpost.sandbox import Limits

try:
    sandbox.check()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

SMALL = Limits(seconds=60.0, cpu_seconds=1, memory_mb=256, output_kb=64)  # seconds: of a busy machine
ANSWER = """
import math
from dataclasses import dataclass

def add(a, b=0): return a + b
def same(x): return x
def apply(f, xs): return [f(x) for x in xs]
def bubble(xs): xs.sort()
def forget(d, s): d.clear(), s.add(9)
def count(n): yield from range(n)
def fail(): raise KeyError("k")
def own(): raise Odd("o")
class Odd(Exception): pass

@dataclass
class Point:
    x: int
    y: int = 0
    def __add__(self, other): return Point(self.x + other.x, self.y + other.y)

class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

if __name__ == "__main__":
    input("never asked")
"""
TRUE = [
    "assert add(1, 2) == 3 and add('a', b='b') == 'ab'",
    "for x in (None, True, 2**200, -0.5, float('inf'), 1j, b'\\xff', 'é\\ud800', [1, [2]], (1, (2,)), {1},"
    " frozenset({(1, 2)}), {1: {'a': ()}}):\n    assert same(x) == x and type(same(x)) is type(x)",
    "assert apply(lambda x: x + 1, [1, 2]) == [2, 3]",
    "xs = [3, 1]; bubble(xs); assert xs == [1, 3]",
    "d, s = {1: 2}, {1}; forget(d, s); assert d == {} and s == {1, 9}",
    "assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0",
    "try: fail()\nexcept KeyError: pass\nelse: raise AssertionError",
    "try: own()\nexcept Exception as e: assert 'Odd: o' in str(e)\nelse: raise AssertionError",
    "s = Stack(); s.push(4); s.push(5); assert len(s) == 2 and s[1] == 5 and s.items == [4, 5]",
    "assert isinstance(s, Stack) and not isinstance(s, Point) and not isinstance(3, Stack)",
    "p = Point(1, y=2); p.x = 5; assert p == Point(5, 2) and p != Point(1) and (p + p).x == 10",
    "assert str(Point(1)) == 'Point(x=1, y=0)' and same(p) == p and 4 in s and 6 not in s",
    "def check(candidate):\n    assert candidate(2, 2) == 4\ncheck(add)",
]
FALSE = [
    "assert add(1, 2) == 4",
    "assert undefined(1)",
    "assert Point(1) == 1 or 1 == Point(1) or Point(3) in [1, 2]",
    "assert Point(1) + 1",
    "this is not Python",
    "import sys; sys.exit(0)",
    "fail()",
]


def test_true_tests_pass_and_false_ones_do_not():
    tested = sandbox.run_tests(ANSWER, TRUE + FALSE, SMALL)
    assert tested.passed == (True,) * len(TRUE) + (False,) * len(FALSE), tested.stderr
    assert tested.status == "ok"


FORGERIES = {
    "says so": "print('passed', 1, '1', 'OK')\ndef add(a, b): return 0",
    "leaves with success": "import os\ndef add(a, b):\n    print('1', flush=True)\n    os._exit(0)",
    "leaves when imported": "raise SystemExit(0)",
    "equals everything": """
        class Yes(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 3
            __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda self, other: True
            def __sub__(self, other): return Yes(0)
            __rsub__ = __abs__ = __round__ = lambda self, *_: 3
        def add(a, b): return Yes(0)
    """,
    "equals everything and is nothing": """
        class Yes:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda self, other: True
            def __sub__(self, other): return 0
            __rsub__ = __abs__ = __round__ = __float__ = __index__ = lambda self, *_: 3
        def add(a, b): return Yes()
    """,
    "has built-ins of its own": """
        def add(a, b): return 0
        def abs(x): return 0
        def all(x): return True
        def round(*x): return 3
        def isinstance(*x): return True
        AssertionError = None
    """,
    "changes the built-ins": """
        import builtins
        builtins.AssertionError = builtins.abs = lambda *x: 0
        def add(a, b): return 0
    """,
    "writes to every file that is open": """
        import os
        def add(a, b):
            for fd in range(64):
                try: os.write(fd, b'{"value": true, "args": [1, 2]}\\n1\\n1\\n1\\n1\\n1\\n')
                except OSError: pass
            os._exit(0)
    """,
    "looks for the tests": """
        import gc, sys
        def add(a, b):
            for found in gc.get_objects():
                if isinstance(found, str) and 'assert' in found or isinstance(found, dict) and 'verdicts' in found:
                    return 3
            frame = sys._getframe()
            while frame:
                if 'verdicts' in frame.f_locals: return 3
                frame = frame.f_back
            return 0
    """,
    "asks the tests' process": """
        import sys
        def add(a, b):
            peer = sys._getframe(2).f_locals.get('self')
            for op in ('getattr', 'setattr', 'call'):
                peer.writing.write(b'{"op": "%s", "args": [{"yours": 0}, "passed", 1], "kwargs": {}}\\n' % op.encode())
            peer.writing.flush()
            return 0
    """,
    "hands out built-ins": """
        import sys
        def add(a, b): return 0
        names = ("add", "abs", "all", "isinstance", "__builtins__", "__name__")
        value = {"dict": [[name, {"mine": 1}] for name in names]}
        sys.modules["peer"].Peer._served = lambda self, message: {"value": value, "args": message["args"]}
    """,
    "answers what cannot be read": """
        import sys
        def add(a, b): sys._getframe(2).f_locals['self'].writing.write(b'[]\\n{')
    """,
    "answers without end": "def add(a, b): return ['x' * (1 << 20)] * (1 << 20)",
    "never answers": "def add(a, b):\n    while True: pass",
}
TESTS = [
    "assert add(1, 2) == 3",
    "assert 3 == add(1, 2)",
    "assert add(1, 2) in [3]",
    "assert abs(add(1, 2) - 3) < 1e-6",
    "assert isinstance(add(1, 2), int) and add(1, 2) >= 3 and all([add(1, 2) == 3])",
]


@pytest.mark.parametrize("name", FORGERIES)
def test_no_answer_passes_by_saying_so(name):
    tested = sandbox.run_tests(textwrap.dedent(FORGERIES[name]), TESTS, SMALL)
    assert tested.passed == (False,) * len(TESTS), tested.stderr


def test_the_tests_that_were_passed_before_a_limit_count():
    source = "def add(a, b):\n    while a > 1: pass\n    return a + b"
    tested = sandbox.run_tests(source, ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert True"], SMALL)
    assert tested.passed[:2] == (True, False) and tested.status == "cpu"


def test_why_it_failed_is_told():
    assert sandbox.run_tests("def add(", TESTS, SMALL).status == "error"
    assert "SyntaxError" in sandbox.run_tests("def add(", TESTS, SMALL).stderr
    assert sandbox.run_tests("import time; time.sleep(600)", TESTS, replace(SMALL, seconds=2.0)).status == "timeout"
    assert sandbox.run_tests("x = bytearray(1 << 30)", TESTS, SMALL).status == "memory"
    assert sandbox.run_tests("while True: print('x' * 9999)", TESTS, SMALL).status == "output"
