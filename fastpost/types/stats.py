"""Stats: what a loss sees of the model, and the names by which it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

# None, for fields typed as the Tensor they are once given. A loss may rely on the type: the view it gets of Stats and
# Batch refuses to hand out a None (`_Given` of fastpost.equation).
NOT_GIVEN: Any = None


@dataclass(frozen=True)
class Stats:
    """Per-token facts about p = softmax(logits / temperature): all that a loss may know of the model.

    A statistic that was not asked for is None.
    """

    logp: Tensor = NOT_GIVEN  # (T,) log p[target], <= 0
    lse: Tensor = NOT_GIVEN  # (T,) logsumexp of the logits / temperature
    entropy: Tensor = NOT_GIVEN  # (T,) -sum p log p, nats, >= 0
    reverse_kl: Tensor = NOT_GIVEN  # (T,) KL(p || q), nats, >= 0
    forward_kl: Tensor = NOT_GIVEN  # (T,) KL(q || p), nats, >= 0
    jsd: Tensor = NOT_GIVEN  # (T,) b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p  (arXiv:2306.13649)
    log_sum_sq: Tensor = NOT_GIVEN  # (T,) log sum p^2, <= 0
    mean_logp: Tensor = NOT_GIVEN  # (T,) mean over the vocabulary of log p
    top1: Tensor = NOT_GIVEN  # (T,) bool: no token is more likely than the target
    logp_at_1: Tensor = NOT_GIVEN  # (T,) log p[target] at temperature 1, asked for as "logp@1"


# How an output is asked for -> its field. "logp@1" is no Python name, so it alone differs.
OUTPUTS = {("logp@1" if f.name == "logp_at_1" else f.name): f.name for f in fields(Stats)}
NEEDS_REFERENCE = frozenset({"reverse_kl", "forward_kl", "jsd"})
