"""A judge over HTTP: what it says is understood, and whatever else its server does is survived and counted."""

from __future__ import annotations

import json
import random
import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from endpoints import Handler, asked, longer, serving
from fastpost.judging import JudgeSpec, Panel, judge_of, load_judge
from fastpost.judging.endpoint import LONGEST_WAIT, retry_after
from fastpost.judging.transport import LARGEST
from fastpost.judging.verdicts import UNDECIDED, Preference
from fastpost.rewards import load_reward, score

PROMPTS = [f"question {i}" for i in range(12)]
FIRSTS = ["x" * (i % 5 + 1) for i in range(12)]
SECONDS = ["y" * ((i * 7) % 4 + 1) for i in range(12)]
RIGHT = [1.0 if len(a) > len(b) else 0.0 if len(a) < len(b) else 0.5 for a, b in zip(FIRSTS, SECONDS, strict=True)]


def panel(url: str, **changes: object) -> Panel:
    fields = {"model": "m", "endpoint": url, "timeout": 5.0, "backoff": 0.001, "retries": 3}
    return Panel([judge_of(JudgeSpec(**(fields | changes)))])


def prefer(url: str, **changes: object) -> list[Preference]:
    return panel(url, **changes).prefer(PROMPTS, FIRSTS, SECONDS)


def test_both_orders_are_asked_and_answers_find_their_questions_in_whatever_order_they_come():
    def answer(handler: Handler, body: dict) -> None:
        time.sleep(random.random() / 20)
        longer(handler, body)

    with serving(answer) as server:
        found = prefer(server.url)
    assert [one.p for one in found] == RIGHT
    assert {one.orders for one in found} == {(p, p) for p in RIGHT} and found[0].votes == (0, 2, 0)
    assert len(server.seen) == 24
    orders = {tuple(asked(body)) for body in server.seen}
    assert all((q, b, a) in orders for q, a, b in orders)
    assert server.seen[0]["temperature"] == 0 and "logprobs" not in server.seen[0]


def test_a_judge_that_likes_a_place_gives_ties_and_its_orders_show_it():
    with serving(lambda handler, body: handler.say("Verdict: A")) as server:
        (found,) = panel(server.url).prefer(["q"], ["a"], ["b"])
        (once,) = panel(server.url, both_orders=False).prefer(["q"], ["a"], ["b"])
    assert (found.p, found.votes, found.orders) == (0.5, (1, 0, 1), (1.0, 0.0)) and found.winner == "tie"
    assert (once.p, once.orders) == (1.0, (1.0, None))


def faulty(fault, times: int = 1):
    """A server that does the fault to each question a number of times before it answers well."""
    trials: dict[str, int] = {}

    def answer(handler: Handler, body: dict) -> None:
        key = json.dumps(body["messages"])
        trials[key] = trials.get(key, 0) + 1
        (fault if trials[key] <= times else longer)(handler, body)

    return answer


def drips(handler: Handler, _: dict) -> None:
    handler.send(200, b"", length=1000)
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def drips_its_head(handler: Handler, _: dict) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(100):
        handler.wfile.write(b"X-%d: 0\r\n" % i)
        handler.wfile.flush()
        time.sleep(0.05)


