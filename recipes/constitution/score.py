"""How often models obey the principles, and refuse what is harmless, of ten answers a prompt: `score.py DIR ...`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from violations import obeys

from fastpost.evaluation.refusal import refuses
from fastpost.stages.asking import Asker, journal_of, read_prompts
from fastpost.stages.config import Asking
from fastpost.stages.policy import Policy

DATA = Path("runs/constitution/data")


def scored(model: Path, folder: str) -> str:
    found = []
    for name in ("prompts", "benign"):
        out = Path(folder) / f"{model.name}-{name}"
        config = Asking(model=model, dataset=DATA / f"{name}.jsonl", output_dir=out, max_completion_length=24)
        asker = Asker(Policy.of(config), config, journal_of(config))
        prompts = dict(enumerate(read_prompts(config, asker.policy.tokenizer)))
        pairs = [(g.prompt, answer.text) for g in asker.groups(prompts, "0", 10) for answer in g.answers]
        found.append(obeys(*zip(*pairs, strict=True)) if name == "prompts" else [refuses(text) for _, text in pairs])
    return f"{model}: {mean(found[0]):.1%} obey, {mean(map(float, found[1])):.1%} of what is harmless is refused"


def main(models: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for model in map(Path, models):
            if (model / "config.json").is_file():
                print(scored(model, folder))


if __name__ == "__main__":
    main(sys.argv[1:])
