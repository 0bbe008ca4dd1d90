"""The tokenizer of a directory, and whether it gives the tokens of another one the numbers that they have there.

Models that read the same token ids must mean the same words by them. One may know more words, numbered after those of
the other; it may not know fewer, nor number them otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")  # any makes one


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in FILES)


def read_tokenizer(source: Path | str, **options: Any) -> Any:
    """Of a directory, or of the hub; it pads with the end of a sequence where it has no token for that."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_words(tokenizer: Any, base: Any, where: str, whose: str) -> None:
    """ValueError unless the tokenizer has every token of the base's under the same number."""
    ours, theirs = tokenizer.get_vocab(), base.get_vocab()
    other = sorted((i, token) for token, i in theirs.items() if ours.get(token) != i)
    if other:
        i, token = other[0]
        raise ValueError(
            f"{where} has another vocabulary than {whose}: {token!r} is {ours.get(token, 'missing')} in the one and "
            f"{i} in the other ({len(other)} such tokens)"
        )
