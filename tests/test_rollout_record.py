"""What samplers that do not repeat themselves consumed is taken again; and how far a sampler is from the trainer."""

import json
import math
import os
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from fastpost.rollout import Sampling
from fastpost.rollout.mismatch import mismatch
from fastpost.rollout.record import Asked, Where, prune, read, sampled, write
from fastpost.rollout.sampler import Generate, Throughput, Tried, faster
from fastpost.rollout.sampling import Completion

PROMPTS = [[10, 11, 12], [20], [30, 31]]


class Random:
    """A sampler that never says the same twice."""

    reproducible = False
    calls = 0

    def update(self, model):
        pass

    def __call__(self, prompt_ids, sampling, num_generations=1, keys=None):
        self.calls += 1
        return [
            Completion([random.randrange(10**9)], random.random() < 0.5, [-random.random() / 3])
            for _ in range(len(prompt_ids) * num_generations)
        ]


def asked(of=(0, 1, 2), **changes):
    whole = Asked([PROMPTS[i] for i in of], [7 * i for i in of], Sampling(max_completion_length=5, stop=("x",)), 2)
    return replace(whole, **changes)


# ---- replay ----


def test_what_was_consumed_is_consumed_again(tmp_path):
    sampler, where = Random(), Where(tmp_path)
    steps = [sampled(sampler, asked(), where, step) for step in range(3)]
    assert [sampled(sampler, asked(), where, step) for step in range(3)] == steps
    assert sampler.calls == 3 and steps[0] != steps[1]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [f"step-{n}.json" for n in range(3)]


def test_a_step_that_asked_twice_has_both_answers(tmp_path):
    sampler, where = Random(), Where(tmp_path)
    twice = [sampled(sampler, asked(of), where, 1) for of in ((0, 1), (2,))]
    assert [sampled(sampler, asked(of), where, 1) for of in ((0, 1), (2,))] == twice
    assert sampler.calls == 2
    sampled(sampler, asked((2,), run="another"), where, 1)
    assert list(json.loads((tmp_path / "rollouts" / "step-1.json").read_text())) == ["14"]


def test_another_number_of_ranks_takes_the_same(tmp_path):
    sampler = Random()
    parts = {of: sampled(sampler, asked(of), Where(tmp_path, rank), 4) for rank, of in enumerate([(0, 2), (1,)])}
    first, second = parts[0, 2], parts[1,]
    assert sampled(sampler, asked(), Where(tmp_path), 4) == [*first[:2], *second, *first[2:]]
    assert sampler.calls == 2