FAULTS = {
    "hangs": lambda handler, body: time.sleep(3),
    "drips": drips,
    "drips its head": drips_its_head,
    "garbage": lambda handler, body: handler.send(200, b"\xff\x00<html>"),
    "no completion": lambda handler, body: handler.send(200, b'{"choices": []}'),
    "a list": lambda handler, body: handler.send(200, b"[1]"),
    "no text": lambda handler, body: handler.send(200, b'{"choices": [{"message": {"content": 3}}]}'),
    "429": lambda handler, body: handler.send(429, b"slow down", {"Retry-After": "0"}),
    "500": lambda handler, body: handler.send(500, b"oops"),
    "500, cut off": lambda handler, body: handler.send(500, b"oo", length=100),
    "truncates": lambda handler, body: handler.send(200, b'{"choices": [{"mess', length=500),
    "floods": lambda handler, body: handler.send(200, b" " * (LARGEST + 1)),
    "drops": lambda handler, body: handler.connection.shutdown(socket.SHUT_RDWR),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_pass_is_asked_again(name: str):
    with serving(faulty(FAULTS[name])) as server:
        found = prefer(server.url, timeout=1.0, concurrency=24)
    assert [one.p for one in found] == RIGHT and not any(one.errors for one in found)
    assert len(server.seen) == 48


@pytest.mark.parametrize(
    ("name", "why"),
    [("hangs", "no answer within 1 s"), ("garbage", "no chat completion"), ("429", "HTTP 429: slow down")],
)
def test_what_does_not_pass_is_counted_and_costs_no_other(name: str, why: str, capsys):
    def answer(handler: Handler, body: dict) -> None:
        (FAULTS[name] if asked(body)[0] == "question 3" else longer)(handler, body)

    with serving(answer) as server:
        found = prefer(server.url, timeout=1.0, retries=1, concurrency=24)
    assert [one.p for one in found] == [None if i == 3 else p for i, p in enumerate(RIGHT)]
    assert len(found[3].errors) == 2 and why in found[3].errors[0] and found[3].votes == (0, 0, 0)
    assert f"2 votes are missing (2 times: {found[3].errors[0]})" in capsys.readouterr().err


def test_a_server_that_asks_for_time_gets_it_and_backoff_grows():
    waits: list[float] = []
    with serving(faulty(lambda handler, _: handler.send(503, b"", {"Retry-After": "7"}))) as server:
        judge = judge_of(JudgeSpec(model="m", endpoint=server.url))
        object.__setattr__(judge.ask, "sleep", waits.append)
        judge.prefer(["q"], ["a"], ["bb"], {})
    assert waits == [7.0, 7.0]
    waits.clear()
    with serving(lambda handler, _: handler.send(503, b"")) as server:
        judge = judge_of(JudgeSpec(model="m", endpoint=server.url, both_orders=False, retries=200, backoff=1e-60))
        object.__setattr__(judge.ask, "sleep", waits.append)
        judge.prefer(["q"], ["a"], ["bb"], {})
    assert all(0 <= wait <= 1e-60 * 2**k for k, wait in enumerate(waits)) and len(waits) == 200
    assert 0.3 < sum(wait / (1e-60 * 2**k) for k, wait in enumerate(waits)) / 200 < 0.7  # uniform: 1/2, sd 0.02


def test_a_retry_after_is_seconds_or_a_date_and_no_more_than_a_run_can_wait():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert retry_after("2.5") == 2.5 and 25 < retry_after(soon) <= 30
    assert [retry_after(said) for said in (None, "", "soon", "-3", "nan")] == [0.0] * 5
    assert retry_after("86400") == LONGEST_WAIT


def test_what_waiting_does_not_mend_is_an_error_at_once():
    with serving(lambda handler, _: handler.send(401, b'{"error": "bad key"}')) as server:
        with pytest.raises(ValueError, match=r'endpoint http://127.* answers HTTP 401: {"error": "bad key"}'):
            prefer(server.url, concurrency=1)
        assert len(server.seen) <= 3
    elsewhere = {"Location": "http://localhost:1/"}
    with (
        serving(lambda handler, _: handler.send(302, b"", elsewhere)) as server,
        pytest.raises(ValueError, match="answers HTTP 302"),
    ):
        prefer(server.url)


def test_a_question_that_is_refused_is_a_failure_of_its_own():
    def answer(handler: Handler, body: dict) -> None:
        if asked(body)[0] == "question 3":
            handler.send(400, b"too long")
        else:
            longer(handler, body)

    with serving(answer) as server:
        found = prefer(server.url)
    assert [one.p for one in found] == [None if i == 3 else p for i, p in enumerate(RIGHT)]
    assert found[3].errors == ("answers HTTP 400: too long",) * 2 and len(server.seen) == 24


def test_nobody_there_is_an_error_and_what_was_answered_before_is_kept(tmp_path: Path):
    with serving(longer) as server:
        url = server.url
        panel(url, cache_dir=tmp_path).prefer(PROMPTS[:5], FIRSTS[:5], SECONDS[:5])
    with pytest.raises(ValueError, match=r"endpoint http://127\S* cannot be reached: .*refused"):
        prefer(url, cache_dir=tmp_path)
    kept = panel(url, cache_dir=tmp_path).prefer(PROMPTS[:5], FIRSTS[:5], SECONDS[:5])
    assert [one.p for one in kept] == RIGHT[:5]


def test_the_cache_keeps_each_answer_as_it_comes_and_no_failure(tmp_path: Path):
    def answer(handler: Handler, body: dict) -> None:
        if asked(body)[0] == "question 7":
            handler.send(404, b"gone")
        else:
            longer(handler, body)

    with serving(answer) as server, pytest.raises(ValueError, match="404"):
        prefer(server.url, cache_dir=tmp_path, concurrency=1)
    assert 0 < len(list(tmp_path.rglob("*.json"))) < 24
    with serving(longer) as server:
        first = prefer(server.url, cache_dir=tmp_path, concurrency=1)
        asked_then = len(server.seen)
        assert prefer(server.url, cache_dir=tmp_path) == first and len(server.seen) == asked_then == 24
        prefer(server.url, cache_dir=tmp_path, temperature=0.5)
        assert len(server.seen) == 48
        for file in list(tmp_path.rglob("*.json"))[:10]:
            file.write_text("{torn")
        assert prefer(server.url, cache_dir=tmp_path) == first and len(server.seen) > 48


def test_equal_questions_are_asked_once():
    with serving(longer) as server:
        found = panel(server.url).prefer(["q"] * 4, ["aa"] * 4, ["b"] * 4)
    assert [one.p for one in found] == [1.0] * 4 and len(server.seen) == 2


def test_an_answer_without_a_verdict_is_asked_for_one():
    def answer(handler: Handler, body: dict) -> None:
        if len(body["messages"]) == 2:
            handler.say("Both have their merits, and")
        else:
            assert body["messages"][2] == {"role": "assistant", "content": "Both have their merits, and"}
            handler.say("Verdict: B")

    with serving(answer) as server:
        (found,) = panel(server.url, both_orders=False).prefer(["q"], ["a"], ["b"])
    assert found.p == 0.0 and "`Verdict: A or B or C`" in server.seen[1]["messages"][3]["content"]


def test_a_judge_that_never_decides_is_none_and_counted(capsys):
    with serving(lambda handler, _: handler.say("Verdict: A or B, who knows")) as server:
        found = prefer(server.url, reasks=2)
        scores = panel(server.url).score(["q"], ["a"])
    assert all(one.p is None and one.winner is None and one.errors == (UNDECIDED,) * 2 for one in found)
    assert scores[0].value is None
    assert len(server.seen) == 3 * 24 + 2 and f"24 votes are missing (24 times: {UNDECIDED})" in capsys.readouterr().err


def test_where_one_order_has_no_verdict_the_pair_has_none():
    def answer(handler: Handler, body: dict) -> None:
        handler.say("Verdict: A" if asked(body)[1] == "a" else "?")

    with serving(answer) as server:
        (found,) = panel(server.url).prefer(["q"], ["a"], ["b"])
    assert (found.p, found.orders, found.votes) == (None, (1.0, None), (1, 0, 0))


def test_votes_are_samples_of_their_own():
    def answer(handler: Handler, body: dict) -> None:
        handler.say(f"Verdict: {'A' if body['seed'] % 3 else 'B'}")

    with serving(answer) as server:
        (found,) = panel(server.url, votes=3, temperature=1.0, both_orders=False, seed=3).prefer(["q"], ["a"], ["b"])
    assert found.p == pytest.approx(2 / 3) and found.votes == (2, 0, 1)
    assert sorted(body["seed"] for body in server.seen) == [3, 4, 5]


def told(**logp: float) -> dict:
    """Log-probabilities as an endpoint tells them, behind a sentence that names an option."""
    words = ["I", " like", " A", ".", "\n", "Ver", "dict", ":", " B"]
    tops = [{"token": f" {name}", "logprob": value} for name, value in logp.items()]
    return {
        "content": [{"token": word, "logprob": 0.0, "top_logprobs": tops if word == " B" else []} for word in words]
    }


def test_soft_labels_are_probabilities_of_the_verdicts_token():
    import math

    logprobs = told(A=math.log(0.2), B=math.log(0.5), C=math.log(0.1), the=math.log(0.2))
    with serving(lambda handler, _: handler.say("I like A.\nVerdict: B", logprobs)) as server:
        (soft,) = panel(server.url, soft=True, both_orders=False).prefer(["q"], ["a"], ["b"])
        (hard,) = panel(server.url, both_orders=False).prefer(["q"], ["a"], ["b"])
    assert soft.p == pytest.approx((0.2 + 0.05) / 0.8, abs=1e-12) and hard.p == 0.0
    assert (server.seen[0]["logprobs"], server.seen[0]["top_logprobs"]) == (True, 20)
    for broken in (None, {"content": None}, {"content": [{"token": 3}]}, [], told()):
        with serving(lambda handler, _, broken=broken: handler.say("I like A.\nVerdict: B", broken)) as server:
            (from_words,) = panel(server.url, soft=True, both_orders=False).prefer(["q"], ["a"], ["b"])
        assert from_words.p == 0.0


def test_a_judge_is_a_reward_and_its_key_goes_to_its_server_alone(tmp_path: Path, monkeypatch):
    def answer(handler: Handler, body: dict) -> None:
        handler.say("?" if "nothing" in asked(body)[1] else f"Good.\n**Score:** {len(asked(body)[1])}/10")

    with serving(answer) as server:
        monkeypatch.setenv("MY_KEY", "secret-1")
        file = tmp_path / "brevity.yaml"
        file.write_text(
            f"model: m\nendpoint: {server.url}\napi_key_env: MY_KEY\n"
            f"rubric: Is it $answer for $5?\ncache_dir: {tmp_path}/c\n"
        )
        reward = load_reward(str(file))
        prompts = [[{"role": "user", "content": "hi"}]] * 3
        answers = [[{"role": "assistant", "content": text}] for text in ("x", "xxxxxxxxxx", "nothing")]
        found = score([reward], None, prompts, answers, [[1]] * 3, {"answer": [1, 2, 3]})
    assert reward.name == "brevity" and found.rewards[:2].tolist() == [0.0, 1.0] and found.rewards[2].isnan()
    assert found.metrics == {"judge/missing_votes": pytest.approx(1 / 3)}
    assert {"Is it 1 for $5?", "Is it 2 for $5?"} <= {
        line for body in server.seen for line in body["messages"][0]["content"].splitlines()
    }
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret-1"}
    assert not any("secret-1" in kept.read_text() for kept in tmp_path.rglob("*.json"))
    assert "secret-1" not in repr(reward.function)


def test_several_judges_have_their_mean(tmp_path: Path):
    with serving(longer) as server, serving(lambda handler, _: handler.say("Verdict: A")) as other:
        file = tmp_path / "panel.yaml"
        file.write_text(f"- {{model: m, endpoint: '{server.url}'}}\n- {{model: n, endpoint: '{other.url}'}}\n")
        found = load_judge(file).prefer(PROMPTS, FIRSTS, SECONDS)
    assert [one.p for one in found] == [(p + 0.5) / 2 for p in RIGHT]
    assert found[1].votes == (3, 0, 1) if RIGHT[1] == 1.0 else (1, 0, 3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: m\nrubrik: x", r"unknown key 'rubrik' \(did you mean 'rubric'\?\)"),
        ("rubric: x", "must have model"),
        ("[]", "a list of no judges"),
        ("- model: m\n- 3", "judge 1 must hold"),
        ("model: m\nscale: [5, 1]", r"scale must be two numbers, .* got \[5, 1\]"),
        ("model: m\nvotes: 3", "votes 3 would be the same vote at temperature 0"),
        ("model: m\nendpoint: localhost:8000", "must begin with http:// or https://"),
        ("model: m\nendpoint: http://h/v1\napi_key_env: NO_SUCH_KEY", "NO_SUCH_KEY, which the environment"),
        ("model: {", "is not YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, complaint: str):
    file = tmp_path / "judge.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        load_reward(str(file))
    with pytest.raises(ValueError, match="cannot read the judge"):
        load_reward(str(tmp_path / "none.yaml"))
