"""Lines of metrics.jsonl without what no two runs share: times, and the memory of a process."""

from __future__ import annotations

from typing import Any

TIMES = ("tokens_per_second", "eps", "peak_memory_mb", "step_time/")


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(TIMES)}
