"""Pairs, labels and prompts: what becomes of every row is counted, what is wrong is named with its row and column."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

import datasets

import tiny
from fastpost.data import (
    FORMATS,
    Verb,
    check_columns,
    joined,
    preference_examples,
    prompt_examples,
    prompts,
    reward_examples,
    sft_examples,
    split_pair,
    unpaired_examples,
)
from fastpost.data.counts import NOTES, Counts

TOKENIZER = tiny.tokenizer()
USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "yo"}
BAD = {"role": "assistant", "content": "no"}
PAIR = {"prompt": "ab", "chosen": "cd", "rejected": "e"}


def shown(example):
    """The text, and the part of it that carries a loss, other characters as dots."""
    tokens = [TOKENIZER.decode([i]) for i in example.input_ids]
    return "".join(tokens), "".join(t if kept else "." for t, kept in zip(tokens, example.loss_mask, strict=True))


def halves(row, max_length=None):
    (pair,), _ = preference_examples([row], TOKENIZER, max_length)
    return [shown(example) for example in pair.examples]


def noted(counts):
    return {name: getattr(counts, name) for name in NOTES if getattr(counts, name)}


def test_only_the_answers_of_a_pair_carry_a_loss():
    assert halves(PAIR) == [("abcd<eos>", "..cd<eos>"), ("abe<eos>", "..e<eos>")]
    talk = [("<|user|>hi<|assistant|>yo<eos>", "....yo<eos>"), ("<|user|>hi<|assistant|>no<eos>", "....no<eos>")]
    assert halves({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}) == talk
    assert halves({"chosen": [USER, GOOD], "rejected": [USER, BAD]}) == talk
    assert halves({"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}) == talk  # as UltraFeedback has it


def test_an_answer_of_a_pair_may_call_a_tool_or_take_turns():
    turns = [GOOD, USER, GOOD]
    assert halves({"prompt": [USER], "chosen": turns, "rejected": [BAD]})[0][1].endswith(
        "yo<eos><|user|>hi<|assistant|>yo<eos>"
    )


def test_an_implicit_prompt_is_what_both_begin_with():
    assert split_pair({"chosen": "so be it", "rejected": "so me too"}, "row 0") == ("so", " be it", " me too")
    assert split_pair({"chosen": "ab", "rejected": "abc"}, "row 0") == ("a", "b", "bc")
    with pytest.raises(ValueError, match="row 7: chosen and rejected begin with different messages"):
        split_pair({"chosen": [USER, GOOD], "rejected": [GOOD, USER]}, "row 7")
    _, counts = preference_examples([{"chosen": "ab", "rejected": "c"}], TOKENIZER, None)
    assert noted(counts) == {"promptless": 1}


def test_what_becomes_of_every_pair_is_counted():
    rows = [
        PAIR,
        PAIR,
        PAIR | {"chosen": "e"},  # the same twice
        PAIR | {"chosen": "fgx", "rejected": "fgy"},  # the same once cut
        PAIR | {"prompt": "abcd"},  # no room for an answer
        PAIR | {"rejected": " "},
    ]
    pairs, counts = preference_examples(rows, TOKENIZER, 4)
    assert [tuple(shown(e)[1] for e in pair.examples) for pair in pairs] == [("..cd", "..e<eos>")] * 2 + [
        ("..cd", ".. <eos>")
    ]
    assert (counts.rows, counts.examples, counts.tokens, counts.predicted, counts.longest) == (6, 3, 24, 12, 4)
    assert noted(counts) == {"truncated": 3, "identical": 2, "masked": 1, "without_eos": 3, "empty": 1, "duplicates": 1}
    assert str(counts) == (
        "6 rows, 3 pairs, 12 of 24 tokens predicted; 3 cut to max_length; 1 dropped with nothing left to predict; "
        "2 dropped because chosen and rejected are the same; 3 without an EOS to predict; 1 with an empty answer; "
        "1 that repeat an earlier one"
    )
    with pytest.raises(
        ValueError, match=r"no row is left: 1 rows, 0 pairs, 0 tokens; 1 dropped with .*; max_length is 2"
    ):
        preference_examples([PAIR], TOKENIZER, 2)


def test_a_template_that_rewrites_the_prompt_drops_the_pair():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tiny.TEMPLATE
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}]
    with pytest.raises(ValueError, match=r"no row is left: .* 1 dropped because the chat template rewrites"):
        preference_examples(rows, tokenizer, None)
    with pytest.raises(ValueError, match=r"no row is left: .* 2 dropped because the chat template rewrites"):
        unpaired_examples(rows, tokenizer, None)


def test_both_answers_of_a_pair_begin_at_the_same_token():
    """The template opens a turn with "think", which only one of the answers begins with."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.TEMPLATE.replace("<|assistant|>{%", "<|assistant|>yo{%")
    (pair,), _ = preference_examples([{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}], tokenizer, None)
    assert [shown(example)[1] for example in pair.examples] == ["....yo<eos>", "....no<eos>"]


def test_a_reward_model_reads_whole_sequences_up_to_their_end():
    rows = [PAIR | {"margin": 2}, PAIR | {"chosen": "cdefg", "margin": 0.5}, PAIR | {"chosen": "e", "margin": 1}]
    pairs, counts = reward_examples(rows, TOKENIZER, 5)
    assert [shown(e) for e in pairs[0].examples] == [("abcd<eos>",) * 2, ("abe<eos>",) * 2]
    assert pairs[0].margin == 2.0 and noted(counts) == {"too_long": 1, "identical": 1} and counts.predicted == 0
    assert str(counts).startswith("3 rows, 1 pairs, 9 tokens; 1 dropped, longer than max_length; ")
    talk, _ = reward_examples([{"chosen": [USER, GOOD], "rejected": [USER, BAD]}], TOKENIZER, None)
    assert shown(talk[0].chosen)[0] == "<|user|>hi<|assistant|>yo<eos>"


def test_a_reward_model_is_told_of_sequences_that_do_not_end():
    tokenizer = tiny.tokenizer()
    rows = [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}]
    tokenizer.chat_template = tiny.TEMPLATE.replace("<eos>{% end", "<eos> {% end")  # as ChatML ends a turn
    assert not reward_examples(rows, tokenizer, None)[1].without_eos
    tokenizer.chat_template = tiny.TEMPLATE.replace("<eos>", "")
    assert reward_examples(rows, tokenizer, None)[1].without_eos == 1


def test_labels_stay_with_completions_and_a_prompt_can_take_another():
    rows = [{"prompt": "ab", "completion": "c", "label": True}, {"prompt": "d", "completion": "ef", "label": False}]
    (first, second), counts = unpaired_examples(rows, TOKENIZER, None)
    assert (first.label, second.label, counts.examples) == (True, False, 2)
    assert shown(joined(first.prompt_ids, first.completion_ids, None)) == ("abc<eos>", "..c<eos>")
    assert shown(joined(first.prompt_ids, second.completion_ids, 4)) == ("abef", "..ef")
    assert shown(joined(first.prompt_ids, second.completion_ids, 1)) == ("a", ".")


def test_labels_win_over_what_else_a_row_has():
    row = {"prompt": "ab", "completion": "c", "label": False, "chosen": "a note"}
    (one,), _ = unpaired_examples([row], TOKENIZER, None)
    assert (TOKENIZER.decode(one.completion_ids), one.label) == ("c<eos>", False)


def test_pairs_come_apart_with_their_labels():
    rows = [PAIR, PAIR | {"chosen": "x"}, PAIR | {"rejected": "cd"}]
    found, counts = unpaired_examples(rows, TOKENIZER, 4)
    said = [(TOKENIZER.decode(one.completion_ids), one.label) for one in found]
    assert said == [("cd", True), ("x<eos>", True), ("e<eos>", False), ("e<eos>", False)]
    assert (counts.rows, counts.examples) == (3, 4)
    assert noted(counts) == {"truncated": 1, "identical": 1, "without_eos": 1, "duplicates": 1}


def test_prompts_are_counted_too():
    rows = [{"prompt": "ab"}, {"prompt": "ab"}, {"prompt": "abcd"}]
    found, counts = prompt_examples(rows, TOKENIZER, 3, positions=1)
    assert found == prompts(rows, TOKENIZER, 3)
    assert noted(counts) == {"too_long": 1, "duplicates": 1, "overlong": 2}
    assert str(counts).startswith("3 rows, 2 prompts, 4 tokens; 1 dropped, longer than max_length; 1 that repeat")


def test_a_second_bos_an_empty_answer_and_too_few_positions_are_counted():
    rows = [{"text": "<pad>ab"}, {"text": "<pad><pad>ab"}]
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<pad>"
    _, counts = sft_examples(rows, tokenizer, None, positions=4)
    assert noted(counts) == {"doubled_bos": 1, "overlong": 1} and counts.longest == 5
    _, counts = sft_examples([{"messages": [USER, GOOD | {"content": " "}]}], TOKENIZER, None)
    assert noted(counts) == {"empty": 1}


def test_tools_may_be_json_and_none_of_them_is_none():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ tools is none }}{% for t in tools or [] %}{{ t['name'] }}{% endfor %}" + tiny.TEMPLATE
    for tools, start in (('[{"name": "add"}]', "Falseadd<"), ([], "True<"), ("[]", "True<"), (None, "True<")):
        (example,), _ = sft_examples([{"messages": [USER, GOOD], "tools": tools}], tokenizer, None)
        assert shown(example)[0].startswith(start)
    with pytest.raises(ValueError, match=r"data.jsonl, row 0, column 'tools' is text, but not JSON: Expecting"):
        sft_examples([{"messages": [USER, GOOD], "tools": "[add"}], tokenizer, None, path="data.jsonl")


