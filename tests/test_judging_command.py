"""`fastpost judge`: pairs are labelled, the biases that a judge has are found, finished work is not done again."""

from __future__ import annotations

import json
import random
import socket
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from endpoints import Handler, Server, asked, longer, serving
from fastpost.cli import main, read_config
from fastpost.data import preference_examples
from fastpost.files import read_rows
from fastpost.judging.command import judge
from fastpost.judging.config import JudgePairs
from fastpost.judging.pairs import read_judged
from fastpost.judging.spec import read_specs
from killing import begun, ended, killed

ROOT = Path(__file__).resolve().parents[1]
N = 60


def write(directory: Path, server: Server, rows: list[dict], **fields: object) -> Path:
    lines = {"model": "judge-1", "endpoint": server.url, "backoff": 0.001, "retries": 1, "concurrency": 4} | fields
    (directory / "judge.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def config_of(directory: Path, out: str = "out", **changes: object) -> JudgePairs:
    fields = {"dataset": directory / "pairs.jsonl", "judge": directory / "judge.yaml", "output_dir": directory / out}
    return JudgePairs(**(fields | {"batch_size": 8} | changes))


def pairs(seed: int = 0) -> list[dict]:
    """The longer answer is the better one in three of four."""
    draw = random.Random(seed)
    rows = []
    for i in range(N):
        short, long = "x" * draw.randint(1, 9), "y" * draw.randint(10, 30)
        better, worse = (long, short) if i % 4 else (short, long)
        rows.append({"prompt": f"question {i}", "chosen": better, "rejected": worse, "chosen_model": "judge-1"})
    return rows


def test_the_recipe_is_a_config_and_its_judge_a_judge():
    config = read_config(JudgePairs, ["--config", str(ROOT / "recipes" / "judge.yaml")])
    assert read_specs(ROOT / config.judge)[0].rubric == "$principle"


def test_a_judge_of_length_is_found_out(tmp_path: Path, capsys):
    with serving(longer) as server:
        report = judge(config_of(write(tmp_path, server, pairs())))
    assert (report["pairs"], report["decided"], report["ties"], report["unanswered"]) == (N, N, 0, 0)
    assert report["agreement"]["accuracy"]["value"] == 0.75 and report["agreement"]["kappa"]["n"] == N
    assert 0.3 < report["agreement"]["kappa"]["value"] < 0.6  # 2 * 0.75 - 1 where the coin is even
    assert report["place"]["flips"]["value"] == 0.0 and report["place"]["first_place_wins"]["value"] == 0.5
    assert report["length"]["longer_wins"]["value"] == 1.0 and report["length"]["longer_wins_by_label"]["value"] == 0.75
    assert report["length"]["slope"] is None  # no finite one fits best
    assert report["itself"]["wins"]["value"] == 0.75 and report["itself"]["wins_by_label"]["value"] == 1.0
    printed = capsys.readouterr().out
    assert f"{N} pairs: {N} decided, 0 of them ties" in printed and "the longer answer wins, by the labels" in printed
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    rows = read_rows(tmp_path / "out" / "pairs.jsonl")
    assert len(rows) == N and all(len(row["chosen"]) > len(row["rejected"]) and row["p"] == 1.0 for row in rows)


def test_a_judge_of_places_has_ties_alone(tmp_path: Path):
    with serving(lambda handler, _: handler.say("Verdict: B")) as server:
        report = judge(config_of(write(tmp_path, server, pairs())))
    assert report["ties"] == N and report["place"]["flips"]["value"] == 1.0
    assert report["place"]["first_place_wins"]["value"] == 0.0 and report["agreement"]["kappa"]["value"] == 0.0
    assert (tmp_path / "out" / "pairs.jsonl").read_text() == ""


def test_what_it_labels_is_what_dpo_reads(tmp_path: Path):
    import tiny

    rows = [
        {"chosen": talk(f"sum {i}", "yes" * (i + 1)), "rejected": talk(f"sum {i}", "no"), "principle": f"p{i}"}
        | {"chat_template_kwargs": {"enable_thinking": False}}
        for i in range(3)
    ]
    with serving(longer) as server:
        directory = write(tmp_path, server, rows, rubric="By $principle.")
        judge(config_of(directory))
        assert "By p2." in "".join(body["messages"][0]["content"] for body in server.seen)
    labelled = read_rows(tmp_path / "out" / "pairs.jsonl")
    assert labelled[0]["prompt"] == [{"role": "user", "content": "sum 0"}]
    assert labelled[0]["chat_template_kwargs"] == {"enable_thinking": False}  # or it would be other tokens
    found, _ = preference_examples(labelled, tiny.tokenizer(), 200)
    assert len(found) == 3


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_what_is_done_is_not_asked_again_and_what_failed_is(tmp_path: Path, capsys):
    down = True

    def answer(handler: Handler, body: dict) -> None:
        if down and asked(body)[0] in ("question 5", "question 20"):
            handler.send(500, b"")
        elif asked(body)[0] == "question 9":
            handler.say("Who knows?")
        else:
            longer(handler, body)

    with serving(answer) as server:
        config = config_of(write(tmp_path, server, pairs()))
        first = judge(config)
        assert (first["decided"], first["undecided"], first["unanswered"]) == (N - 3, 1, 2)
        assert "2 were not answered: the same command asks again" in capsys.readouterr().out
        before, down = len(server.seen), False
        second = judge(config)
        assert (second["decided"], second["undecided"], second["unanswered"]) == (N - 1, 1, 0)
        assert {asked(body)[0] for body in server.seen[before:]} == {"question 5", "question 20"}
        before = len(server.seen)
        assert judge(config) == second and len(server.seen) == before
        assert json.loads((tmp_path / "out" / "judged.jsonl").read_text().splitlines()[9])["verdict"]["winner"] is None


def test_a_server_that_goes_away_costs_no_finished_work(tmp_path: Path):
    with serving(longer) as server:
        straight = judge(config_of(write(tmp_path, server, pairs()), "straight"))

    def until_it_dies(handler: Handler, body: dict) -> None:
        if len(server.seen) > 52:
            server.socket.close()
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            longer(handler, body)

    with serving(until_it_dies) as server:
        config = config_of(write(tmp_path, server, pairs(), cache_dir=tmp_path / "cache"))
        with pytest.raises(ValueError, match="cannot be reached"):
            judge(config)
    kept = len(list((tmp_path / "cache").rglob("*.json")))
    assert len((tmp_path / "out" / "work.jsonl").read_text().splitlines()) == 1 + 3 * 8 and kept >= 3 * 16
    with serving(longer, server.server_address[1]) as again:
        assert judge(config) == straight and len(again.seen) == 2 * N - kept
    (tmp_path / "judge.yaml").write_text("model: another\nendpoint: http://localhost:1/v1\n")
    with pytest.raises(ValueError, match="work that was done with model of judge 0 'judge-1', not 'another'"):
        judge(config)


def test_pairs_of_two_policies_need_no_label(tmp_path: Path):
    rows = [
        {"prompt": "q", "first": "aaa", "second": "b"},
        {"prompt": "r", "first": "a", "second": "b", "label": "tie"},
    ]
    with serving(longer) as server:
        report = judge(config_of(write(tmp_path, server, rows)))
    assert report["agreement"]["accuracy"] == {"value": 1.0, "se": 0.0, "n": 1} and report["ties"] == 1
    verdicts = [json.loads(line)["verdict"]["winner"] for line in (tmp_path / "out" / "judged.jsonl").open()]
    assert verdicts == ["first", "tie"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "q", "completion": "a"}, r"takes the columns chosen and rejected, or .* has \['prompt', 'compl"),
        ({"prompt": "q", "first": "a", "second": 3}, "row 0, column 'second' must be text or messages, got 3"),
        ({"prompt": "q", "first": "a", "second": "b", "label": "a"}, "must be first, second or tie, got 'a'"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "row 0, column 'rejected' must be"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict, complaint: str):
    with serving(longer) as server, pytest.raises(ValueError, match=complaint):
        judge(config_of(write(tmp_path, server, [row])))


