"""Constitutional AI: who is asked what, what becomes a row, and that work which is done is not done again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import tiny
from fastpost.data import Prompt
from fastpost.judging import Preference
from fastpost.judging.verdicts import UNDECIDED
from fastpost.rewards import Reward
from fastpost.rollout import Completion, Sampling
from fastpost.stages import comparisons, revisions
from fastpost.stages.asking import Asker, journal_of, read_prompts
from fastpost.stages.config import Constitution
from fastpost.stages.constitution import constitution
from fastpost.stages.groups import Answer
from fastpost.stages.jury import Jury
from fastpost.stages.policy import Policy
from fastpost.stages.principles import Principle, drawn, read_principles

POLITE = Principle("polite", "Is it rude?", "Say it nicely.", "Which is nicer?")
SHORT = Principle("short", "Is it long?", "Say it shortly.", "Which is shorter?")
SAID = {"Is it rude?": "Yes.", "Is it long?": "No.", "Say it nicely.": "Please.", "Say it shortly.": "Ok."}


@dataclass
class Scripted:
    """Answers by what the prompt ends with, and remembers what it was asked."""

    tokenizer: Any
    asked: list[str] = field(default_factory=list)
    reproducible: bool = True

    def update(self, model: Any) -> None: ...

    def __call__(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, n: int = 1, keys: Sequence[int] | None = None
    ) -> list[Completion]:
        texts = [self.tokenizer.decode(ids) for ids in prompt_ids]
        self.asked += texts
        return [self._answer(text, i) for text in texts for i in range(n)]

    def _answer(self, text: str, i: int) -> Completion:
        answer = next(
            (said for end, said in SAID.items() if text.endswith(f"{end} ")), f"{'rude ' * (1 + i)}{len(text)}"
        )
        return Completion([*self.tokenizer(answer).input_ids, 1], True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    tiny.model("qwen3", max_position_embeddings=2048).save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    rows = [{"prompt": f"Q{'q' * i}?\n"} for i in range(6)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "principles.yaml").write_text("- Answers are polite.\n- Answers are short.\n")
    (directory / "mine.py").write_text("def letters(completions, **_):\n    return [len(c) for c in completions]\n")
    return directory


def config_of(files: Path, out: Path, **changes: Any) -> Constitution:
    fields = {"model": files / "model", "dataset": files / "prompts.jsonl", "output_dir": out, "phase": "revise"}
    fields |= {"constitution": files / "principles.yaml", "max_completion_length": 12, "generation_batch_size": 4}
    return Constitution(**(fields | changes))


def shown(text: str) -> str:
    """As the tokenizer has it, which knows no line."""
    return text.replace("\n", " ")


def scripted(config: Constitution) -> tuple[Asker, Scripted, list]:
    policy = Policy.of(config)
    sampler = Scripted(policy.tokenizer)
    prompts = read_prompts(config, policy.tokenizer)
    return Asker(replace(policy, sampler=sampler), config, journal_of(config)), sampler, prompts


def test_every_turn_sees_what_was_said_before(files: Path, tmp_path: Path):
    asker, sampler, prompts = scripted(config_of(files, tmp_path))
    chains = revisions.revised(asker, prompts, [POLITE, SHORT], 2, "dataset")
    names = {step.principle for chain in chains for step in chain.steps}
    assert names == {"polite", "short"} and all(len(chain.steps) == 2 for chain in chains)
    for key, chain in enumerate(chains):
        text = chain.prompt.prompt
        assert shown(text) in sampler.asked
        for turn, step in enumerate(chain.steps):
            principle = drawn([POLITE, SHORT], asker.config.seed, f"dataset, {turn}, principle", key)
            assert step.principle == principle.name
            before = chain.answers[turn].text
            critique = f"{text}{before}\n\n{principle.critique}\n"
            assert shown(critique) in sampler.asked
            assert shown(f"{critique}{step.critique}\n\n{principle.revise}\n") in sampler.asked
        assert chain.row["completion"] == {"polite": "Please.", "short": "Ok."}[chain.steps[-1].principle]


def test_what_is_done_is_not_asked_again(files: Path, tmp_path: Path):
    config = config_of(files, tmp_path)
    asker, _, prompts = scripted(config)
    straight = revisions.revised(asker, prompts, [POLITE, SHORT], 2, "dataset")
    lines = (tmp_path / "work.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (1, 4, 11, len(lines)):
        (tmp_path / "work.jsonl").write_bytes(b"".join(lines[:kept]))
        asker, sampler, _ = scripted(config)
        chains = revisions.revised(asker, prompts, [POLITE, SHORT], 2, "dataset")
        assert [chain.row for chain in chains] == [chain.row for chain in straight]
        assert len(sampler.asked) == len(lines) - kept


def test_a_conversation_that_outgrows_the_model_keeps_what_it_has(files: Path, tmp_path: Path):
    long = files / "long.jsonl"
    long.write_text(json.dumps({"prompt": "x" * 2020}) + "\n" + json.dumps({"prompt": "y\n"}) + "\n")
    asker, _, prompts = scripted(config_of(files, tmp_path, dataset=long))
    chains = revisions.revised(asker, prompts, [POLITE], 1, "dataset")
    assert [(chain.outgrown, len(chain.steps)) for chain in chains] == [(True, 0), (False, 1)]
    assert chains[0].row["completion"] == chains[0].first.text.strip()


def test_the_report_has_a_line_a_revision(files: Path, tmp_path: Path):
    asker, _, prompts = scripted(config_of(files, tmp_path))
    chains = revisions.revised(asker, prompts, [POLITE], 2, "dataset")
    jury = Jury([Reward("letters", lambda completions, **_: [len(text) for text in completions])])
    chains = revisions.measured(chains, jury, asker.policy.tokenizer)
    first, second, third = revisions.report(chains, lambda text: text == "Please.")
    lengths = [len(chain.first.text) for chain in chains]
    assert first["reward"] == pytest.approx(sum(lengths) / 6) and first["refused"] == 0 and first["changed"] is None
    assert second["reward"] == 7 and second["refused"] == 1 and second["changed"] == 1 and second["tokens"] == 8
    assert third["changed"] == 0


def prefers_short(prompts: Any, firsts: Any, seconds: Any, columns: Any) -> list[Preference]:
    assert {*columns["principle"]} <= {"Which is nicer?", "Which is shorter?"}
    return [
        Preference(0.9 if len(a) < len(b) else 0.2, orders=(0.9, 0.9)) for a, b in zip(firsts, seconds, strict=True)
    ]


def test_pairs_become_rows_of_what_was_preferred(files: Path, tmp_path: Path):
    asker, _, prompts = scripted(config_of(files, tmp_path, phase="prefer"))
    pairs = comparisons.compared(asker, prompts, [POLITE, SHORT], prefers_short)
    assert [pair.answers[0].text == f"rude {len(p.prompt)}" for pair, p in zip(pairs, prompts, strict=True)]
    for pair in pairs:
        row = pair.row(0.5)
        assert row is not None and len(row["chosen"]) < len(row["rejected"]) and row["probability"] == 0.9
        assert pair.row(0.95) is None and pair.flipped is False
    again, _, _ = scripted(asker.config)

    def nobody(*_: Any) -> Any:
        raise AssertionError

    assert comparisons.compared(again, prompts, [POLITE, SHORT], nobody) == pairs
    lines = comparisons.report(pairs, 0.5)
    assert sum(line["pairs"] for line in lines) == 6 == sum(line["kept"] for line in lines)


def test_a_pair_that_nobody_answered_about_is_asked_again(files: Path, tmp_path: Path):
    asker, _, prompts = scripted(config_of(files, tmp_path, phase="prefer"))

    def failing(given: Any, *rest: Any) -> list[Preference]:
        """Two endpoints in one: for the first of a batch out of reach, and for the others without an opinion."""
        return [Preference(None, errors=("is out of reach" if i == 0 else UNDECIDED,)) for i in range(len(given))]

    first = comparisons.compared(asker, prompts, [POLITE], failing)
    lost = [i for i, pair in enumerate(first) if not pair.preference.answered]
    assert 0 < len(lost) < len(first) and all(pair.preference.p is None for pair in first)
    again, _, _ = scripted(asker.config)
    then = comparisons.compared(again, prompts, [POLITE], lambda ps, *_: [Preference(0.9)] * len(ps))
    assert [i for i, pair in enumerate(then) if pair.preference.p == 0.9] == lost


def test_rows_keep_what_their_conversations_are_rendered_by():
    columns = {"chat_template_kwargs": {"enable_thinking": False}, "tools": [{"name": "add"}], "answer": "4"}
    prompt = Prompt([{"role": "user", "content": "q"}], [5], columns)
    answers = (Answer("a", 1, True), Answer("bb", 2, True))
    rows = [revisions.Chain(prompt, answers[0]).row, comparisons.Pair(prompt, answers, "p", Preference(0.9)).row(0.5)]
    for row in rows:
        assert row is not None and "answer" not in row
        assert {name: row[name] for name in ("chat_template_kwargs", "tools")} == {
            name: columns[name] for name in ("chat_template_kwargs", "tools")
        }


def test_both_phases_run_on_a_model(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    measure = {"reward": (f"{files}/mine.py:letters",), "benign_dataset": files / "prompts.jsonl"}
    report = constitution(config_of(files, tmp_path / "one", **measure))
    rows = [json.loads(line) for line in (tmp_path / "one" / "revisions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[0]["prompt"] == "Q?\n" and isinstance(rows[0]["completion"], str)
    assert json.loads((tmp_path / "one" / "report.json").read_text()) == report
    assert [line["answers"] for line in report["benign_dataset"]] == [6, 6]
    before = (tmp_path / "one" / "revisions.jsonl").read_bytes()
    constitution(config_of(files, tmp_path / "one", **measure))
    assert (tmp_path / "one" / "revisions.jsonl").read_bytes() == before
    found = constitution(config_of(files, tmp_path / "two", phase="prefer", reward=measure["reward"]))["principles"]
    assert sum(line["pairs"] for line in found) == 6 and not any(line["no verdict"] for line in found)
    pairs = [json.loads(line) for line in (tmp_path / "two" / "preferences.jsonl").read_text().splitlines()]
    assert len(pairs) == sum(line["kept"] for line in found) > 0
    assert all(row["chosen"] != row["rejected"] and row["probability"] > 0.5 for row in pairs)
    assert re.search(r"^revision +answers +reward", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("principle: x\n", "must be a list of principles"),
        ("- {name: a, critique: b}\n", "principle 1 must have a text for revise and prefer"),
        ("- {name: a, critic: b}\n", "unknown key 'critic' .did you mean 'critique'"),
        ("- {name: a,\n   prefer: b, prefer: c}\n", "line 2: the key 'prefer' is there a second time"),
        ("- a\n- a\n", "two principles of the name 'a'"),
        ("[", "is not YAML"),
    ],
)
def test_a_constitution_that_is_none_is_refused(text: str, message: str, tmp_path: Path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_principles(tmp_path / "p.yaml")
