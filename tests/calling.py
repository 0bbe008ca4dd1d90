"""A policy whose first turn is always a call of the tool `roll`, since a random model hardly ever writes one.

As a program, `fastpost` with that policy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import talking
from fastpost.cli import main
from fastpost.rollout import Completion
from fastpost.rollout.sampler import Generate

Answers = Callable[..., list[Completion]]


def rolls_first(generate: Answers) -> Answers:
    """For `Generate.__call__`: the later turns stay the model's own."""

    def called(self: Any, prompt_ids: Any, sampling: Any, n: int = 1, keys: Any = None) -> list[Completion]:
        found, tokenizer = generate(self, prompt_ids, sampling, n, keys), self.tokenizer
        texts = [tokenizer.decode(ids) for ids in prompt_ids for _ in range(n)]
        call = [*tokenizer(talking.call("roll", sides=6)).input_ids, tokenizer.eos_token_id]
        turn = Completion(call, True, [-5.0] * len(call))
        return [each if "<|tool|>" in text else turn for each, text in zip(found, texts, strict=True)]

    return called


if __name__ == "__main__":
    Generate.__call__ = rolls_first(Generate.__call__)
    sys.exit(main())