def test_the_coin_names_the_chosen_answer_first_in_half_of_the_pairs():
    found = read_judged(pairs() * 10, "", seed=0)
    labels = [pair.label for pair in found]
    assert 240 < labels.count("first") < 360 and set(labels) == {"first", "second"}
    assert labels != [pair.label for pair in read_judged(pairs() * 10, "", seed=1)]


def test_by_the_command_line_a_column_that_the_rubric_lacks_is_named(tmp_path: Path, capsys):
    with serving(longer) as server:
        write(tmp_path, server, pairs(), rubric="Is it $anser?")
        words = [str(tmp_path / "pairs.jsonl"), "--judge", str(tmp_path / "judge.yaml")]
        assert main(["judge", *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "the rubric names the column 'anser', the rows have ['chosen'" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_at_random_moments_and_the_report_is_the_same(tmp_path: Path):
    def slowly(handler: Handler, body: dict) -> None:
        time.sleep(0.05)
        longer(handler, body)

    with serving(slowly) as server:
        directory = write(tmp_path, server, pairs(), cache_dir=tmp_path / "cache")
        straight = judge(config_of(directory, "straight"))
        for file in (tmp_path / "cache").rglob("*.json"):
            file.unlink()
        server.seen.clear()
        words = ["judge", str(directory / "pairs.jsonl"), "--judge", str(directory / "judge.yaml"), "--batch_size", "8"]
        words += ["--output_dir", str(directory / "killed")]
        draw, kills = random.Random(0), 3
        for _ in range(kills):
            seen = len(server.seen)
            killed(begun(words, directory), lambda: len(server.seen) >= seen + 30, draw)  # noqa: B023
        ended(begun(words, directory))
        assert len(server.seen) <= 2 * N + kills * 8  # what was under way is asked again, and nothing else
    assert json.loads((directory / "killed" / "report.json").read_text()) == straight
