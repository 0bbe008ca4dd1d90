"""The verifiers that come with fastpost: what each accepts, its settings, and TRL's own where TRL has one."""

from __future__ import annotations

import math
import re

import pytest

from fastpost.rewards import Reward, load_reward, score
from fastpost.rewards.answers import choice_match, chosen
from fastpost.rewards.builtin import BUILTIN
from fastpost.rewards.formats import JsonSchema, TagFormat, think_format
from fastpost.rewards.lengths import RepetitionPenalty, SoftOverlongPunishment
from fastpost.rewards.math_answers import Accuracy, CosineScaled, ReasoningAccuracy


def messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


CHOSEN = [
    ("B", "B"),
    ("(C)", "C"),
    ("D.", "D"),
    ("B) because it is blue", "B"),
    ("The answer is B", "B"),
    ("The answer is (B).", "B"),
    ("Answer: **C**", "C"),
    ("answer: A because of it", "A"),
    ("It is not (A), so it is (D)", "D"),
    ("A is wrong. The correct option is D, I think", "D"),
    (r"The answer is A? No: \boxed{B}", "B"),
    (r"\boxed{\text{(C) Paris}}", "C"),
    ("<think>The answer is A.</think>The answer is B.", "B"),
    ("A cat sat there", None),
    ("the answer is a riddle", None),
    ("The answer is A riddle", None),
    ("I don't know", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "letter"), CHOSEN)
def test_the_letter_that_is_chosen(text, letter):
    assert chosen(text) == letter


def test_choices_are_compared_with_the_answer():
    assert choice_match(["B", "(A)", "x", "B"], answer=["b", "(A)", "C", None]) == [1.0, 1.0, 0.0, None]
    with pytest.raises(ValueError, match="the answer 'Paris' is not a letter"):
        choice_match(["B"], answer=["Paris"])


