"""The benchmarks: right results are timed, wrong ones are named and are not, what is written can be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import fastpost as fp

TINY = ["--device", "cpu", "--tokens", "16", "--hidden", "24", "--vocab", "301", "--repeats", "1"]
NO_LIBRARY = ["fastpost token_stats", "fastpost fused_loss", "naive torch", "torch linear_cross_entropy", "quack"]


@pytest.fixture(autouse=True)
def a_small_copy(monkeypatch):
    monkeypatch.setattr("harness.COPIED_BYTES", {"cpu": 1 << 20})


@pytest.fixture
def judged():
    """A case by its title, inputs, and its judge."""
    import cases
    import truth

    def of(title: str, among: Sequence[cases.Case] = cases.CASES):
        case = next(case for case in among if case.title == title)
        x = cases.make_inputs(16, 24, 301, torch.bfloat16, torch.device("cpu")).trained(case.trained)
        return case, x, truth.Judge.of(case, x)

    return of


def perturbed(function, times: float):
    """The same statistics, a little off, and gradients with them."""
    import peers

    def run(case, x):
        return peers.Found(fp.Stats(logp=function(case, x).stats.logp * times))

    return run


def test_every_case_is_measured_and_written(tmp_path, capsys):
    import cases
    import contest
    import head
    import measurement

    output = tmp_path / "results" / "cpu.jsonl"
    assert contest.main(head.HEAD, [*TINY, "--providers", *NO_LIBRARY, "--output", str(output)]) == 0
    assert contest.main(head.HEAD, [*TINY, "--providers", *NO_LIBRARY, "--output", str(output), "--cases", "grpo"]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert {line["case"] for line in lines} == {case.title for case in cases.CASES}
    read = measurement.last_run(output)
    assert {m.case for m in read} == {"grpo, W frozen"}, "the second run, and only that"
    ours, naive = (next(m for m in read if m.provider == name) for name in ("fastpost fused_loss", "naive torch"))
    assert (ours.setup.tokens, ours.setup.hidden, ours.setup.vocab, ours.setup.dtype) == (16, 24, 301, "bfloat16")
    assert ours.setup.machine.versions["torch"] == torch.__version__ and ours.setup.machine.threads >= 1
    assert ours.errors["logp"] < 1e-5 < naive.errors["logp"]
    assert ours.over_floor == pytest.approx(ours.seconds / (2 * ours.product_seconds))
    assert naive.over_naive == 1 and naive.counted is None and naive.bound_seconds is None
    product = 2 * 16 * 24 * 301
    assert ours.counted.flop == 2 * product
    seconds = ours.counted.flop / product * ours.product_seconds, ours.counted.fetched / ours.bytes_per_second
    assert ours.bound_seconds == pytest.approx(max(seconds)) and ours.over_bound > 1
    printed = capsys.readouterr().out
    assert "quack: absent, " in printed and "fastpost token_stats" in printed


def test_our_own_results_pass_in_fp32_too(tmp_path):
    import contest
    import head

    options = ["--providers", *NO_LIBRARY[:2], "--output", str(tmp_path / "fp32.jsonl")]
    assert contest.main(head.HEAD, [*TINY, *options, "--dtype", "float32"]) == 0


@pytest.mark.parametrize("title", ["logp, W frozen", "logp, W trained"])
def test_a_peer_that_is_wrong_has_no_speed(judged, title):
    import contest
    import peers

    case, x, judge = judged(title)
    right = replace(peers.PEERS[2], name="right", runs={"logp": peers.naive})
    wrong = replace(right, name="wrong", runs={"logp": perturbed(peers.naive, 1.1)})
    checked = [contest.check(case, peer, judge, x) for peer in (right, wrong)]
    assert [c.status for c in checked] == ["ok", "WRONG"]
    assert "logp" in checked[1].reason and "dhidden" in checked[1].reason
    assert ("dweight" in checked[1].reason) == case.trained
    setup = contest.Setup(contest.machine(x.hidden.device), "2026-01-01", "bfloat16", 16, 24, 301, repeats=1)
    timed = contest.time_case(case, checked, x, setup, 1e10)
    assert timed[0].seconds > 0 and timed[1].seconds is None and timed[1].over_floor is None


def test_ours_wrong_by_1e_4_ends_the_program_without_a_table(tmp_path, capsys):
    import contest
    import head
    import peers

    ours = peers.PEERS[0]
    wrong = replace(ours, runs={"logp": perturbed(ours.runs["logp"], 1 + 1e-4)})
    entered = replace(head.HEAD, peers=(wrong, peers.PEERS[2]))
    output = tmp_path / "none.jsonl"
    assert contest.main(entered, [*TINY, "--cases", "logp", "--output", str(output)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and not output.exists()
    assert "fastpost is wrong" in printed.err and "logp, W frozen: logp 1." in printed.err


def test_a_gradient_that_ignores_its_upstream_is_wrong(judged):
    """A loss and statistics that are right do not hide it."""
    import peers

    case, x, judge = judged("logp, W trained")
    right = peers.run(case, peers.naive, x)
    wrong = replace(right, dhidden=right.dhidden * 1.2, dweight=torch.full_like(right.dweight, torch.nan))
    assert judge.verdict(right, x.sampled, ours=False)[1] == []
    complaints = judge.verdict(wrong, x.sampled, ours=False)[1]
    assert [line.split()[0] for line in complaints] == ["dhidden", "dweight"]


def test_a_peer_that_raises_is_listed_and_ours_is_not_forgiven(judged):
    import contest
    import peers

    case, x, judge = judged("logp, W frozen")

    def broken(case, x):
        raise NotImplementedError("no such device\nmore")

    peer = replace(peers.PEERS[2], runs={"logp": broken})
    checked = contest.check(case, peer, judge, x)
    assert (checked.status, checked.reason) == ("failed", "NotImplementedError: no such device")
    with pytest.raises(NotImplementedError):
        contest.check(case, replace(peer, ours=True), judge, x)


def test_every_peer_is_entered_and_one_that_is_not_here_says_why(monkeypatch):
    import peers

    entered = {peer.module.partition(".")[0] for peer in peers.PEERS}
    assert entered == {"fastpost", "torch", "trl", "liger_kernel", "cut_cross_entropy", "quack", "verl"}
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: None)
    on_gpu = {peer.name for peer in peers.PEERS if peer.absent(torch.device("cpu")) == "needs CUDA"}
    assert on_gpu == {"Liger fused linear cross entropy", "cut-cross-entropy", "quack", "verl"}
    assert all(peer.absent(torch.device("cuda")) is None for peer in peers.PEERS)

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}\nmore")

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    assert peers.PEERS[-1].absent(torch.device("cuda")) == (
        "ModuleNotFoundError: No module named 'verl.utils.kernel.linear_cross_entropy'"
    )


# ---- families ----


def test_every_family_is_measured_and_its_peers_agree(tmp_path, capsys):
    """On small numbers the libraries' own functions say what the losses say: a knob that means another thing shows."""
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    import contest
    import families
    import measurement

    output = tmp_path / "families.jsonl"
    assert contest.main(families.FAMILIES, [*TINY, "--output", str(output)]) == 0
    found = measurement.last_run(output)
    assert {m.case for m in found} == {case.title for case in families.CASES}
    here = [m for m in found if m.status != "absent"]
    assert {m.provider for m in here} == {"fastpost", "naive torch", "TRL", "Liger"}
    assert all(m.status == "ok" and m.seconds > 0 for m in here), [m.reason for m in here if m.status != "ok"]
    assert all(m.setup.bench == "families" for m in found)
    assert "Liger fused linear cross entropy: absent, needs CUDA" in capsys.readouterr().out


