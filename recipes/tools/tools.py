"""Two tools: `--tools tools.py:calculator tools.py:search`. What a model reads of them is their docstrings."""

from __future__ import annotations

import ast
import operator
import re
from pathlib import Path

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
NOTES = Path("notes")  # a folder of .md and .txt files, where the run was started


def calculator(expression: str) -> str:
    """Calculates.

    Args:
        expression: Numbers with + - * / and brackets, such as 12*34.
    """
    return f"{_value(ast.parse(expression, mode='eval').body):g}" if len(expression) < 100 else "too long"


def _value(node: ast.expr) -> float:
    """Nothing but arithmetic: what a model wrote is never run as Python."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only numbers with + - * / and brackets")


def search(query: str, limit: int = 3) -> str:
    """Searches the notes, and gives the paragraphs that have most of the words.

    Args:
        query: Words to look for.
        limit: How many paragraphs to give.
    """
    words = set(re.findall(r"\w+", query.lower()))
    found = []
    for path in sorted([*NOTES.rglob("*.md"), *NOTES.rglob("*.txt")]):
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace")):
            hits = len(words & set(re.findall(r"\w+", paragraph.lower())))
            found.append((hits, f"{path.name}: {paragraph.strip()}"))
    best = sorted((each for each in found if each[0]), key=lambda each: -each[0])[:limit]
    return "\n\n".join(text for _, text in best) or "nothing found"
