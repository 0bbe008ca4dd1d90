"""The benchmark of the head: right results are timed, wrong ones are named and are not, what is written can be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import fastpost as fp

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ["--device", "cpu", "--tokens", "16", "--hidden", "24", "--vocab", "301", "--repeats", "1"]
NO_LIBRARY = ["fastpost token_stats", "fastpost fused_loss", "naive torch", "torch linear_cross_entropy", "quack"]


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    """Programs of benchmarks/ import one another by their bare names, as `python benchmarks/head.py` finds them."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def contest():
    """Inputs, a case by its title, and its judge."""
    import cases

    def of(title: str, dtype: torch.dtype = torch.bfloat16):
        case = next(case for case in cases.CASES if case.title == title)
        x = cases.make_inputs(16, 24, 301, dtype, torch.device("cpu")).trained(case.trained)
        return case, x, cases.Judge.of(case, x)

    return of


def perturbed(function, times: float):
    """The same statistics, a little off, and gradients with them."""
    import peers

    def run(x):
        return peers.Found(fp.Stats(logp=function(x).stats.logp * times))

    return run


def test_every_case_is_measured_and_written(tmp_path, capsys):
    import cases
    import head
    import measurement

    output = tmp_path / "results" / "cpu.jsonl"
    assert head.main([*TINY, "--providers", *NO_LIBRARY, "--output", str(output)]) == 0
    assert head.main([*TINY, "--providers", *NO_LIBRARY, "--output", str(output), "--cases", "grpo"]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert {line["case"] for line in lines} == {case.title for case in cases.CASES}
    read = measurement.last_run(output)
    assert {m.case for m in read} == {"grpo, W frozen"}, "the second run, and only that"
    ours, naive = (next(m for m in read if m.provider == name) for name in ("fastpost fused_loss", "naive torch"))
    assert (ours.setup.tokens, ours.setup.hidden, ours.setup.vocab, ours.setup.dtype) == (16, 24, 301, "bfloat16")
    assert ours.setup.machine.versions["torch"] == torch.__version__ and ours.setup.machine.threads >= 1
    assert ours.errors["logp"] < 1e-5 < naive.errors["logp"]
    assert ours.over_floor == pytest.approx(ours.seconds / (2 * ours.product_seconds))
    assert naive.over_naive == 1
    printed = capsys.readouterr().out
    assert "quack: absent, " in printed and "fastpost token_stats" in printed


def test_our_own_results_pass_in_fp32_too(tmp_path):
    import head

    options = ["--providers", *NO_LIBRARY[:2], "--output", str(tmp_path / "fp32.jsonl")]
    assert head.main([*TINY, *options, "--dtype", "float32"]) == 0


@pytest.mark.parametrize("title", ["logp, W frozen", "logp, W trained"])
def test_a_peer_that_is_wrong_has_no_speed(contest, title):
    import head
    import peers

    case, x, judge = contest(title)
    right = replace(peers.PEERS[2], name="right", runs={"logp": partial(peers.naive, outputs=("logp",))})
    wrong = replace(right, name="wrong", runs={"logp": perturbed(partial(peers.naive, outputs=("logp",)), 1.1)})
    checked = [head.check(case, peer, judge, x) for peer in (right, wrong)]
    assert [c.status for c in checked] == ["ok", "WRONG"]
    assert "logp" in checked[1].reason and "dhidden" in checked[1].reason
    assert ("dweight" in checked[1].reason) == case.trained
    setup = head.Setup(head.machine(x.hidden.device), "2026-01-01", "bfloat16", 16, 24, 301, repeats=1)
    timed = head.time_case(case, checked, x, setup)
    assert timed[0].seconds > 0 and timed[1].seconds is None and timed[1].over_floor is None


def test_ours_wrong_by_1e_4_ends_the_program_without_a_table(contest, monkeypatch, tmp_path, capsys):
    import head
    import peers

    ours = peers.PEERS[0]
    wrong = replace(ours, runs={"logp": perturbed(ours.runs["logp"], 1 + 1e-4)})
    monkeypatch.setattr(head, "PEERS", (wrong, peers.PEERS[2]))
    output = tmp_path / "none.jsonl"
    assert head.main([*TINY, "--cases", "logp", "--output", str(output)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and not output.exists()
    assert "fastpost is wrong" in printed.err and "logp, W frozen: logp 1." in printed.err


def test_a_gradient_that_ignores_its_upstream_is_wrong(contest):
    """A loss and statistics that are right do not hide it."""
    import peers

    case, x, judge = contest("logp, W trained")
    right = peers.run(case, partial(peers.naive, outputs=("logp",)), x)
    wrong = replace(right, dhidden=right.dhidden * 1.2, dweight=torch.full_like(right.dweight, torch.nan))
    assert judge.verdict(right, x.sampled, ours=False)[1] == []
    complaints = judge.verdict(wrong, x.sampled, ours=False)[1]
    assert [line.split()[0] for line in complaints] == ["dhidden", "dweight"]


def test_a_peer_that_raises_is_listed_and_ours_is_not_forgiven(contest):
    import head
    import peers

    case, x, judge = contest("logp, W frozen")

    def broken(x):
        raise NotImplementedError("no such device\nmore")

    peer = replace(peers.PEERS[2], runs={"logp": broken})
    checked = head.check(case, peer, judge, x)
    assert (checked.status, checked.reason) == ("failed", "NotImplementedError: no such device")
    with pytest.raises(NotImplementedError):
        head.check(case, replace(peer, ours=True), judge, x)


def test_peak_memory_counts_what_is_above_inputs_and_results():
    import harness

    def run() -> torch.Tensor:
        kept = torch.ones(8 << 20)  # 32 MB, returned
        torch.ones(24 << 20)  # 96 MB, dropped
        return kept

    peak = harness.peak_bytes(run, lambda kept: (kept,), torch.device("cpu"))
    if peak is None:
        pytest.skip("no resident peak on this system")
    assert (94 << 20) < peak < (100 << 20)


def test_contestants_take_turns_and_the_warm_up_is_not_counted():
    import harness

    turns: list[str] = []
    runs = {name: (lambda name=name: turns.append(name)) for name in "ab"}
    seconds = harness.interleaved(runs, 2, torch.device("cpu"))
    assert turns == ["a", "b"] * 3 and all(value >= 0 for value in seconds.values())


def test_the_tables_of_a_readme_come_from_the_file(tmp_path):
    import head
    import tables

    output, readme = tmp_path / "cpu.jsonl", tmp_path / "README.md"
    head.main([*TINY, "--providers", *NO_LIBRARY, "--output", str(output), "--cases", "logp"])
    readme.write_text("before\n<!-- table:head -->\nold 1.23\n<!-- /table -->\nafter\n")
    assert tables.main([str(output), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table:head -->\n") and text.endswith("<!-- /table -->\nafter\n")
    assert "old 1.23" not in text and "T 16, D 24, V 301, bfloat16" in text
    assert "| | logp, W frozen (2 G) | logp, W trained (3 G) | worst logp error |" in text
    assert "| **fastpost token_stats** | " in text and "quack" not in text
    assert tables.main([str(output), "--readme", str(readme)]) == 0 and readme.read_text() == text
    readme.write_text("no marks")
    assert tables.main([str(output), "--readme", str(readme)]) == 2


def test_tokens_that_do_not_make_whole_sequences_are_refused(capsys):
    import head

    with pytest.raises(SystemExit) as stop:
        head.main(["--tokens", "9"])
    assert stop.value.code == 2 and "--tokens must be a multiple of 8" in capsys.readouterr().err
