"""What became of the rows of a file: silence about data is how runs fail."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from os import PathLike
from typing import Any

from fastpost.packing import Example

# Field of Counts -> what is said of that many rows, in this order.
NOTES = {
    "truncated": "cut to max_length",
    "too_long": "dropped, longer than max_length",
    "masked": "dropped with nothing left to predict",
    "identical": "dropped because chosen and rejected are the same",
    "unaligned": "dropped because the chat template rewrites the prompt when a completion follows",
    "without_eos": "without an EOS to predict",
    "doubled_bos": "with two BOS tokens at the start",
    "empty": "with an empty answer",
    "promptless": "whose chosen and rejected have no prompt in common",
    "duplicates": "that repeat an earlier one",
    "overlong": "longer than the positions of the model",
}


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a file; `str()` is the line that a trainer prints."""

    rows: int
    examples: int
    tokens: int
    predicted: int  # tokens with a loss; 0 where no token has one of its own
    truncated: int = 0  # kept, cut to max_length
    masked: int = 0  # dropped: no token left to predict
    unaligned: int = 0  # dropped: the template writes the prompt differently once there is a completion
    without_eos: int = 0  # kept, but nothing in it teaches the model to stop
    too_long: int = 0  # dropped: of no use when cut
    identical: int = 0  # dropped: a pair, or both halves of one, without a difference
    doubled_bos: int = 0  # kept: the text has a BOS, and the tokenizer writes another
    empty: int = 0  # kept: nothing but the EOS is said
    promptless: int = 0  # kept: a pair of texts that differ from their first character on
    duplicates: int = 0  # kept: the same tokens as an example before it
    overlong: int = 0  # kept, though the model knows fewer positions
    longest: int = 0  # tokens of the longest sequence
    unit: str = "examples"  # what an example is called

    def __str__(self) -> str:
        said = "".join(f"; {count} {NOTES[name]}" for name, count in noted(self).items())
        share = f"{self.predicted} of {self.tokens} tokens predicted" if self.predicted else f"{self.tokens} tokens"
        return f"{self.rows} rows, {self.examples} {self.unit}, {share}{said}"


def noted(counts: Counts) -> dict[str, int]:
    """What there is to say of the rows, by the names of NOTES."""
    return {name: count for name in NOTES if (count := getattr(counts, name))}


def _duplicates(units: Sequence[Sequence[Example]]) -> int:
    """How many have the tokens, and the masks, of one before them."""
    return len(units) - len({_digest(unit) for unit in units})


def _digest(unit: Sequence[Example]) -> bytes:
    """The same for the same tokens and masks, of which there may be a billion."""
    found = blake2b(digest_size=16)
    for example in unit:
        found.update(array("q", [len(example.input_ids)]))
        found.update(array("q", example.input_ids))
        found.update(bytes(example.loss_mask))
    return found.digest()


def counted(
    rows: int,
    kept: Sequence[Sequence[Example]],  # the sequences of each example
    notes: Counter[str],
    tokenizer: Any,
    max_length: int | None,
    *,
    positions: int | None = None,
    predicts: bool = True,
    unit: str = "examples",
    path: str | PathLike[str] = "",
) -> Counts:
    """The counts of all examples, with what was noted of single rows. ValueError if no example is left."""
    sequences = list(chain.from_iterable(kept))
    lengths = [max(len(example.input_ids) for example in one) for one in kept]
    bos = getattr(tokenizer, "bos_token_id", None)
    counts = Counts(
        rows=rows,
        examples=len(kept),
        tokens=sum(len(example.input_ids) for example in sequences),
        predicted=sum(sum(example.loss_mask[1:]) for example in sequences) if predicts else 0,
        doubled_bos=sum(any(bos is not None and e.input_ids[:2] == [bos, bos] for e in one) for one in kept),
        duplicates=_duplicates(kept),
        overlong=0 if positions is None else sum(length > positions for length in lengths),
        longest=max(lengths, default=0),
        unit=unit,
        **notes,
    )
    if not kept:
        of = f" of {path}" if path else ""
        limit = "" if max_length is None else f"; max_length is {max_length}"
        raise ValueError(f"no row{of} is left: {counts}{limit}")
    return counts
