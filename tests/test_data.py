"""Rows to token sequences: every format, what carries a loss, and what is said about rows that are wrong."""

import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

import datasets
from tokenizers import AddedToken

import tiny
from fastpost.data import check_columns, prompt_examples, prompts, sft_examples
from fastpost.data.chat import inert

TOKENIZER = tiny.tokenizer()
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}


def shown(example):
    """The text, and the part of it that carries a loss, other characters as dots."""
    tokens = [TOKENIZER.decode([i]) for i in example.input_ids]
    return "".join(tokens), "".join(t if kept else "." for t, kept in zip(tokens, example.loss_mask, strict=True))


def test_what_is_inert_has_no_special_token_whatever_it_is_made_of():
    loose = tiny.tokenizer()
    loose.add_tokens([AddedToken("<|user|>", special=True)])  # as Llama's, which none of the named tokens is
    assert inert("a<eos>b <|us<eos>er|><e<eos<eos>>os>c", loose) == "ab c"
    assert inert("a < b, <x>", loose) == "a < b, <x>"


def one(row, **options):
    examples, counts = sft_examples([row], TOKENIZER, None, **options)
    return shown(examples[0]), counts


@pytest.mark.parametrize(
    ("verb", "rows", "message"),
    [
        ("grpo", [{"promt": "a", "answer": "b"}], "this file has 'promt', 'answer'; 'promt' .did you mean 'prompt'"),
        ("sft", [{"prompt": "a", "completions": "b"}], "'completions' .did you mean 'completion'"),
        ("sft", [{"conversations": []}], "sft takes the columns 'prompt' and 'completion', or 'messages', or 'text'"),
        ("sft", [{"text": "a"}, {"txt": "b"}], "row 1, column 'text' must be text, got nothing"),
        ("sft", [{"text": [USER]}], "column 'text' must be text, got"),
        ("sft", [{"messages": "hello"}], "column 'messages' must be a list of messages, got 'hello'"),
        ("sft", [{"messages": []}], "column 'messages' must be a list of messages, got"),
        ("sft", [{"messages": [{"from": "user", "value": "a"}]}], 'a message must be {"role": ..., "content": ...}'),
        (
            "sft",
            [{"prompt": "a", "completion": [ASSISTANT]}],
            "'completion' is messages, where the rows before have text",
        ),
        ("grpo", [{"prompt": "a"}, {"prompt": [USER]}], "row 1, column 'prompt' is messages, where"),
        ("grpo", [{"prompt": "a", "images": []}], "images are not supported"),
    ],
)
def test_wrong_columns_are_named_with_the_nearest_right_name(verb, rows, message):
    with pytest.raises(ValueError, match=message):
        check_columns(rows, verb, "data.jsonl")


def test_right_columns_pass():
    check_columns([{"prompt": "a", "completion": "b", "answer": 3}], "sft", "data.jsonl")
    check_columns([{"messages": [USER, ASSISTANT]}], "sft", "data.jsonl")
    check_columns(datasets.Dataset.from_list([{"prompt": [USER], "answer": "b"}]), "grpo", "data.jsonl")


def test_text_ends_with_one_eos_and_all_of_it_is_predicted():
    assert one({"text": "ab"})[0] == ("ab<eos>", "ab<eos>")
    assert one({"text": "ab<eos>"})[0] == ("ab<eos>", "ab<eos>")


def test_completions_carry_the_loss():
    row = {"prompt": "ab", "completion": "cd"}
    assert one(row)[0] == ("abcd<eos>", "..cd<eos>")
    assert one(row, completion_only_loss=False)[0] == ("abcd<eos>", "abcd<eos>")


def test_conversations_go_through_the_chat_template():
    text = "<|user|>hi<|assistant|>yo<eos>"
    row = {"messages": [USER, ASSISTANT]}
    assert one(row)[0] == (text, text)
    assert one(row, assistant_only_loss=True)[0] == (text, "....yo<eos>")
    assert one({"prompt": [USER], "completion": [ASSISTANT]})[0] == (text, "....yo<eos>")


def test_a_prompt_that_ends_with_the_assistant_is_continued():
    opening = {"role": "assistant", "content": "y"}
    found = prompts([{"prompt": [USER, opening]}], TOKENIZER, None)
    assert TOKENIZER.decode(found[0].input_ids) == "<|user|>hi<|assistant|>y"


class Merging:
    """A tokenizer that merges "b" and "c" into one token, as BPE does across the end of a prompt."""

    eos_token, eos_token_id, chat_template = "<eos>", 1, None

    def __call__(self, text, add_special_tokens=True):
        words = text.replace("bc", "\0").replace("<eos>", "\1")
        return type("Encoding", (), {"input_ids": [ord(c) for c in words]})


def test_a_token_across_the_boundary_does_not_move_the_prompt():
    examples, _ = sft_examples([{"prompt": "ab", "completion": "cd"}], Merging(), None)
    assert examples[0].input_ids == [ord("a"), ord("b"), ord("c"), ord("d"), 1]
    assert examples[0].loss_mask == [False, False, True, True, True]


