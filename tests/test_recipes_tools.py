"""The tools of the recipes: a calculator, a search, an interpreter in the sandbox."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from fastpost import sandbox
from fastpost.turns import load_tool, load_tools
from fastpost.turns.bench import Bench

TOOLS = Path(__file__).resolve().parent.parent / "recipes" / "tools"


def test_the_recipes_tools_calculate_and_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tools = load_tools([f"{TOOLS}/tools.py:calculator", f"{TOOLS}/tools.py:search"])
    assert [tool.complaint({"query": "x", "expression": "1"}) is None for tool in tools] == [False, False]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("The sky is blue.\n\nGrass is green.")
    monkeypatch.chdir(tmp_path)
    bench = Bench({tool.name: (tool.file, tool.name) for tool in tools})
    expressions = ["-(2+3)*4/8", "__import__('os').getcwd()", "9**9**9"]
    said = bench.run([("calculator", {"expression": each}) for each in expressions])
    assert [outcome.status for outcome in said] == ["ok", "error", "error"] and said[0].text == "-2.5"
    (found,) = bench.run([("search", {"query": "what is green", "limit": 1})])
    assert found.text == "a.md: Grass is green."
    bench.close()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(6 * 7)", "42"),
        ("print(1)\n1 / 0", "1\nerror:\nZeroDivisionError: division by zero"),
        ("while True: pass", "cpu:|timeout:"),  # whichever is reached first
        ("import os\nwhile True: os.fork()", "error:\nPermissionError: [Errno 1] Operation not permitted"),
        ("open('/etc/passwd')", "error:\nPermissionError: [Errno 13] Permission denied: '/etc/passwd'"),
        ("import socket\nsocket.socket()", "error:\nPermissionError: [Errno 1] Operation not permitted"),
    ],
)
def test_the_recipes_interpreter_runs_what_a_model_wrote_in_the_sandbox(code: str, said: str):
    try:
        sandbox.check()
    except ValueError as error:
        pytest.skip(str(error))
    tool = load_tool(f"{TOOLS}/sandboxed.py:python")
    bench = Bench({tool.name: (tool.file, tool.name)})
    (found,) = bench.run([("python", {"code": code})])
    bench.close()
    assert found.status == "ok" and found.text.strip() in said.split("|")
