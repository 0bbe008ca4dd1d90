"""Head: what turns hidden states into logits, and LowRank, an adapter on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpost.core.quantised import Quantised, Weight
from fastpost.types.checks import check_tensor
from fastpost.types.shard import Shard


@dataclass(frozen=True)
class LowRank:
    """A low-rank adapter (LoRA, arXiv:2106.09685) of a head: scaling * dropout(hidden) @ a.T @ b.T is added to its
    products."""

    a: Tensor  # (r, D)
    b: Tensor  # (V, r)
    scaling: float = 1.0
    dropout: float = 0.0  # the share of hidden that a does not see; drawn anew at each call

    def __post_init__(self):
        for name, value in (("a", self.a), ("b", self.b)):
            check_tensor(f"LowRank.{name}", value)
            if value.ndim != 2 or not value.is_floating_point():
                raise ValueError(
                    f"LowRank.{name} must be a floating {'(r, D)' if name == 'a' else '(V, r)'} matrix, got "
                    f"{value.dtype} of shape {tuple(value.shape)}"
                )
        if self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"LowRank.a (r, D) and LowRank.b (V, r) must have one r, got shapes {tuple(self.a.shape)} and "
                f"{tuple(self.b.shape)}"
            )
        if not isinstance(self.scaling, int | float) or not abs(self.scaling) < float("inf"):
            raise ValueError(f"LowRank.scaling must be a finite number, got {self.scaling!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"LowRank.dropout must be in [0, 1), got {self.dropout!r}")


def _check_weight(weight: Tensor) -> None:
    check_tensor("head.weight", weight)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"head.weight must be a floating (V, D) matrix, got {weight.dtype} of shape {tuple(weight.shape)}; a "
            "layer of bitsandbytes is read by fastpost.core.quantised.weight_of(layer)"
        )


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: softcap(scale * (hidden @ weight.T + bias)), softcap(x) = c * tanh(x / c),
    with each adapter of `lora` added to the product. With a `shard`, weight, bias and the adapters' b are this rank's
    rows of them."""

    weight: Weight  # (V, D), the dtype of the hidden states; or quantised, and then it is frozen
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None  # c, as Gemma 2 caps its logits; None: no cap
    scale: float = 1.0
    lora: tuple[LowRank, ...] = ()  # exact, and trained through: see fastpost.core.lowrank
    shard: Shard | None = None  # None: the whole vocabulary is here

    def __post_init__(self):
        if not isinstance(self.weight, Quantised):
            _check_weight(self.weight)
        if self.bias is not None:
            check_tensor("head.bias", self.bias)
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"head.bias must have shape ({self.weight.shape[0]},) to match head.weight {tuple(self.weight.shape)}, "
                f"got {tuple(self.bias.shape)}"
            )
        for name, value in (("scale", self.scale), ("softcap", 1.0 if self.softcap is None else self.softcap)):
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"head.{name} must be a positive, finite number, got {value!r}")
        if not isinstance(self.lora, tuple) or not all(isinstance(adapter, LowRank) for adapter in self.lora):
            raise ValueError(f"head.lora must be a tuple of fastpost.types.LowRank, got {self.lora!r}")
        for adapter in self.lora:
            if (adapter.b.shape[0], adapter.a.shape[1]) != self.weight.shape:
                raise ValueError(
                    f"head.lora must fit head.weight {tuple(self.weight.shape)} with a (r, D) and b (V, r), "
                    f"got shapes {tuple(adapter.a.shape)} and {tuple(adapter.b.shape)}"
                )
        if self.shard is not None:
            self._check_shard(self.shard)

    def _check_shard(self, shard: Shard) -> None:
        if shard.rows != self.weight.shape[0]:
            raise ValueError(
                f"head.shard gives rank {shard.rank} {shard.rows} rows, got head.weight {tuple(self.weight.shape)}"
            )
        if any(adapter.dropout for adapter in self.lora):
            raise ValueError("head.lora of a sharded head must have dropout 0: each rank would drop other features")

    @property
    def vocabulary(self) -> int:
        """V, over all ranks."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocabulary

    @staticmethod
    def of(model: torch.nn.Module, *, same_tokens: bool | None = None) -> Head:
        """The head of a Hugging Face causal LM, wrapped by PEFT, DDP or FSDP2 or not, quantised by bitsandbytes or not.
        See `fastpost.models.heads`.

        same_tokens: whether the ranks that share a sharded weight have the same tokens (tensor parallel) or each its
        own (FSDP); None: as the names of its mesh say.
        """
        from fastpost.models.heads import head_of

        return head_of(model, same_tokens)