CHANGES = {
    "prompts": {"prompt_ids": [[10, 11, 12], [21], [30, 31]]},
    "keys": {"keys": [0, 7, 15]},
    "sampling": {"sampling": Sampling(max_completion_length=5, stop=("x",), temperature=0.5)},
    "number": {"num_generations": 1},
    "run": {"run": "another"},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_record_of_another_question_is_none(tmp_path, what):
    write(Where(tmp_path), 0, asked(), Random()(PROMPTS, Sampling(), 2))
    assert read(Where(tmp_path), 0, asked()) is not None
    assert read(Where(tmp_path), 0, asked(**CHANGES[what])) is None


def test_a_process_killed_while_writing_leaves_no_half_of_a_record(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    sampler = Random()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            sampled(sampler, asked(), Where(tmp_path), 0)
    assert read(Where(tmp_path), 0, asked()) is None
    assert sampled(sampler, asked(), Where(tmp_path), 0) == read(Where(tmp_path), 0, asked())


def test_records_before_the_oldest_checkpoint_go(tmp_path):
    for rank in (0, 1):
        for step in range(12):
            write(Where(tmp_path, rank), step, asked(), Random()(PROMPTS, Sampling(), 2))
    (tmp_path / "rollouts" / "notes.json").write_text("{}")
    prune(Where(tmp_path), 10)
    left = {path.name for path in (tmp_path / "rollouts").iterdir()}
    assert left == {"step-10.json", "step-11.json", "step-10.rank-1.json", "step-11.rank-1.json", "notes.json"}
    prune(Where(tmp_path / "nothing"), 10)


def test_what_is_reproducible_is_not_recorded(tmp_path):
    sampler = Generate(tiny.model(), tiny.tokenizer())
    once = sampled(sampler, asked(), Where(tmp_path), 0)
    assert sampled(sampler, asked(), Where(tmp_path), 0) == once and not list(tmp_path.iterdir())


def test_log_probabilities_come_back_bit_for_bit(tmp_path):
    logp = torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist()
    write(Where(tmp_path), 0, asked((0,)), [Completion([1] * 50, True, logp), Completion([], False)])
    found = read(Where(tmp_path), 0, asked((0,)))
    assert found is not None and found[0].logp == logp and found[1] == Completion([], False, [])
    assert json.loads((tmp_path / "rollouts" / "step-0.json").read_text())["0"][1][0]["logp"] == logp


# ---- the faster of two ----


def test_the_faster_sampler_is_taken_after_each_was_tried():
    said, times = [], iter([0.0, 2.0, 10.0, 11.0])
    slow, quick = Random(), Random()
    tried = Tried({"generate": slow, "continuous batching": quick}, said.append, clock=lambda: next(times))
    for _ in range(4):
        assert not tried.reproducible
        assert len(tried(PROMPTS, Sampling(), 4)) == 12
    assert (slow.calls, quick.calls) == (1, 3)
    assert said == [
        "sampling by continuous batching from here on: generate 6 tokens/s, continuous batching 12 tokens/s"
    ]


def test_of_equals_the_first_is_taken():
    equal = {"one": Throughput(10, 1.0), "two": Throughput(20, 2.0)}
    assert faster(equal)[0] == "one" and faster({**equal, "three": Throughput(11, 1.0)})[0] == "three"


# ---- sampler and trainer ----


def test_mismatch_by_its_definition():
    trainer = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    sampler = torch.tensor([-1.0, -2.5, -2.0, torch.nan])
    found = mismatch(sampler, trainer).metrics
    ratio = [1.0, math.exp(0.5), math.exp(-1.0)]
    torch.testing.assert_close(
        found,
        {
            "sampling/sampling_logp_difference/mean": 0.5,
            "sampling/sampling_logp_difference/max": 1.0,
            "sampling/importance_sampling_ratio/min": ratio[2],
            "sampling/importance_sampling_ratio/mean": sum(ratio) / 3,
            "sampling/importance_sampling_ratio/max": ratio[1],
        },
    )


def test_a_person_is_told_and_advised_where_it_is_large():
    trainer = torch.zeros(4)
    close = torch.tensor([3e-6, -3e-6, 0.0, 2e-5])
    assert mismatch(close, trainer).sentence == (
        "the sampler's log-probabilities differ from the trainer's by 6e-06 on average, at most 2e-05"
    )
    assert "more than rounding" in mismatch(trainer + 0.2, trainer).sentence
    assert "gave no log-probabilities" in mismatch(torch.full((4,), torch.nan), trainer).sentence
    with pytest.raises(ValueError, match=r"one shape, got \(3,\), \(4,\)"):
        mismatch(torch.zeros(3), trainer)


def test_generate_is_where_the_trainer_is():
    """fp32 on one machine: rounding of the logits, and no more."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    sampling = Sampling(temperature=0.7, top_k=5, max_completion_length=9)
    found = Generate(model, tokenizer, batch_size=3)(PROMPTS, sampling, 2)
    said, again = [], []
    for i, completion in enumerate(found):
        ids = PROMPTS[i // 2] + completion.ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -len(completion.ids) - 1 : -1] / 0.7
        again.append(logits.log_softmax(-1)[range(len(completion.ids)), completion.ids])
        said.append(torch.tensor(completion.logp))
    assert "e-0" in mismatch(torch.cat(said), torch.cat(again)).sentence
    torch.testing.assert_close(torch.cat(said), torch.cat(again))
