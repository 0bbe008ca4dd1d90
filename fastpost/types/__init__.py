"""The nouns of fastpost: Head, TopK, Stats, Batch, a page each. Needs torch alone.

Letters mean the same everywhere:
  T  tokens, packed and flat      D  hidden size         V  vocabulary
  S  sequences                    U  units of a loss     K  entries a token of a stored teacher
p is the policy's distribution over the vocabulary, q a reference's or teacher's, both after temperature.
`target[t]` is the token that `hidden[t]` predicts: it is already shifted. All logarithms are natural.

A loss never sees the logits. It sees `Stats`, a few numbers per token, and `Batch`, what was known before the
forward pass; it returns one number per *unit*, the smallest group of tokens that must be seen together.
"""

from fastpost.types.batch import IGNORE, PER_TOKEN, Batch, Unit
from fastpost.types.checks import check_tensor, nearest
from fastpost.types.head import Head, LowRank
from fastpost.types.shard import Shard
from fastpost.types.stats import NEEDS_REFERENCE, OUTPUTS, Stats
from fastpost.types.teacher import TopK

__all__ = [
    "IGNORE",
    "NEEDS_REFERENCE",
    "OUTPUTS",
    "PER_TOKEN",
    "Batch",
    "Head",
    "LowRank",
    "Shard",
    "Stats",
    "TopK",
    "Unit",
    "check_tensor",
    "nearest",
]
