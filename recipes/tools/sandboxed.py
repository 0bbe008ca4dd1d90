"""A tool that runs what the model wrote: `--tools sandboxed.py:python`."""

from __future__ import annotations

from fastpost.sandbox import Limits, run

LIMITS = Limits(seconds=5.0, cpu_seconds=4)  # below `tool_timeout`, so that the model is told which was reached


def python(code: str) -> str:
    """Runs a Python program, and gives what it prints.

    Args:
        code: The program. It has no network, and no files but those that it writes itself.
    """
    found = run(code, limits=LIMITS)
    if found.status == "ok":
        return found.stdout
    last = found.stderr.strip().splitlines()[-1:]  # the traceback's own words
    return "\n".join([found.stdout.rstrip(), f"{found.status}:", *last]).strip()
