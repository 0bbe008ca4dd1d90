"""A process that compares answers by math-verify: a line of JSON in, a line out. Run as a file, without fastpost.

In: [right answer, text]. Out: 1.0, 0.0, or null where the right answer cannot be read; and "ready" once, at first. What
sympy makes of 9^{9^{9^9}} may never come back, nor mind a signal: whoever asks kills the process (math_answers.py).
"""

from __future__ import annotations

import json
import logging
import resource
import sys

MEMORY = 4 << 30  # bytes


def main() -> None:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.ERROR)  # it warns that its own time-outs, which want signals, are off
    # An answer must be LaTeX, in a box or between dollars, and a box wins: TRL's reading of it.
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    print('"ready"', flush=True)
    for line in sys.stdin:
        right, text = json.loads(line)
        try:
            gold = parse(right, parsing_timeout=0)
            found = parse(text, [latex], extraction_mode="first_match", parsing_timeout=0) if gold else []
            reward = float(verify(gold, found, timeout_seconds=0)) if gold else None
        except (RecursionError, MemoryError):
            reward = 0.0
        print(json.dumps(reward), flush=True)


if __name__ == "__main__":
    main()