def test_our_own_families_pass_in_fp32_too(tmp_path):
    import contest
    import families

    options = ["--providers", "fastpost", "naive torch", "--output", str(tmp_path / "fp32.jsonl")]
    assert contest.main(families.FAMILIES, [*TINY, *options, "--dtype", "float32"]) == 0


FLOORS = {"sft": 2, "dpo": 3, "kto": 3, "cpo": 2, "grpo": 2, "gspo": 2, "forward_kl": 3, "gkd": 3}  # with W frozen


@pytest.mark.parametrize("name", FLOORS)
def test_the_floor_counts_the_reference_and_the_heads_gradient(name):
    import families

    frozen = next(case for case in families.CASES if case.name == name)
    assert (frozen.trained, frozen.products) == (False, FLOORS[name])
    assert replace(frozen, trained=True).products == FLOORS[name] + 1


@pytest.mark.parametrize("name", ["dpo", "kto", "gspo", "gkd", "orpo"])
def test_the_truth_of_a_family_is_autograds(judged, monkeypatch, name):
    """In blocks of five rows, which no unit is a multiple of, against logits of everything at once."""
    import families
    import truth

    monkeypatch.setattr(truth, "BLOCK_ELEMENTS", 5 * 301)
    case, x, judge = judged(f"{name}, W trained", [replace(case, trained=True) for case in families.CASES])
    hidden, weight = (t.detach().double().requires_grad_() for t in x.leaves)
    logits, logits_q = hidden @ weight.T, x.hidden_q.double() @ x.weight_q.double().T
    logp, logq = logits.log_softmax(1), logits_q.log_softmax(1)
    middle = (logp.exp() / 2 + logq.exp() / 2).log()
    jsd = (logp.exp() * (logp - middle) + logq.exp() * (logq - middle)).sum(1) / 2
    picked = lambda t: t.gather(1, x.batch.target[:, None])[:, 0]  # noqa: E731
    batch = replace(x.batch, ref_logp=picked(logq))
    loss = case.loss(fp.Stats(logp=picked(logp), jsd=jsd), batch).mean()
    torch.testing.assert_close(judge.truth.loss, loss.detach())
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(judge.truth.dhidden, dhidden)
    torch.testing.assert_close(judge.truth.dweight, dweight[x.sampled])


def test_a_peer_that_forgets_the_reference_has_no_speed(judged):
    import contest
    import families
    import peers

    case, x, judge = judged("dpo, W frozen", families.CASES)

    def forgets(case, x):
        return replace(peers.naive(case, x), ref_logp=torch.zeros(16))

    wrong = replace(families.PEERS[1], name="wrong", runs={"dpo": forgets})
    checked = contest.check(case, wrong, judge, x)
    assert checked.status == "WRONG" and "loss" in checked.reason and "logp" not in checked.reason
    setup = contest.Setup(contest.machine(x.hidden.device), "2026-01-01", "bfloat16", 16, 24, 301, 1, "families")
    (timed,) = contest.time_case(case, [checked], x, setup, 1e10)
    assert timed.seconds is None and timed.over_floor is None


# ---- how ----


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


def test_what_is_done_before_each_run_is_not_timed():
    import time

    import harness

    turns: list[str] = []

    def before() -> None:
        turns.append("before")
        time.sleep(0.05)

    seconds = harness.interleaved({"run": lambda: turns.append("run")}, 2, torch.device("cpu"), before)
    assert turns == ["before", "run"] * 3 and seconds["run"] < 0.05


def test_tokens_that_do_not_make_whole_sequences_are_refused(capsys):
    import contest
    import head

    with pytest.raises(SystemExit) as stop:
        contest.main(head.HEAD, ["--tokens", "9"])
    assert stop.value.code == 2 and "--tokens must be a multiple of 8" in capsys.readouterr().err
