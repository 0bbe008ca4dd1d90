"""The same tokens and masks as TRL's own preprocessing gives, of every column format, for three kinds of tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.data_utils import extract_prompt

import tiny
from fastpost.data import preference_examples, reward_examples, sft_examples, split_pair, unpaired_examples

WORDS = ["the sky is", " blue", " green, not grey", "two and two", " are four", " are five", "naïve café ☕", " ja"]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def bpe() -> PreTrainedTokenizerFast:
    """Byte-level merges, and a BOS before every text that is not from the template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", *tiny.SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<eos>", pad_token="<pad>", add_prefix_space=False
    )
    fast.chat_template = "<s>{{ mood }}{% for tool in tools or [] %}{{ tool['name'] }}{% endfor %}" + tiny.TEMPLATE
    return fast


def thinking() -> PreTrainedTokenizerFast:
    """A template that opens the assistant's turn with more than it keeps of it."""
    fast = tiny.tokenizer()
    fast.chat_template = tiny.TEMPLATE.replace("<|assistant|>{%", "<|assistant|>think {%")
    return fast


TOKENIZERS = {"characters": tiny.tokenizer(), "bpe": bpe(), "thinking": thinking()}
PAIRS = [
    (prompt, good, bad) for prompt in WORDS[::3] for good, bad in ((" blue", " green"), (" are four", " are five"))
]
EXTRA = {"tools": [{"name": "add"}], "chat_template_kwargs": {"mood": "calm"}}


def talk(prompt: str) -> list[dict[str, str]]:
    return [said("system", "be kind"), said("user", prompt)]


def reply(text: str) -> list[dict[str, str]]:
    return [said("assistant", text)]


PREFERENCES = {
    "text": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS],
    "implicit text": [{"chosen": p + c, "rejected": p + r} for p, c, r in PAIRS],
    "messages": [{"prompt": talk(p), "chosen": reply(c), "rejected": reply(r)} for p, c, r in PAIRS],
    "implicit messages": [{"chosen": talk(p) + reply(c), "rejected": talk(p) + reply(r)} for p, c, r in PAIRS],
    "tools": [{"prompt": talk(p), "chosen": reply(c), "rejected": reply(r), **EXTRA} for p, c, r in PAIRS],
}
IMITATED = {
    "text": [{"text": p + c} for p, c, _ in PAIRS],
    "messages": [{"messages": talk(p) + reply(c) + talk(c) + reply(p)} for p, c, _ in PAIRS],
    "prompt and completion": [{"prompt": p, "completion": c} for p, c, _ in PAIRS],
    "prompt and completion as messages": [{"prompt": talk(p), "completion": reply(c)} for p, c, _ in PAIRS],
    "tools": [{"messages": talk(p) + reply(c), **EXTRA} for p, c, _ in PAIRS],
}
UNPAIRED = {
    "text": [{"prompt": p, "completion": c, "label": len(c) > 6} for p, c, _ in PAIRS],
    "messages": [{"prompt": talk(p), "completion": reply(c), "label": len(c) > 6} for p, c, _ in PAIRS],
    "pairs": PREFERENCES["text"],
    "implicit pairs": PREFERENCES["implicit messages"],
    "implicit pairs of text": PREFERENCES["implicit text"],
}


def by_trl(trainer: Any, rows: list[dict], tokenizer: Any, max_length: int | None, *extra: Any, **options: Any) -> Any:
    """What the trainer's own preparation makes of the rows."""
    arguments = SimpleNamespace(
        dataset_num_proc=None,
        max_length=max_length,
        truncation_mode="keep_start",
        assistant_only_loss=options.get("assistant_only_loss"),
        dataset_text_field="text",
        shuffle_dataset=False,
    )
    itself = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, calculate_KL=False, **options)
    given = datasets.Dataset.from_list(rows)
    return trainer._prepare_dataset(itself, given, tokenizer, arguments, *extra, "train")


def shapes(formats: dict[str, list[dict]]) -> Any:
    cases = [(name, made) for name in TOKENIZERS for made in formats]
    return pytest.mark.parametrize(
        ("tokenizer", "rows"), [(TOKENIZERS[t], formats[f]) for t, f in cases], ids=map(str, cases)
    )


def labels(example: Any) -> list[int]:
    return [token if kept else -100 for token, kept in zip(example.input_ids, example.loss_mask, strict=True)]