def test_columns_for_the_template_reach_it():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ mood }}{% for t in tools or [] %}{{ t['name'] }}{% endfor %}" + tiny.TEMPLATE
    row = {"messages": [USER, ASSISTANT], "tools": [{"name": "add"}], "chat_template_kwargs": {"mood": "calm"}}
    examples, _ = sft_examples([row], tokenizer, None)
    assert shown(examples[0])[0].startswith("calmadd<|user|>hi")


def test_a_template_that_rewrites_the_prompt_trains_no_prompt_token():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tiny.TEMPLATE
    rows = [{"prompt": [USER], "completion": [ASSISTANT]}]
    with pytest.raises(ValueError, match=r"no row is left: .* 1 dropped because the chat template rewrites"):
        sft_examples(rows, tokenizer, None)
    tokenizer.chat_template = tiny.TEMPLATE.replace("<|assistant|>{%", "<|assistant|>think{%")  # as Qwen3 opens a turn
    examples, _ = sft_examples(rows, tokenizer, None)
    assert shown(examples[0]) == ("<|user|>hi<|assistant|>yo<eos>", "....yo<eos>")


def test_cut_and_dropped_rows_are_counted():
    rows = [
        {"prompt": "abcd", "completion": "e"},
        {"prompt": "a", "completion": "bcdef"},
        {"prompt": "a", "completion": "b"},
    ]
    examples, counts = sft_examples(rows, TOKENIZER, 4)
    assert [shown(e) for e in examples] == [("abcd", ".bcd"), ("ab<eos>", ".b<eos>")]
    assert (counts.rows, counts.examples, counts.truncated, counts.masked) == (3, 2, 1, 1)
    assert (counts.tokens, counts.predicted, counts.without_eos) == (7, 5, 1)
    assert str(counts) == (
        "3 rows, 2 examples, 5 of 7 tokens predicted; 1 cut to max_length; 1 dropped with nothing left to predict; "
        "1 without an EOS to predict"
    )
    with pytest.raises(ValueError, match="no row is left: 1 rows, 0 examples"):
        sft_examples(rows[:1], TOKENIZER, 4)
    empty, _ = sft_examples([{"prompt": "a", "completion": ""}], TOKENIZER, 4)
    assert shown(empty[0]) == ("a<eos>", ".<eos>")


def test_options_that_do_not_fit_the_rows_are_refused():
    with pytest.raises(ValueError, match="completion_only_loss needs the columns"):
        one({"text": "a"}, completion_only_loss=True)
    with pytest.raises(ValueError, match="assistant_only_loss needs conversations"):
        one({"text": "a"}, assistant_only_loss=True)
    plain = tiny.tokenizer()
    plain.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"marks the assistant's words with \{% generation %\}"):
        sft_examples([{"messages": [USER, ASSISTANT]}], plain, None, assistant_only_loss=True)
    plain.chat_template = None
    with pytest.raises(ValueError, match="row 0 is a conversation, but the tokenizer has no chat template"):
        sft_examples([{"messages": [USER, ASSISTANT]}], plain, None)
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="row 0: the chat template refused it: roles must alternate"):
        sft_examples([{"messages": [USER, ASSISTANT]}], plain, None)


def test_every_prompt_has_the_columns_of_all():
    first, second = prompts([{"prompt": "a", "answer": "1"}, {"prompt": "b", "tests": ["x"]}], TOKENIZER, None)
    assert first.columns == {"answer": "1", "tests": None}
    assert second.columns == {"answer": None, "tests": ["x"]}


def test_prompts_keep_their_columns_and_leave_long_ones_out():
    rows = [{"prompt": "abc", "answer": 1}, {"prompt": "a", "answer": 2}]
    found = prompts(rows, TOKENIZER, 2)
    assert [(p.prompt, TOKENIZER.decode(p.input_ids), p.columns) for p in found] == [("a", "a", {"answer": 2})]
    chat = prompts([{"prompt": [USER], "answer": 1}], TOKENIZER, None)[0]
    assert TOKENIZER.decode(chat.input_ids) == "<|user|>hi<|assistant|>" and chat.prompt == [USER]
    with pytest.raises(ValueError, match="every prompt is longer than max_prompt_length, 2 tokens"):
        prompts(rows[:1], TOKENIZER, 2)
    with pytest.raises(ValueError, match="every prompt of eval is longer"):
        prompt_examples(rows[:1], TOKENIZER, 2, path="eval")
    with pytest.raises(ValueError, match="no row of eval is left: 1 rows"):
        sft_examples([{"prompt": "abc", "completion": "d"}], TOKENIZER, 2, path="eval")
    with pytest.raises(ValueError, match="row 0: the prompt '' has no tokens"):
        prompts([{"prompt": ""}], TOKENIZER, None)
