"""A task from nothing: word problems over two two-digit numbers, as data of every kind, and a random model of 0.2
million parameters.

A worked sum goes digit by digit, units first, with the carry; a mistaken one has a wrong digit in one of its steps:
    Mia has 48 coins and gets 12 more. How many coins does Mia have?
    8+2=10, 4+1+1=06. Answer: 60
    8+2=10, 4+1+1=07. Answer: 70
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

PEOPLE = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Zoe", "Max")
THINGS = ("apples", "coins", "books", "cards", "stamps", "shells")
STORIES = (
    "{who} has {a} {what} and gets {b} more. How many {what} does {who} have?\n",
    "There are {a} {what} in a box and {b} in a bag. How many {what} are there?\n",
    "{who} counts {a} {what}, then {b} others. How many {what} in all?\n",
)
HELD_OUT = 25  # of the 90 two-digit numbers, kept for held-out problems
LONGEST = 26  # tokens of an answer; a worked sum has at most 24
Terms = tuple[int, int]
Row = dict[str, Any]


def terms(draw: random.Random, training: int, held_out: int) -> tuple[list[Terms], list[Terms]]:
    """So many of both. None occurs twice, and those for training share no number with those that are held out."""
    numbers = draw.sample(range(10, 100), 90)
    held, seen = numbers[:HELD_OUT], numbers[HELD_OUT:]
    train = draw.sample([(a, b) for a in seen for b in seen], training)
    return train, draw.sample([(a, b) for a in held for b in held], held_out)


def problem(a: int, b: int, draw: random.Random, stories: Sequence[str] = STORIES) -> Row:
    story = draw.choice(stories).format(a=a, b=b, who=draw.choice(PEOPLE), what=draw.choice(THINGS))
    return {"prompt": story, "completion": worked(a, b), "answer": str(a + b)}


def worked(a: int, b: int, slips: Terms = (0, 0)) -> str:
    """The sum, each step with its carry, and each off by its slip."""
    steps, carry, answer = [], 0, 0
    for place, (x, y, slip) in enumerate(zip(f"{a:02d}"[::-1], f"{b:02d}"[::-1], slips, strict=True)):
        total = abs(int(x) + int(y) + carry + slip)
        steps.append(f"{x}+{y}{f'+{carry}' if place else ''}={total:02d}")
        carry, digit = divmod(total, 10)
        answer += digit * 10**place
    return f"{', '.join(steps)}. Answer: {answer + 100 * carry}"


def in_lines(work: str) -> str:
    """A worked sum, each step on a line of its own."""
    return work.replace(", ", "\n").replace(". ", "\n")


def mistaken(a: int, b: int, draw: random.Random) -> str:
    slip = draw.choice((-1, 1))
    return worked(a, b, draw.choice(((slip, 0), (0, slip))))


def bare(a: int, b: int) -> str:
    return f"Answer: {a + b}"


def files(
    seed: int, demonstrations: int, problems: int, held_out: int, stories: Sequence[str] = STORIES
) -> dict[str, list[Row]]:
    """The rows of each file.

    demonstrations  few worked sums: they teach the procedure, and leave holes in the addition table
    steps           the same sums, a line a step
    lessons         many
    prompts         those of the lessons, each with its answer
    pairs           of the same problems, worked and mistaken
    answers         half of them worked, half of them mistaken, each with its label
    mixed           the demonstrations, and their answers without the work
    preferences     pairs whose worse answer is mistaken, or without the work, or that of another problem
    held_out        problems whose numbers occur in no other file
    held_out_preferences  of these
    """
    draw = random.Random(seed)
    seen, unseen = terms(draw, demonstrations + problems, held_out)
    train = [problem(a, b, draw, stories) for a, b in seen]
    test = [problem(a, b, draw, stories) for a, b in unseen]
    few, many = train[:demonstrations], train[demonstrations:]
    pairs = [_pair(row, mistaken(a, b, draw)) for row, (a, b) in zip(many, seen[demonstrations:], strict=True)]
    return {
        "demonstrations": few,
        "steps": [row | {"completion": in_lines(row["completion"])} for row in few],
        "lessons": many,
        "prompts": [{"prompt": row["prompt"], "answer": row["answer"]} for row in many],
        "pairs": pairs,
        "answers": [_labelled(row, i % 2 == 0) for i, row in enumerate(pairs)],
        "mixed": few + [row | {"completion": bare(a, b)} for row, (a, b) in zip(few, seen, strict=False)],
        "preferences": _preferences(many, seen[demonstrations:], draw),
        "held_out": test,
        "held_out_preferences": _preferences(test, unseen, draw),
    }


def _pair(row: Row, rejected: str) -> Row:
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected}


def _preferences(rows: Sequence[Row], pairs: Sequence[Terms], draw: random.Random) -> list[Row]:
    def worse(a: int, b: int) -> str:
        return draw.choice((mistaken(a, b, draw), bare(a, b), worked(*draw.choice(pairs))))

    return [_pair(row, worse(a, b)) for row, (a, b) in zip(rows, pairs, strict=True)]


def _labelled(pair: Row, label: bool) -> Row:
    return {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}


# ---- the model ----


def make_tokenizer(texts: Iterable[str]) -> Any:
    """Byte-level BPE in which a digit is always a token of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\d| ?[A-Za-z]+|[^A-Za-z\d]"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def write_model(directory: Path, texts: Iterable[str], seed: int, hidden_size: int = 64, positions: int = 256) -> None:
    """A random model, and a tokenizer of such texts."""
    write_random(directory, make_tokenizer(texts), seed, hidden_size, positions)


def write_random(directory: Path, tokenizer: Any, seed: int, hidden_size: int = 64, positions: int = 256) -> None:
    """A random model for a tokenizer, and that."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden_size // 4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(shape).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
