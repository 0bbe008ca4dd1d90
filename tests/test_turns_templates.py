"""Chat templates: what they have between turns, and how the calls in a turn are read."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import talking
from fastpost.data import prompt_examples
from fastpost.turns import load_tool
from fastpost.turns.calls import hermes, parser_of
from fastpost.turns.frame import Frame
from talking import call

TOOLS = Path(__file__).resolve().parent.parent / "recipes" / "tools" / "tools.py"


def test_calls_are_read_by_the_tokenizers_own_template_where_it_has_one():
    tokenizer = talking.tokenizer()
    assert parser_of(tokenizer, [])[0] == "hermes"
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {
            "tool_calls": {
                "open": "<call>",
                "close_pattern": r"</call>\s*",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": r"<eos>\s*", "content": "text"},
        },
    }
    name, parse = parser_of(tokenizer, [])
    before = tokenizer("<|user|>2*3<eos><|assistant|>").input_ids
    reply = parse(
        before, tokenizer('so <call>{"name": "calculator", "arguments": {"expression": "2*3"}}</call><eos>').input_ids
    )
    assert name == "response_template" and reply.calls[0].arguments == {"expression": "2*3"}
    assert reply.message["content"].strip() == "so" and not reply.wrong
    assert parse(before, tokenizer("<call>{oops</call><eos>").input_ids).wrong


def test_several_calls_of_one_turn():
    reply = hermes(f"a {call('f', x=1)}\n{call('g')} b <tool_call>no</tool_call>")
    assert [(c.name, c.arguments) for c in reply.calls] == [("f", {"x": 1}), ("g", {})]
    assert len(reply.wrong) == 1 and reply.message["content"] == "a b <tool_call>no</tool_call>"


def test_templates_without_a_place_for_tools_are_refused():
    tokenizer = talking.tokenizer()
    ends = frozenset({tokenizer.eos_token_id})
    mute = talking.TEMPLATE.replace("<tool_call>", "CALL ")
    tokenizer.chat_template = mute
    with pytest.raises(ValueError, match="response_template"):
        Frame(tokenizer, ends, []).checked(tools=True, user=False, marks="<tool_call>")
    tokenizer.chat_template = talking.TEMPLATE.replace("<eos>", "")
    with pytest.raises(ValueError, match="eos_token_id"):
        Frame(tokenizer, ends, []).checked(tools=True, user=False)
    tokenizer.chat_template = talking.TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}")
    with pytest.raises(ValueError, match="does not show"):
        Frame(tokenizer, ends, []).checked(tools=True, user=False)
    with pytest.raises(ValueError, match="list of messages"):
        prompt_examples([{"prompt": "2*3"}], tokenizer, None, tools=[])


QWEN = "\n<|im_start|>user\n<tool_response>\nanswer\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
LLAMA = (
    '<|start_header_id|>ipython<|end_header_id|>\n\n"answer"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
)
TEMPLATES = {
    "qwen2_5": (["<|im_end|>"], QWEN),
    "qwen3": (["<|im_end|>"], QWEN),
    "qwen3_5_think": (["<|im_end|>"], QWEN + "<think>\n"),
    "llama3_1": (["<|eot_id|>", "<|eom_id|>"], LLAMA),
    "gptoss": (
        ["<|call|>", "<|return|>", "<|end|>"],
        '<|start|>functions.tool to=assistant<|channel|>commentary<|message|>"answer"<|end|><|start|>assistant',
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_models_templates_have_their_own_words_between_turns(name: str):
    trl = pytest.importorskip("trl")
    ends, between = TEMPLATES[name]
    tokenizer = talking.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    tokenizer.bos_token = "<pad>"
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    marks = frozenset(tokenizer.convert_tokens_to_ids(ends))
    frame = Frame(tokenizer, marks, [load_tool(f"{TOOLS}:calculator").schema]).checked(tools=True, user=False)
    asked = [{"role": "user", "content": "2*3"}]
    function = {"name": "tool", "arguments": {"expression": "2*3"}}
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    told = [{"role": "tool", "name": "tool", "content": "answer"}]
    tail, _ = frame.tail([*asked, called], told, tokenizer.convert_tokens_to_ids(ends[0]), {})
    assert tokenizer.decode(tail) == between
    assert frame.corrector == ("user" if name == "gptoss" else "tool")
