"""What is trained on of a group, how much answers differ, and prompts with a hint."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.data import Prompt, prompts
from fastpost.stages.diversity import distinct_answers, distinct_n
from fastpost.stages.groups import Answer
from fastpost.stages.hints import check_hint, fields_of, hinted
from fastpost.stages.selecting import selected

GROUP = [
    Answer("a", 1, True, reward=0.5),
    Answer("b", 1, True, reward=1.0),
    Answer("cut off", 9, False, reward=2.0),
    Answer("b", 1, True, reward=1.0),
    Answer("nobody judged", 1, True),
    Answer("c", 1, True, reward=1.0),
    Answer("d", 1, True, reward=0.0),
]


@pytest.mark.parametrize(
    ("count", "threshold", "deduplicate", "wanted"),
    [
        (1, None, True, "b"),
        (1, 1.5, True, ""),
        (2, None, True, "bc"),
        (2, None, False, "bb"),
        (None, 0.5, True, "bca"),
        (None, 0.5, False, "bbca"),
        (None, None, True, "bcad"),
        (9, 1.0, True, "bc"),
    ],
)
def test_the_best_first_and_of_equals_the_earlier(
    count: int | None, threshold: float | None, deduplicate: bool, wanted: str
):
    assert "".join(answer.text for answer in selected(GROUP, count, threshold, deduplicate)) == wanted


def test_a_text_that_was_judged_twice_counts_by_the_better():
    twice = [Answer("a", 1, True, reward=0.0), Answer("b", 1, True, reward=1.0), Answer("a", 1, True, reward=2.0)]
    assert [answer.reward for answer in selected(twice, None, None, True)] == [2.0, 1.0]


def test_diversity_by_hand():
    assert distinct_n(["a b a b", "b a"], 1) == 2 / 6
    assert distinct_n(["a b a b", "b a"], 2) == 2 / 4
    assert distinct_n(["a", ""], 2) == 0
    assert distinct_answers([["a", "a", "b", "b"], ["a"], ["x", "y"]]) == pytest.approx((0.5 + 1 + 1) / 3)


def test_a_hint_changes_what_is_asked_and_nothing_else():
    fast = tiny.tokenizer()
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    rows = [{"prompt": "1+1=", "answer": 2}, {"prompt": [*talk, {"role": "user", "content": "1+2="}], "answer": 3}]
    plain = [*prompts(rows[:1], fast, None), *prompts(rows[1:], fast, None)]
    found = hinted(plain[:1], "{prompt}({answer})", fast) + hinted(plain[1:], "{prompt}({answer})", fast)
    assert [(p.prompt, p.columns) for p in found] == [(p.prompt, p.columns) for p in plain]
    assert [fast.decode(p.input_ids).replace(" ", "") for p in found] == [
        "1+1=(2)",
        "<|user|>hi<|assistant|>yes?<eos><|user|>1+2=(3)<|assistant|>",
    ]


def test_a_hint_that_cannot_be_filled_is_refused():
    with pytest.raises(ValueError, match=r"must have \{prompt\} in it"):
        fields_of("the answer is {answer}")
    with pytest.raises(ValueError, match=r"must have \{prompt\} in it"):
        fields_of("{prompt} {answer.secret}")
    with pytest.raises(ValueError, match=r"is no template"):
        fields_of("{prompt} {")
    with pytest.raises(ValueError, match=r"rows without 'answer'"):
        check_hint("{prompt}{answer}", [Prompt("a", [1], {"answer": 1}), Prompt("b", [1], {"answer": None})])
    check_hint("{prompt}{{}}", [Prompt("a", [1], {})])