TAGGED = [
    ("<think>a</think><answer>b</answer>", 1.0),
    ("\n<think>a\n</think>\n\n<answer>b</answer>\n", 1.0),
    ("<think>a</think> then <answer>b</answer>", 0.0),
    ("<answer>b</answer><think>a</think>", 0.0),
    ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
    ("<think>a</think><answer>b", 0.0),
    ("<think><answer>a</think>b</answer>", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("text", "reward"), TAGGED)
def test_tags(text, reward):
    assert TagFormat()([text]) == [reward]


def test_tags_are_named():
    assert TagFormat("plan")(["<plan>x</plan>", "<think>x</think>"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"tags must be names .* got 'a, <b>'"):
        TagFormat("a, <b>")


PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
JSONS = [
    ('{"age": 3}', 1.0),
    ('<think>{}</think> {"age": 3}\n', 1.0),
    ('Here it is:\n```json\n{"age": 3}\n```\nDone.', 1.0),
    ('```\n{"age": 0.5}\n```', 0.0),
    ('{"age": "3"}', 0.0),
    ('{"age": 3} and more', 0.0),
    ('{"age": 3, "score": NaN}', 0.0),
    ("[" * 100_000, 0.0),
    ("{" + '"age": ' + "9" * 5000 + "}", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("text", "reward"), JSONS, ids=range(len(JSONS)))
def test_json_of_a_schema(text, reward):
    assert JsonSchema()([text, text], schema=[PERSON, None]) == [reward, None]


def test_a_schema_from_a_file_or_from_text_and_never_from_the_network(tmp_path):
    file = tmp_path / "person.json"
    file.write_text('{"type": "integer"}')
    assert JsonSchema(str(file))(["3", "x"]) == [1.0, 0.0]
    assert JsonSchema()(["3"], schema=['{"type": "integer"}']) == [1.0]
    with pytest.raises(ValueError, match="the schema refers to what is not in it"):
        JsonSchema()(["3"], schema=[{"$ref": "http://127.0.0.1:9/never.json"}])
    with pytest.raises(ValueError, match="is no JSON schema: 'whole' is not valid"):
        JsonSchema()(["3"], schema=[{"type": "whole"}])
    with pytest.raises(ValueError, match="needs a column 'schema'"):
        JsonSchema()(["3"])
    with pytest.raises(ValueError, match="is no file"):
        JsonSchema("nowhere.json")


def test_lengths_agree_with_trl():
    rewards = pytest.importorskip("trl.rewards")
    for most, cache in ((100, 20), (100, 100), (7, 3), (5, 0)):
        ids = [[1] * n for n in range(most + 3)]
        assert SoftOverlongPunishment(most, cache)(ids) == rewards.get_soft_overlong_punishment(most, cache)(ids)


def test_repetition_agrees_with_trl():
    rewards = pytest.importorskip("trl.rewards")
    ids = [[], [1], [1, 2], [1, 2, 3, 4], [5] * 9, [1, 2, 3] * 4, [1, 2, 1, 2, 1]]
    for n, penalty in ((1, -1.0), (2, -0.5), (3, -1.0), (9, -2.0), (3, 0.0)):
        assert RepetitionPenalty(n, penalty)(ids) == rewards.get_repetition_penalty_reward(n, penalty)(ids)


THOUGHT = [
    "<think>a</think>b",
    "<think>\na\n</think>\nb",
    "<think></think>",
    "<think>a",
    "a</think>b",
    "b",
    "",
    "x<think>a</think>b",
    "<think>a<think>b</think>c",
]


def test_think_format_agrees_with_trl_but_for_space_before_and_a_second_end():
    rewards = pytest.importorskip("trl.rewards")
    assert think_format(messages(THOUGHT)) == rewards.think_format_reward(messages(THOUGHT))
    others = messages(["\n<think>a</think>b", "<think>a</think>b</think>c"])
    assert think_format(others) == [1.0, 0.0] and rewards.think_format_reward(others) == [0.0, 1.0]


RIGHT = [
    (r"\boxed{\frac{1}{3}}", r"\frac{1}{3}"),
    (r"so \boxed{0.5}.", r"$\frac{1}{2}$"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{x^2 + 2x + 1}", "$(x+1)^2$"),
    (r"\boxed{\{1, 2\}}", r"$\{2, 1\}$"),
    (r"\boxed{50\%}", r"$50\%$"),
    ("<think>3</think> The answer is $5$.", "5"),
    (r"<think>\boxed{7}</think> \boxed{5}", "5"),
]
WRONG = [
    (r"\boxed{3} or \boxed{4}", "4"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}"),
    (r"\boxed{}", "4"),
    (r"\boxed{\frac{1}{", "4"),
    ("no idea", "4"),
    ("", "4"),
    (r"\boxed{2}", "x^2 = 4 and so on"),
    (r"\boxed{2}", "nothing of mathematics"),
    (r"\boxed{2}", ""),
]


@pytest.fixture(scope="module")
def accuracy():
    pytest.importorskip("math_verify")
    reward = Accuracy(timeout=30.0)  # for a busy machine; none of them takes long
    yield reward
    reward._worker.close()


def test_mathematics_is_compared(accuracy):
    texts, right = zip(*RIGHT[:5], strict=True)
    assert accuracy(messages(texts), solution=right) == [1.0] * 5
    texts, right = zip(*WRONG[:5], strict=True)
    assert accuracy(texts, answer=right) == [0.0] * 5
    assert accuracy([r"\boxed{2}"] * 2, solution=["nothing of mathematics", None]) == [None, None]


def test_mathematics_agrees_with_trl(accuracy):
    rewards = pytest.importorskip("trl.rewards")
    texts, right = zip(*RIGHT, *WRONG, strict=True)
    cases = {"completions": messages(texts), "solution": list(right)}
    assert accuracy(**cases) == rewards.accuracy_reward(**cases)
    thought = ReasoningAccuracy(timeout=30.0, _worker=accuracy._worker)
    assert thought(**cases) == rewards.reasoning_accuracy_reward(**cases)
    ids = [[1] * (20 * i) for i in range(len(texts))]
    scaled = CosineScaled(timeout=30.0, max_len=200, _worker=accuracy._worker)
    theirs = rewards.get_cosine_scaled_reward(200)(**cases, completion_ids=ids)
    ours = scaled(**cases, completion_ids=ids)
    assert [x is None for x in ours] == [x is None for x in theirs]
    assert [x for x in ours if x is not None] == pytest.approx([x for x in theirs if x is not None])


def test_an_answer_that_never_comes_back_is_wrong_and_counted(accuracy):
    """In a thread, as with reward_timeout; what comes after it is judged by a new process."""
    accuracy(["\\boxed{1}"], solution=["1"])
    first = accuracy._worker.process.pid
    quick = Accuracy(timeout=1.0, _worker=accuracy._worker)
    tower = r"\boxed{9^{9^{9^{9}}}}"
    completions = [r"\boxed{2}", tower, r"\boxed{2}"]
    given = {"prompts": ["q"] * 3, "completions": completions, "completion_ids": [[1]] * 3}
    reward = Reward("accuracy_reward", quick)
    scores = score([reward], None, **given, columns={"solution": ["2", "3", "2"]}, timeout=120.0)
    assert scores.rewards.tolist() == [1.0, 0.0, 1.0]
    assert scores.metrics == {"math_timeouts": 1.0}
    assert accuracy._worker.process.pid != first


def test_settings_are_given_as_in_a_call():
    reward = load_reward("repetition_penalty_reward(ngram_size=2, max_penalty=-0.5)")
    assert reward.name == "repetition_penalty_reward" and reward.function == RepetitionPenalty(2, -0.5)
    assert load_reward("repetition_penalty_reward").function == RepetitionPenalty()
    assert load_reward("tag_format(tags='plan')").function == TagFormat("plan")
    assert load_reward("soft_overlong_punishment_reward(max_completion_len=9, soft_punish_cache=2)").function([[1] * 9])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("repetition_penalty_reward(ngram=2)", r"no setting 'ngram', it has ngram_size, max_penalty .did you mean"),
        ("repetition_penalty_reward(2)", r"given by name, as in repetition_penalty_reward\(setting=1\)"),
        ("repetition_penalty_reward(ngram_size=open('x'))", "are numbers and texts"),
        ("repetition_penalty_reward(ngram_size=2.5)", r"ngram_size must be of type int, got 2\.5"),
        (
            "repetition_penalty_reward(ngram_size=0)",
            r"'repetition_penalty_reward\(ngram_size=0\)': .* at least 1 token",
        ),
        ("repetition_penalty_reward(max_penalty=1)", "max_penalty must be at most 0"),
        ("exact_match(strict=True)", "no setting 'strict', it has none"),
        ("soft_overlong_punishment_reward", r"write 'soft_.*\(max_completion_len=\.\.\., soft_punish_cache=\.\.\.\)'"),
        ("soft_overlong_punishment_reward(max_completion_len=1, soft_punish_cache=2)", "from 0 to max_completion_len"),
        ("think_format_reward", "is no built-in .*did you mean"),
        ("cosine_scaled_reward(_worker=1)", "no setting '_worker'"),
        ("accuracy_reward(timeout=0)", "timeout must be above 0 seconds"),
    ],
)
def test_bad_settings_are_named(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_reward(spec)
    assert repr(spec) in str(caught.value)


def test_several_are_added_by_weight_and_logged_apart():
    names = ["think_format", "repetition_penalty_reward(ngram_size=1)", "number_match"]
    given = {"prompts": ["q"], "completions": ["<think>a</think>3"], "completion_ids": [[1, 1]]}
    scores = score([load_reward(name) for name in names], [0.5, 2.0, 1.0], **given, columns={"answer": ["3"]})
    assert {name: values.item() for name, values in scores.by_function.items()} == {
        "think_format": 1.0,
        "repetition_penalty_reward": -0.5,
        "number_match": 1.0,
    }
    assert math.isclose(scores.rewards.item(), 0.5 * 1 - 2 * 0.5 + 1)


def test_every_built_in_says_what_it_does():
    assert all(re.search(r"\w", function.__doc__ or "") for function in BUILTIN.values())
