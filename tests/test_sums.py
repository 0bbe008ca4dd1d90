"""The task of the demo: what is held out is unseen, a worked sum is right, a mistaken one goes on from its mistake."""

from __future__ import annotations

import random
import re

import pytest

from fastpost import sums
from fastpost.data import check_columns
from fastpost.rewards.builtin import number_match

NUMBER = re.compile(r"\d+")


def test_held_out_terms_share_no_number_with_training_ones():
    train, held = sums.terms(random.Random(0), 3000, 500)
    assert (len(set(train)), len(set(held))) == (3000, 500)
    assert not {n for pair in train for n in pair} & {n for pair in held for n in pair}


@pytest.mark.parametrize(
    ("a", "b", "text"), [(48, 12, "8+2=10, 4+1+1=06. Answer: 60"), (97, 94, "7+4=11, 9+9+1=19. Answer: 191")]
)
def test_the_working_carries(a: int, b: int, text: str):
    assert sums.worked(a, b) == text


@pytest.mark.parametrize(
    ("slips", "text"),
    [
        ((1, 0), "8+2=11, 4+1+1=06. Answer: 61"),
        ((-1, 0), "8+2=09, 4+1+0=05. Answer: 59"),
        ((0, 1), "8+2=10, 4+1+1=07. Answer: 70"),
    ],
)
def test_a_slip_is_carried_on(slips: tuple[int, int], text: str):
    assert sums.worked(48, 12, slips) == text


def test_a_mistaken_sum_is_wrong_in_one_step_and_in_its_answer():
    draw, terms = random.Random(0), sums.terms(random.Random(0), 1000, 0)[0]
    texts = [sums.mistaken(a, b, draw) for a, b in terms]
    assert not any(number_match(texts, answer=[str(a + b) for a, b in terms]))
    for text in texts:
        steps = [step.split("=") for step in re.split(r", |\. ", text)[:-1]]
        assert sum(sum(map(int, left.split("+"))) != int(right) for left, right in steps) == 1


def test_every_file_has_its_verbs_columns_and_pairs_differ_in_the_answer():
    rows = sums.files(0, 10, 40, 20)
    verbs = {
        "demonstrations": "sft",
        "steps": "sft",
        "lessons": "sft",
        "prompts": "grpo",
        "pairs": "dpo",
        "answers": "kto",
        "mixed": "sft",
    }
    verbs |= {"held_out": "grpo", "preferences": "reward", "held_out_preferences": "reward"}
    for name, verb in verbs.items():
        check_columns(rows[name], verb, name)
    right = [row["answer"] for row in rows["prompts"]]
    for side, score in (("chosen", 1.0), ("rejected", 0.0)):
        assert number_match([row[side] for row in rows["pairs"]], answer=right) == [score] * 40
    said = number_match([row["completion"] for row in rows["answers"]], answer=right)
    assert rows.keys() == verbs.keys() and len(rows["mixed"]) == 20
    assert said == [float(row["label"]) for row in rows["answers"]] and sum(said) == 20


def test_digits_are_single_tokens_and_text_survives():
    draw = random.Random(0)
    rows = [sums.problem(a, b, draw) for a, b in sums.terms(draw, 100, 0)[0]]
    tokenizer = sums.make_tokenizer([row["prompt"] + row["completion"] for row in rows])
    text = rows[0]["prompt"] + rows[0]["completion"]
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(len(tokenizer(row["completion"]).input_ids) for row in rows) < sums.LONGEST  # and an end
    digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if NUMBER.search(token)]
    assert digits and all(len(NUMBER.findall(token)[0]) == 1 for token in digits)
