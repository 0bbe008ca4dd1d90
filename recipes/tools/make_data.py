"""Products of two-digit numbers, which a model of 0.2 million parameters cannot do alone.

demonstrations.jsonl (sft) call a calculator, or guess; prompts.jsonl (grpo) and held_out.jsonl have answers alone, and
no product is in two of them. model/ is a random model, whose chat template shows it the tools and what they say.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers.utils import logging

from fastpost.sums import make_tokenizer, write_random
from fastpost.turns import load_tool

TEMPLATE = """\
{% if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }} {% endfor %}<eos>{% endif %}\
{% for message in messages %}<|{{ message.role }}|>\
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}\
{% for call in message.tool_calls or [] %}<tool_call>\
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\
</tool_call>{% endfor %}<eos>{% endgeneration %}\
{% else %}{{ message.content }}<eos>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


def asked(a: int, b: int) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"{a}*{b}"}], "answer": str(a * b)}


def demonstrated(a: int, b: int, calls: bool, schema: dict[str, Any]) -> dict[str, Any]:
    said = {"role": "assistant", "content": f"Answer: {a * b}"}
    function = {"name": "calculator", "arguments": {"expression": f"{a}*{b}"}}
    called = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "calculator", "content": str(a * b)},
    ]
    return {"prompt": asked(a, b)["prompt"], "completion": [*(called if calls else []), said], "tools": [schema]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a random model and data sets of products into a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable_progress_bar()
    draw = random.Random(options.seed)
    pairs = draw.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 2200)
    schema = load_tool(f"{Path(__file__).parent / 'tools.py'}:calculator").schema
    files = {
        "demonstrations": [demonstrated(a, b, i % 2 == 0, schema) for i, (a, b) in enumerate(pairs[:1000])],
        "prompts": [asked(a, b) for a, b in pairs[1000:2000]],
        "held_out": [asked(a, b) for a, b in pairs[2000:]],
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (options.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = make_tokenizer(['Answer: {"name": "calculator", "arguments": {"expression": "1*2"}}'] * 2)
    tokenizer.add_special_tokens({"additional_special_tokens": ROLES})
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    tokenizer.chat_template = TEMPLATE
    write_random(options.folder / "model", tokenizer, options.seed)


if __name__ == "__main__":
    main()
