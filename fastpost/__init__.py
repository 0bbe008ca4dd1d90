"""fastpost: post-training of language models on one fused op: hidden states and a head in, per-token statistics out."""

from fastpost import advantages, losses, metrics, weights
from fastpost.equation import Loss, loss
from fastpost.functional import linear_cross_entropy
from fastpost.head import fused_loss, linear_logprobs, token_stats
from fastpost.types import Batch, Head, Stats, TopK

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Head",
    "Loss",
    "Stats",
    "TopK",
    "advantages",
    "fused_loss",
    "linear_cross_entropy",
    "linear_logprobs",
    "loss",
    "losses",
    "metrics",
    "token_stats",
    "weights",
]
