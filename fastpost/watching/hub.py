"""The result of a run on the Hugging Face hub, with a card that says where it comes from.

The calls are those of huggingface_hub's HfApi, and are tested against a double of it: they have not been tried against
the hub itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpost.watching.curves import Line, is_number
from fastpost.watching.text import number

MODEL = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "metrics.*")
# Inside a run, but nobody's business: they hold prompts, paths, and the state of an optimizer.
OURS = ("checkpoint-*", "checkpoint-*/*", "runs/*", "run.json", "completions.jsonl", "report.html", ".*")
# Metrics that a card has, if the run does.
SHOWN = (
    *("eval_loss", "eval_reward", "eval_accuracy", "eval_rewards/accuracies", "eval_mean_token_accuracy", "loss"),
    *("reward", "objective/scores", "accuracy", "rewards/accuracies", "rewards/margins", "kl_budget/sequence"),
    *("objective/kl", "kl", "entropy", "completions/mean_length", "num_tokens"),
)


def push_to_hub(
    output_dir: Path,  # of a finished run
    repo_id: str,  # owner/name, or a name of one's own
    facts: Mapping[str, Any],  # run.json
    last: Line,  # of metrics.jsonl
    *,
    private: bool | None = None,  # None: as the owner's settings have it
    token: str | None = None,  # None: of `hf auth login` or the environment
) -> str:
    """Writes README.md beside the model, uploads both, and returns the address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    adapter = (output_dir / "adapter_config.json").exists()
    card = model_card(repo.repo_id, facts, last, adapter=adapter)
    (output_dir / "README.md").write_text(card, encoding="utf-8")
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=output_dir,
        commit_message=f"fastpost {facts.get('verb', 'run')}, {last.get('step', 0)} steps",
        allow_patterns=list(MODEL),
        ignore_patterns=list(OURS),
    )
    return str(repo)


def model_card(repo_id: str, facts: Mapping[str, Any], last: Line, *, adapter: bool) -> str:
    """Front matter for the hub, and a page for people. Of a path on this machine no more than its last name shows."""
    from huggingface_hub import ModelCardData

    config, verb = facts.get("config") or {}, str(facts.get("verb", "run"))
    model, dataset = (str(config.get(name) or "") for name in ("model", "dataset"))
    data = ModelCardData(
        base_model=model if _on_hub(model) else None,
        datasets=[dataset] if _on_hub(dataset) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["fastpost", verb],
    )
    what = "An adapter" if adapter else "A model"
    origin = f" from `{_shown(model)}`" if model else ""
    given = f" on `{_shown(dataset)}`" if dataset else ""
    paragraphs = [
        f"# {repo_id.split('/')[-1]}",
        f"{what} trained by `fastpost {verb}`{origin}{given}, {last.get('step', 0)} optimizer steps.",
        _table("metric", "at the end", {name: number(last[name]) for name in SHOWN if is_number(last.get(name))}),
        _table("with", "version", facts.get("versions") or {}),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, paragraphs)) + "\n"


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines) if rows else ""


def _on_hub(name: str) -> bool:
    """Whether it is owner/name and no path: a directory of ours is nobody's base_model."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and not Path(name).exists()


def _shown(name: str) -> str:
    return name if _on_hub(name) else Path(name).name
