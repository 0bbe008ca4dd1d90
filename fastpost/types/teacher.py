"""TopK: a teacher that was stored, in place of a reference that is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastpost.types.checks import check_tensor


@dataclass(frozen=True)
class TopK:
    """A stored teacher: for each token its K most likely next tokens and their log-probabilities.

    What the teacher gave to the other V - K tokens is named by `rest`:
      "bucket"       one outcome more, of probability 1 - sum(exp(logp)), compared with the policy's own rest;
      "renormalize"  none: the K probabilities are scaled to sum to one (a reverse KL is then infinite, and refused).
    """

    ids: Tensor  # (T, K) int64, distinct within a row
    logp: Tensor  # (T, K), natural log, at the temperature of the call
    rest: Literal["bucket", "renormalize"] = "bucket"

    def __post_init__(self):
        check_tensor("TopK.ids", self.ids)
        check_tensor("TopK.logp", self.logp)
        if self.ids.ndim < 2 or self.ids.shape != self.logp.shape or self.ids.shape[-1] == 0:
            raise ValueError(
                f"TopK.ids and TopK.logp must have one shape (T, K), K > 0, "
                f"got {tuple(self.ids.shape)} and {tuple(self.logp.shape)}"
            )
        if self.ids.dtype != torch.int64:
            raise ValueError(f"TopK.ids must be int64, got {self.ids.dtype}")
        if self.rest not in ("bucket", "renormalize"):
            raise ValueError(f"TopK.rest must be 'bucket' or 'renormalize', got {self.rest!r}")
