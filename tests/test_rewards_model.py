"""A reward model as a reward function: its scores are those of transformers' own forward, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForSequenceClassification

import tiny
from fastpost.rewards import load_reward, score
from rules import assert_close_to_truth

PROMPTS = ["1+1=", "2+2=", "10+20="]
COMPLETIONS = ["2", "five", "30 and nothing more"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files") / "judge"
    tiny.model("qwen3").save_pretrained(directory)
    made = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)
    made.score.weight.data.normal_()
    made.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def plain(directory: Path, dtype: torch.dtype) -> torch.Tensor:
    """Of prompt, completion and EOS, one at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype)
    tokenizer, found = tiny.tokenizer(), []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt").input_ids
        with torch.no_grad():
            found.append(model.score(model.model(ids).last_hidden_state[0, -1])[0])
    return torch.stack(found)


def test_scores_are_those_of_the_model_alone(judge: Path):
    reward = load_reward(str(judge))
    assert reward.name == "judge"
    found = torch.tensor(reward.function(prompts=PROMPTS, completions=COMPLETIONS, answer=["2", "4", "30"]))
    assert_close_to_truth(found, plain(judge, torch.float32), plain(judge, torch.float64))


def test_packs_do_not_matter(judge: Path, monkeypatch: pytest.MonkeyPatch):
    reward = load_reward(str(judge))
    together = torch.tensor(reward.function(prompts=PROMPTS, completions=COMPLETIONS))
    monkeypatch.setattr("fastpost.rewards.model.TOKENS", 1)
    apart = torch.tensor(reward.function(prompts=PROMPTS, completions=COMPLETIONS))
    torch.testing.assert_close(apart, together)


def test_a_sample_beyond_the_positions_is_not_judged_and_counted(judge: Path):
    reward = load_reward(str(judge))
    long = "d" * (reward.function.model.config.max_position_embeddings + 1)
    ids, alone = [[1]] * 4, reward.function(prompts=["a"], completions=["c"])
    for completions in (["c", long, long, long], [long] * 4):
        found = score([reward], None, ["a"] * 4, completions, ids, {})
        expected = torch.tensor([*(alone if completions[0] == "c" else [torch.nan]), *[torch.nan] * 3])
        torch.testing.assert_close(found.rewards, expected, equal_nan=True)
        assert found.metrics == {"reward_model/too_long": completions.count(long) / 4}


def test_a_model_without_a_score_is_refused(tmp_path: Path):
    tiny.model("qwen3").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model '.*model' has no scalar head"):
        load_reward(str(tmp_path / "model"))
