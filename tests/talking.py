"""A tokenizer whose chat template has tools, and a policy that says what a test has written for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken

import tiny
from fastpost.rollout import Completion, Sampling
from fastpost.sums import make_tokenizer

# As Qwen's: reasoning of earlier turns is dropped once a user has spoken again.
TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }} {% endfor %}<eos>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'user') | list %}"
    "{% if later and '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}"
    '{% for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# And one that marks what the assistant says.
MARKED = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }} {% endfor %}<eos>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    '{% for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<eos>{% endgeneration %}"
    "{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A file of a tool: whoever runs it imports the whole file, for each call.
ROLL = '''
def roll(sides: int) -> str:
    """Rolls a die.

    Args:
        sides: How many sides it has.
    """
    return str(1 + 7 % sides)
'''
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


def tokenizer(texts: Sequence[str] = ("calculator 12*34",)) -> Any:
    made = make_tokenizer(texts)
    made.add_special_tokens({"additional_special_tokens": ROLES})
    made.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    made.chat_template = TEMPLATE
    return made


def model() -> Any:
    """A small one of this vocabulary."""
    ids = tokenizer()
    shape = {"eos_token_id": ids.eos_token_id, "pad_token_id": ids.pad_token_id}
    return tiny.model("qwen3", vocab_size=len(ids), max_position_embeddings=256, **shape)


def call(name: str, **arguments: Any) -> str:
    import json

    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@dataclass
class Scripted:
    """A sampler: `says(text so far)` is the next turn, which ends with <eos> unless it says `...` at its end."""

    tokenizer: Any
    says: Callable[[str], str]
    asked: list[tuple[list[list[int]], Sampling, list[int]]] = field(default_factory=list)
    reproducible: bool = True

    def update(self, model: Any) -> None:
        """Nothing to learn."""

    def __call__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int = 1,
        keys: Sequence[int] | None = None,
    ) -> list[Completion]:
        self.asked.append(([list(ids) for ids in prompt_ids], sampling, [*(keys or [])]))
        return [self.turn(ids, sampling) for ids in prompt_ids for _ in range(num_generations)]

    def turn(self, context: Sequence[int], sampling: Sampling) -> Completion:
        text = self.says(self.tokenizer.decode(context))
        ids = self.tokenizer(text.removesuffix("...")).input_ids
        ids = ids if text.endswith("...") else [*ids, self.tokenizer.eos_token_id]
        whole = len(ids) <= sampling.max_completion_length
        ids = ids[: sampling.max_completion_length]
        return Completion(ids, whole and not text.endswith("..."), [-1.0] * len(ids))
