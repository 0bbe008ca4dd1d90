"""Rewards: what the verifiers accept, how functions are called, and that a bad reward names its sample."""

import asyncio
import math
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fastpost.rewards import Reward, load_reward, load_rewards, score
from fastpost.rewards.answers import exact_match, last_number, number_match
from fastpost.rewards.formats import think_format

PROMPTS = ["1+1", "2+2", "3+3"]
COMPLETIONS = ["2", "5", "6"]
IDS = [[7], [8], [9, 1]]


def scored(*functions, weights=None, completions=COMPLETIONS, **columns):
    rewards = [Reward(function.__name__, function) for function in functions]
    return score(rewards, weights, PROMPTS, completions, IDS, columns, step=4)


def test_functions_get_what_they_ask_for_by_name():
    seen = {}

    def picky(completions, answer):
        seen["picky"] = (completions, answer)
        return [1, 0.5, True]

    def greedy(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns):
        seen["greedy"] = (prompts, completion_ids, trainer_state.global_step, columns)
        log_metric("length", 2)
        log_metric("length", 4)
        log_extra("parsed", "abc")
        return [0, None, -2]

    scores = scored(picky, greedy, weights=[1.0, 0.5], answer=[2, 4, 6], level=[0, 1, 2])
    assert seen["picky"] == (COMPLETIONS, [2, 4, 6])
    assert seen["greedy"] == (PROMPTS, IDS, 4, {"answer": [2, 4, 6], "level": [0, 1, 2]})
    assert scores.rewards.tolist() == [1.0, 0.5, 0.0]
    assert scores.by_function["picky"].tolist() == [1.0, 0.5, 1.0]
    assert scores.metrics == {"length": 3.0} and scores.extra == {"parsed": ["a", "b", "c"]}


def test_none_is_not_applicable_and_all_none_is_nan():
    def first(completions):
        return [None, 1.0, None]

    def second(completions):
        return [None, 2.0, 3.0]

    rewards = scored(first, second, weights=[10.0, 1.0]).rewards.tolist()
    assert math.isnan(rewards[0]) and rewards[1:] == [12.0, 3.0]


def test_async_functions_are_awaited_together_even_inside_a_loop():
    both = asyncio.Event()

    async def opens(completions):
        both.set()
        return [1, 1, 1]

    async def waits(completions):
        await asyncio.wait_for(both.wait(), 5)
        return [2, 2, 2]

    async def notebook():
        return scored(waits, opens).rewards.tolist()

    assert asyncio.run(notebook()) == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_or_inf_names_function_and_sample(bad):
    def broken(completions):
        return [0.0, bad, 1.0]

    with pytest.raises(
        ValueError, match=r"'broken' returned -?(nan|inf) for sample 1 \(prompt '2\+2', completion '5'\)"
    ):
        scored(broken)


def test_other_bad_returns_are_named():
    def text(completions):
        return [0.0, "good", 1.0]

    def short(completions):
        return [0.0]

    def nothing(completions):
        return None

    def by_text(completions):
        return dict.fromkeys(completions, 1.0)

    def scalar(completions):
        return torch.tensor(1.0)

    def huge(completions):
        return [0.0, 1e300, 1.0]

    with pytest.raises(ValueError, match=r"'by_text' must return a list of 3 rewards, .* got \{'2': 1.0"):
        scored(by_text)
    with pytest.raises(ValueError, match=r"'scalar' must return a list of 3 rewards, .* got tensor\(1.\)"):
        scored(scalar)
    with pytest.raises(ValueError, match=r"'huge' returned 1e\+300, more than fp32 holds, for sample 1"):
        scored(huge)
    with pytest.raises(ValueError, match="'text' returned 'good', no number, for sample 1"):
        scored(text)
    with pytest.raises(ValueError, match="'short' must return a list of 3 rewards, one a sample, got 1"):
        scored(short)
    with pytest.raises(ValueError, match="'nothing' must return a list of 3 rewards, one a sample, got None"):
        scored(nothing)


