"""To the hub: what is called, what is sent, what stays here, and what the card says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

import huggingface_hub as hub

from fastpost.watching.hub import model_card, push_to_hub

FACTS = {
    "verb": "grpo",
    "config": {"model": "owner/base", "dataset": "/home/me/secret/problems.jsonl"},
    "versions": {"fastpost": "0.1.0", "torch": "2.13.0"},
}
LAST = {"step": 120, "reward": 0.695, "entropy": None, "num_tokens": 2_487_757, "mine": 3.0}


def front_matter(card: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(card.split("---\n")[1])


class Api:
    """HfApi's two calls, noted."""

    def __init__(self, token: str | None = None):
        self.calls: list[tuple[str, dict]] = [("token", {"token": token})]
        Api.last = self

    def create_repo(self, repo_id: str, **given: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **given}))
        return hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload_folder(self, **given: Any) -> None:
        self.calls.append(("upload_folder", given))


def test_the_model_goes_up_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    sent = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "metrics.jsonl", "metrics.png"]
    kept = ["run.json", "completions.jsonl", "report.html", "checkpoint-10/model.safetensors", "runs/a/events"]
    for name in sent + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(hub, "HfApi", Api)
    assert push_to_hub(tmp_path, "sums", FACTS, LAST, private=True) == "https://huggingface.co/me/sums"
    (_, token), (_, made), (_, up) = Api.last.calls
    assert token == {"token": None} and made == {"repo_id": "sums", "private": True, "exist_ok": True}
    assert up["repo_id"] == "me/sums" and up["folder_path"] == tmp_path
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    chosen = hub.utils.filter_repo_objects(
        files, allow_patterns=up["allow_patterns"], ignore_patterns=up["ignore_patterns"]
    )
    assert sorted(chosen) == sorted([*sent, "README.md"])
    assert (tmp_path / "README.md").read_text() == model_card("me/sums", FACTS, LAST, adapter=False)


def test_the_card_says_where_the_model_comes_from():
    card = model_card("me/sums", FACTS, LAST, adapter=False)
    data = front_matter(card)
    assert data["base_model"] == "owner/base" and data["library_name"] == "transformers"
    assert data["tags"] == ["fastpost", "grpo"] and "datasets" not in data
    assert "trained by `fastpost grpo` from `owner/base` on `problems.jsonl`, 120 optimizer steps" in card
    assert "| reward | 0.695 |" in card and "| num_tokens | 2.5e6 |" in card and "| torch | 2.13.0 |" in card
    assert "entropy" not in card and "mine" not in card


def test_no_path_of_this_machine_is_told(tmp_path: Path):
    facts = FACTS | {"config": {"model": str(tmp_path / "sft"), "dataset": "./data/p.jsonl"}}
    card = model_card("me/sums", facts, LAST, adapter=True)
    assert str(tmp_path) not in card and "/home" not in card and "./data" not in card and "`sft`" in card
    assert "base_model" not in front_matter(card) and front_matter(card)["library_name"] == "peft"


def test_a_directory_of_two_names_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(model_card("a", {"config": {"model": "runs/sft"}}, LAST, adapter=False))


def test_a_run_without_facts_has_a_card():
    card = model_card("me/sums", {}, {}, adapter=False)
    assert front_matter(card)["tags"] == ["fastpost", "run"] and "0 optimizer steps" in card and "|" not in card
