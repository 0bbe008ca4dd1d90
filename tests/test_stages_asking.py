"""Groups of answers: the sampler's own, judged, the same whatever the batches are and wherever a stage was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.rollout import generate
from fastpost.stages.asking import asked, journal_of, read_prompts
from fastpost.stages.config import Judging
from fastpost.stages.jury import Jury
from fastpost.stages.policy import Policy
from fastpost.trainers.loop import seed_of

N = 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    tiny.model("qwen3").save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(5)]
    (directory / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "mine.py").write_text(
        "def long(completions, answer, **_):\n"
        "    return [None if right == '4' else len(c) for c, right in zip(completions, answer)]\n"
    )
    return directory


def config_of(files: Path, out: Path, **changes: object) -> Judging:
    fields = {"max_completion_length": 8, "generation_batch_size": 2 * N, "seed": 3}
    fields |= {"model": files / "model", "dataset": files / "sums.jsonl", "output_dir": out}
    return Judging(**(fields | {"reward": (f"{files}/mine.py:long",)} | changes))


def groups_of(config: Judging, **changes: object) -> list:
    policy = Policy.of(config)
    prompts = read_prompts(config, policy.tokenizer)
    how = {"jury": Jury.of(config)} | changes
    return list(asked(policy, prompts, N, journal_of(config), config.generation_batch_size, **how))


def test_answers_are_the_samplers_and_their_rewards_the_functions(files: Path, tmp_path: Path):
    config = config_of(files, tmp_path)
    policy = Policy.of(config)
    prompts = read_prompts(config, policy.tokenizer)
    sampling = replace(config.sampling(), seed=seed_of(3, "0"))
    ids = [prompt.input_ids for prompt in prompts]
    wanted = generate(policy.model, policy.tokenizer, ids, sampling, num_generations=N)
    groups = groups_of(config)
    assert [group.key for group in groups] == list(range(5)) and groups[2].columns == {"answer": "4"}
    answers = [answer for group in groups for answer in group.answers]
    texts = policy.tokenizer.batch_decode([c.ids for c in wanted], skip_special_tokens=True)
    assert [(a.text, a.tokens, a.finished) for a in answers] == [
        (text, len(c.ids), c.finished) for text, c in zip(texts, wanted, strict=True)
    ]
    assert [a.logp for a in answers] == pytest.approx([sum(c.logp) for c in wanted])
    for group in groups:
        lengths = [None if group.key == 2 else float(len(a.text)) for a in group.answers]
        assert [a.reward for a in group.answers] == lengths == [a.rewards["long"] for a in group.answers]


def test_batches_do_not_matter_nor_where_it_stops(files: Path, tmp_path: Path):
    straight = groups_of(config_of(files, tmp_path / "straight", generation_batch_size=64))
    config = config_of(files, tmp_path / "stopped")
    policy = Policy.of(config)
    prompts = read_prompts(config, policy.tokenizer)
    begun = asked(policy, prompts, N, journal_of(config), config.generation_batch_size, jury=Jury.of(config))
    first = next(begun)  # a batch of two prompts is done, and the process dies
    calls = []

    def counted(*given: object) -> object:
        calls.append(given)
        return policy.sampler(*given)

    rest = asked(
        replace(policy, sampler=counted), prompts, N, journal_of(config), config.generation_batch_size,
        jury=Jury.of(config),
    )  # fmt: skip
    rounded = [[(a.text, a.reward) for a in group.answers] for group in rest]
    assert rounded == [[(a.text, a.reward) for a in group.answers] for group in straight]
    assert [(a.text, a.reward) for a in first.answers] == rounded[0]
    assert [list(call[3]) for call in calls] == [[2, 3], [4]]


def test_another_turn_is_other_work(files: Path, tmp_path: Path):
    config = config_of(files, tmp_path)
    first, second = groups_of(config, turn="0"), groups_of(config, turn="1")
    assert [g.answers for g in first] != [g.answers for g in second]
    assert [g.answers for g in groups_of(config, turn="0")] == [g.answers for g in first]


def test_another_command_does_not_go_on_with_it(files: Path, tmp_path: Path):
    groups_of(config_of(files, tmp_path))
    with pytest.raises(ValueError, match=r"work that was done with seed 3, not 4"):
        groups_of(config_of(files, tmp_path, seed=4))
    groups_of(config_of(files, tmp_path, generation_batch_size=1))


def test_a_prompt_that_leaves_no_room_is_named_before_any_is_asked(files: Path, tmp_path: Path):
    """Were it asked in its turn, the work until then would be lost to who sets max_prompt_length."""
    rows = [{"prompt": "1+1=", "answer": "2"}] * 7 + [{"prompt": "1" * 121, "answer": "1"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"dataset": tmp_path / "long.jsonl"}
    with pytest.raises(ValueError, match=r"1 of 8 prompts.* 128 positions; .* 121 tokens.*: set max_prompt_length 120"):
        groups_of(config_of(files, tmp_path / "out", **given))
    assert (tmp_path / "out" / "work.jsonl").read_text().count("\n") == 1
    assert len(groups_of(config_of(files, tmp_path / "cut", max_prompt_length=120, **given))) == 7
