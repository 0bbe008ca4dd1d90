"""The benchmark of a PPO step: what it writes, that a wrong run has no number, and that the step learns."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import ppo
import ppo_step
from on_device import SHAPES, four_bit_model

from fastpost.models.qlora import is_quantised

CPU = torch.device("cpu")
PHASES = ["rollout", "reward", "logp", "values", "advantages", "updates"]


def run(tmp_path, *words: str) -> tuple[int, dict]:
    output = tmp_path / "lines.jsonl"
    code = ppo_step.main(["--tiny", "--device", "cpu", "--output", str(output), *words])
    (line,) = map(json.loads, output.read_text().splitlines())
    return code, line


def test_every_phase_of_every_step_is_measured(tmp_path, capsys):
    code, line = run(tmp_path)
    assert code == 0 and line["status"] == "ok"
    assert [(phase["step"], phase["name"]) for phase in line["phases"]] == [
        *((None, name) for name in ("base", "roles")),
        *itertools.product((0, 1), PHASES),
    ]
    assert all(phase["peak_bytes"] >= phase["held_bytes"] > 0 < phase["seconds"] for phase in line["phases"][1:])
    assert line["peak_bytes"] == max(phase["peak_bytes"] for phase in line["phases"][2:])
    assert line["completion_tokens"] == 4 * 6 and line["tokens"] == 4 * 6 + (12 + 10 + 8 + 6) and line["packs"] == 2
    plans = {phase["name"]: phase["planned_bytes"] for phase in line["phases"]}
    assert {name for name, plan in plans.items() if plan is None} == {"base", "roles", "advantages"}
    assert line["planned_bytes"] == max(plan for plan in plans.values() if plan is not None)
    for phase in line["phases"][-len(PHASES) :]:  # packs are not as full as they may be
        assert phase["planned_bytes"] is None or phase["planned_bytes"] >= 0.9 * phase["held_bytes"]
    printed = capsys.readouterr().out
    assert "planned, MB" in printed
    assert "60 tokens in 2 packs, 24 of them of completions" in printed and "held before, MB" in printed


def test_completions_may_be_given(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "generate", None)
    code, line = run(tmp_path, "--completions", "given", "--steps", "1")
    assert code == 0 and line["completion_tokens"] == 4 * 6 and len(line["phases"]) == 2 + len(PHASES)


def test_a_run_that_is_wrong_has_no_number(tmp_path, capsys, monkeypatch):
    """A policy that begins with something learnt, and updates that move the base instead of it."""

    def learnt(base, lora_r):
        roles = ppo.four_roles(base, lora_r)
        with torch.no_grad():
            for tensor in roles.policy.parameters():
                tensor.normal_()
        return roles

    def update(roles, optimizer, pack):
        with torch.no_grad():
            roles.reference.model.get_base_model().lm_head.weight.mul_(1.1)
        return torch.tensor(float("nan"))

    monkeypatch.setattr(ppo_step, "four_roles", learnt)
    monkeypatch.setattr(ppo, "update", update)
    code, line = run(tmp_path, "--steps", "1")
    assert code == 1 and line["status"] == "WRONG" and "phases" not in line and "peak_bytes" not in line
    assert line["reason"].split("; ") == [
        "the fresh policy is not its reference",
        "the reference has moved",
        "something that trains has not moved",
        "a loss is not finite",
    ]
    assert f"tiny: WRONG: {line['reason']}" in capsys.readouterr().out


def test_the_base_is_in_four_bits_and_never_whole_in_more():
    shape = replace(SHAPES["tiny"], hidden=128, layers=12, intermediate=384, vocab=64)
    phases: list[ppo_step.Phase] = []
    model = ppo_step.metered(phases, CPU, None, "base", lambda: four_bit_model(shape, CPU))
    weights = [p for p in model.model.layers.parameters() if p.ndim == 2]
    assert is_quantised(model) and len(weights) == 12 * 7 and all(p.dtype == torch.uint8 for p in weights)
    of_a_layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384
    assert sum(2 * p.numel() for p in weights) == 12 * of_a_layer
    in_bfloat16 = 2 * 12 * of_a_layer
    assert phases[0].peak_bytes - phases[0].held_bytes < in_bfloat16


def test_it_grows_until_memory_is_out(capsys):
    def runs(shape):
        if shape.layers > 80:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return {"layers": shape.layers}

    found = list(ppo_step.fitting(ppo_step.growing(), runs))
    assert [name for name, *_ in found] == ["8B", "14B", "32B", "70B"]
    assert "70B's, 120 layers does not fit: CUDA out of memory" in capsys.readouterr().out

    def fails(shape):
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        list(ppo_step.fitting(ppo_step.growing(), fails))


def test_a_large_model_on_a_cpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        ppo_step.main(["--device", "cpu"])
    assert "want a GPU: --tiny runs the same step on a CPU" in capsys.readouterr().err


def share_of_low_tokens(pack):
    """Of each completion, how many of its tokens are of the vocabulary's first half."""
    batch = pack.batch
    low = (batch.target >= 0) & (batch.target < 32)
    return batch.per_sequence(low.float()) / batch.per_sequence((batch.target >= 0).float())


@pytest.mark.parametrize("judge", [share_of_low_tokens, None], ids=["a fixed scorer", "the reward role"])
def test_the_score_rises(judge):
    """By five standard errors of the difference between the last step's mean and the first's, which no training did."""
    torch.manual_seed(0)
    work = ppo.Work(prompts=64, prompt_tokens=4, completion_tokens=4, minibatch_tokens=256, lora_r=8)
    roles = ppo.four_roles(four_bit_model(replace(SHAPES["tiny"], vocab=64), CPU), work.lora_r)
    optimizer = ppo.adamw_8bit(roles, 3e-2)
    scores = [ppo.step(roles, optimizer, ppo.prompts_of(work, 64, i), work, i, judge).scores for i in range(8)]
    first, last = scores[0], scores[-1]
    assert last.mean() - first.mean() > 5 * ((first.var() + last.var()) / len(first)).sqrt()