@pytest.mark.parametrize("max_length", [None, 24])
@shapes(PREFERENCES)
def test_pairs_are_those_of_trl(tokenizer, rows, max_length):
    theirs = [
        tuple(
            ((row["prompt_ids"] + row[side])[:max_length], len(row["prompt_ids"]))
            for side in ("chosen_ids", "rejected_ids")
        )
        for row in by_trl(DPOTrainer, rows, tokenizer, max_length)
    ]
    theirs = [row for row in theirs if row[0] != row[1]]  # we leave out those that are equal once they are cut
    try:
        pairs, counts = preference_examples(rows, tokenizer, max_length)
    except ValueError as error:
        assert "no row is left" in str(error) and not theirs
        return
    ours = [tuple((e.input_ids, e.loss_mask.index(True)) for e in pair.examples) for pair in pairs]
    assert ours == theirs
    assert all(all(e.loss_mask[e.loss_mask.index(True) :]) for pair in pairs for e in pair.examples)
    assert counts.rows - counts.masked - counts.identical == counts.examples == len(pairs)


@pytest.mark.parametrize("max_length", [None, 24])
@shapes(PREFERENCES)
def test_whole_sequences_for_a_reward_model_are_those_of_trl(tokenizer, rows, max_length):
    theirs = [(row["chosen_ids"], row["rejected_ids"]) for row in by_trl(RewardTrainer, rows, tokenizer, max_length)]
    try:
        pairs, counts = reward_examples(rows, tokenizer, max_length)
    except ValueError as error:
        assert "no row is left" in str(error) and not theirs
        return
    assert [(pair.chosen.input_ids, pair.rejected.input_ids) for pair in pairs] == theirs
    assert counts.too_long == len(rows) - len(theirs) and counts.without_eos == 0


@pytest.mark.parametrize("max_length", [None, 24])
@shapes(UNPAIRED)
def test_unpaired_completions_are_those_of_trl(tokenizer, rows, max_length):
    theirs = [
        (row["prompt_ids"], (row["prompt_ids"] + row["completion_ids"])[:max_length], row["label"])
        for row in by_trl(KTOTrainer, rows, tokenizer, max_length)
    ]
    try:
        found, _ = unpaired_examples(rows, tokenizer, max_length)
    except ValueError as error:
        assert "no row is left" in str(error) and not theirs
        return
    assert [(one.prompt_ids, one.prompt_ids + one.completion_ids, one.label) for one in found] == theirs


def check_imitated(tokenizer: Any, rows: list[dict], max_length: int | None, assistant_only_loss: bool) -> None:
    options = {"completion_only_loss": "completion" in rows[0], "assistant_only_loss": assistant_only_loss}
    theirs = by_trl(SFTTrainer, rows, tokenizer, max_length, False, None, **options)
    try:
        ours, _ = sft_examples(rows, tokenizer, max_length, assistant_only_loss=assistant_only_loss)
    except ValueError as error:
        assert "no row is left" in str(error) and not len(theirs)
        return
    assert [example.input_ids for example in ours] == theirs["input_ids"]
    assert [labels(example) for example in ours] == theirs["labels"]


@pytest.mark.parametrize("max_length", [None, 24])
@shapes(IMITATED)
def test_sequences_to_imitate_are_those_of_trl(tokenizer, rows, max_length):
    check_imitated(tokenizer, rows, max_length, assistant_only_loss=False)


@pytest.mark.parametrize("max_length", [None, 24])
@shapes({name: rows for name, rows in IMITATED.items() if name not in ("text", "prompt and completion")})
def test_what_the_assistant_says_is_that_of_trl(tokenizer, rows, max_length):
    check_imitated(tokenizer, rows, max_length, assistant_only_loss=True)


@pytest.mark.parametrize("rows", [PREFERENCES["implicit text"], PREFERENCES["implicit messages"]], ids=["text", "chat"])
def test_an_implicit_prompt_is_what_trl_extracts(rows):
    more = [
        {"chosen": "ab", "rejected": "abc"},
        {"chosen": "a b", "rejected": "a c"},
        {"chosen": "abc", "rejected": "ab"},
    ]
    for row in [*rows, *more]:
        theirs = extract_prompt(row)
        assert split_pair(row, "row 0") == (theirs["prompt"], theirs["chosen"], theirs["rejected"])