def test_an_exception_names_the_sample_that_causes_it():
    def parses(completions):
        return [float(text) for text in completions]

    async def parses_later(completions):
        return [float(text) for text in completions]

    def together(completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    long = "x" * 500
    for function in (parses, parses_later):
        with pytest.raises(
            ValueError, match=rf"'{function.__name__}' raised ValueError: .* for sample 2 \(prompt"
        ) as error:
            scored(function, completions=["1", "2", long])
        assert len(str(error.value).split("for sample 2")[1]) < 130
    with pytest.raises(ValueError, match=r"raised RuntimeError: too many, for the batch, but for no sample alone"):
        scored(together)


@pytest.mark.parametrize("values", [torch.tensor([1.0, 2.0, 3.0]), np.array([1, 2, 3]), (1, 2.0, 3)], ids=type)
def test_what_is_one_after_another_is_taken(values):
    def gives(completions):
        return values

    assert scored(gives).rewards.tolist() == [1.0, 2.0, 3.0]


def test_a_function_that_would_end_the_process_is_blamed():
    """As code that a model wrote does, where a function executes it."""

    def runs(completions):
        return [sys.exit(0) if text == "5" else 1.0 for text in completions]

    with pytest.raises(ValueError, match="'runs' raised SystemExit: 0, for sample 1"):
        scored(runs)


def test_bad_arguments_are_named():
    def needs(completions, answer):
        return [0, 0, 0]

    with pytest.raises(
        ValueError, match=r"'needs' needs the column 'answer', the dataset has \['answers'\] \(did you mean"
    ):
        scored(needs, answers=[1, 2, 3])
    with pytest.raises(ValueError, match="answer must hold one entry a sample, got 2 for 3 samples"):
        scored(needs, answer=[1, 2])
    with pytest.raises(ValueError, match=r"reward_weights must hold a number for each of \['needs'\], got 2"):
        scored(needs, weights=[1, 2], answer=[1, 2, 3])
    with pytest.raises(ValueError, match="of different names, got"):
        scored(needs, needs, answer=[1, 2, 3])
    with pytest.raises(ValueError, match="the column 'prompts' has a name"):
        scored(needs, prompts=[1, 2, 3])


def test_a_reward_is_loaded_by_name_or_from_a_file(tmp_path):
    assert load_reward("number_match").function is number_match
    file = tmp_path / "mine.py"
    file.write_text(
        "import math\n\ndef longest(completions, **_):\n    return [len(c) * math.pi for c in completions]\n"
    )
    loaded = load_reward(f"{file}:longest")
    assert loaded.name == "longest" and loaded.function(["ab"]) == [2 * math.pi]


def test_rewards_of_one_name_are_told_apart_by_their_places(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.py").write_text(f"def score(completions, **_): return [ord({name!r})] * len(completions)")
    specs = [f"{tmp_path}/a.py:score", "exact_match", f"{tmp_path}/b.py:score"]
    found = load_rewards(specs)
    assert [reward.name for reward in found] == ["score.1", "exact_match", "score.3"]
    scores = score([found[0], found[2]], [1.0, 2.0], ["p"], ["c"], [[1]], {})
    assert {name: float(x) for name, x in scores.by_function.items()} == {"score.1": 97, "score.3": 98}
    assert float(scores.rewards) == 97 + 2 * 98


def test_a_reward_that_cannot_be_loaded_is_named_with_the_nearest(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def longest(completions):\n    return []\n")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    for spec, message in {
        "number_macth": r"no built-in \(exact_match, number_match, .*\) and .* mean 'number_match'",
        f"{file}:longst": r"has no function 'longst' \(did you mean 'longest'\?\)",
        f"{tmp_path}/mime.py:longest": r"does not exist \(did you mean 'mine.py'\?\)",
        f"{file}": r"names a file but no function in it: write .*mine.py:function",
        f"{broken}:f": r"broken.py could not be imported: ModuleNotFoundError: No module named 'no_such_module'",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_reward(spec)


def test_exact_match():
    assert exact_match([" 4\n", "5"], answer=[4, "4"]) == [1.0, 0.0]
    assert exact_match([[{"role": "assistant", "content": "yes"}], "no"], solution=["yes", None]) == [1.0, None]
    both = {"answer": ["4", None, "4", None], "solution": [None, "5", "5", None]}
    assert exact_match(["4", "5", "5", "5"], **both) == [1.0, 1.0, 0.0, None]
    with pytest.raises(ValueError, match="needs a column 'answer' or 'solution'"):
        exact_match(["4"])


def test_number_match():
    assert number_match(["so 3 + 4 = 7.", "7 or 8", "none"], answer=[7, 7, 7]) == [1.0, 0.0, 0.0]
    assert number_match(["it is 1,234.50"], answer=["so\n#### 1234.5"]) == [1.0]
    assert number_match([[{"role": "assistant", "content": "-3"}], "3"], answer=["-3", None]) == [1.0, None]
    with pytest.raises(ValueError, match="the answer 'seven' has no number in it"):
        number_match(["7"], answer=["seven"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5-3", 3),
        ("x = -3", -3),
        ("(2)-1", 1),
        ("$-5", -5),
        ("1,000,000", 1000000),
        ("1,2", 2),
        ("3.", 3),
        ("0.10", 0.1),
        ("x = .5", 0.5),
        ("-.25", -0.25),
        ("it is ...5", 5),
        ("version 1.2.3", 3),
    ],
)
def test_last_number(text, number):
    assert float(last_number(text)) == number


def test_what_only_measures_makes_no_reward():
    some = lambda completions, **_: [1.0, None, 0.5]  # noqa: E731
    length = lambda completions, **_: [3.0, 3.0, None]  # noqa: E731
    rewards = [Reward("some", some), Reward("length", length)]
    expected = {(1.0, 0.0): [1.0, math.nan, 0.5], (0.0, 0.0): [0.0, 0.0, 0.0], (1.0, 2.0): [7.0, 6.0, 0.5]}
    for weights, sums in expected.items():
        found = score(rewards, weights, PROMPTS, COMPLETIONS, IDS, {}).rewards
        torch.testing.assert_close(found, torch.tensor(sums), equal_nan=True)


def test_think_format():
    good = ["<think>a\nb</think>c", "\n<think></think>"]
    bad = ["c", "<think>a", "a<think>b</think>", "<think>a<think>b</think>", "<think>a</think>b</think>"]
    assert think_format(good + bad) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_a_function_that_hangs_is_named_after_its_time():
    def slow(completions: list[str], **_) -> list[float]:
        threading.Event().wait(30)
        return [0.0] * len(completions)

    async def late(completions: list[str], **_) -> list[float]:
        await asyncio.sleep(30)
        return [0.0] * len(completions)

    for function in (slow, late):
        began = time.perf_counter()
        with pytest.raises(ValueError, match=rf"'{function.__name__}' took more than 0\.2 seconds for 1 samples"):
            score([Reward(function.__name__, function)], None, ["p"], ["c"], [[1]], {}, timeout=0.2)
        assert time.perf_counter() - began < 10


def test_a_function_that_fails_within_its_time_is_blamed_as_ever():
    def broken(completions: list[str], **_) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(ValueError, match=r"'broken' raised KeyError: 'answer', for sample 0"):
        score([Reward("broken", broken)], None, ["p"], ["c"], [[1]], {}, timeout=5.0)