def test_every_count_has_its_words():
    numbers = {field.name for field in dataclasses.fields(Counts)}
    assert numbers - set(NOTES) == {"rows", "examples", "tokens", "predicted", "longest", "unit"}
    assert set(NOTES) < numbers


def test_the_docs_have_every_format_and_every_count():
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    formats, counts = ([line[2:-2].split(" | ") for line in table] for table in tables(page))
    said = {verb: columns for verbs, columns in formats for verb in verbs.split(", ")}
    assert said == {verb: ", ".join(map(" + ".join, names)) for verb, names in FORMATS.items()}
    assert dict(counts) == NOTES


def tables(page: str) -> list[list[str]]:
    """The rows of each table, without its head."""
    blocks = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    return [block[2:] for block in blocks]


# ---- hostile rows ----

LABELLED = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize(
    ("verb", "rows", "message"),
    [
        (
            "dpo",
            [PAIR, PAIR | {"chosen": None}],
            "d, row 1, column 'chosen' must be text or a list of messages, got nothing",
        ),
        ("dpo", [PAIR | {"rejected": 5}], "row 0, column 'rejected' must be text or a list of messages, got 5"),
        ("dpo", [PAIR | {"chosen": []}], "column 'chosen' must be text or a list of messages, got ..$"),
        (
            "dpo",
            [PAIR | {"chosen": [GOOD]}, PAIR],
            "row 0, column 'rejected' is text, where the rows before have messages",
        ),
        (
            "dpo",
            [PAIR, PAIR | {"chosen": [GOOD]}],
            "row 1, column 'chosen' is messages, where the rows before have text",
        ),
        ("orpo", [{"prompt": "a", "choosen": "b", "rejected": "c"}], "'choosen' .did you mean 'chosen'"),
        ("simpo", [{"prompt": "a"}], "simpo takes the columns 'prompt' and 'chosen' and 'rejected', or 'chosen' and"),
        ("reward", [PAIR | {"margin": "2"}], "row 0, column 'margin' must be a finite number, got '2'"),
        ("reward", [PAIR | {"margin": 1}, PAIR], "row 1, column 'margin' must be a finite number, got nothing"),
        ("reward", [PAIR | {"margin": float("nan")}], "'margin' must be a finite number, got nan"),
        ("kto", [LABELLED | {"label": "true"}], "row 0, column 'label' must be true or false, got 'true'"),
        ("kto", [LABELLED, LABELLED | {"label": 1}], "row 1, column 'label' must be true or false, got 1"),
        (
            "kto",
            [{"prompt": "a", "completion": "b"}],
            "kto takes the columns 'prompt' and 'completion' and 'label', or",
        ),
        ("ppo", [{"query": "a"}], "ppo takes the columns 'prompt'; this file has 'query'"),
        (
            "sft",
            [{"messages": [USER, {"role": "assistant", "content": None}]}],
            "content of a message must be text, got nothing",
        ),
        ("sft", [{"messages": [{"role": 3, "content": "a"}]}], "role of a message must be text, got 3"),
        (
            "sft",
            [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
            "images are not supported yet, and a message",
        ),
        ("sft", [{"messages": [USER, GOOD], "tools": 4}], "row 0, column 'tools' must be a list or its JSON, got 4"),
        (
            "sft",
            [{"messages": [USER], "chat_template_kwargs": "x"}],
            "'chat_template_kwargs' must be an object, got 'x'",
        ),
        (
            "sft",
            [{"text": "ab\ud83d"}],
            "row 0, column 'text' is not valid Unicode: '.ud83d' at character 2 is half of a pair",
        ),
        ("distill", [{"question": "a"}], "or 'messages', or 'text', or 'prompt'; this file has 'question'"),
    ],
)
def test_hostile_rows_are_named(verb, rows, message):
    with pytest.raises(ValueError, match=message):
        check_columns(rows, verb, "d")


def test_every_verb_has_its_formats_and_takes_them():
    assert set(FORMATS) == set(get_args(Verb))
    calls = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    good = {
        "dpo": [{"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, calls]}],
        "reward": [PAIR | {"margin": 1.5}],
        "kto": [LABELLED],
        "cpo": [{"chosen": "ab", "rejected": "ac"}],
        "reinforce": [{"prompt": [USER], "answer": 3}],
        "distill": [{"prompt": "a"}],
    }
    for verb, rows in good.items():
        check_columns(rows, verb, "d")
        check_columns(datasets.Dataset.from_list(rows), verb, "d")


def test_long_and_foreign_text_is_ordinary():
    text = "žluťoučký кот 猫 👩‍👩‍👧 " * 5_000
    examples, counts = sft_examples([{"prompt": text, "completion": text}], TOKENIZER, None)
    assert counts.longest == len(examples[0].input_ids) == 2 * len(text) + 1
    _, counts = preference_examples([PAIR | {"chosen": text}], TOKENIZER, 64)
    assert counts.truncated == 1 and counts.longest == 64
