"""The nouns of fastpost: Head, TopK, Stats, Batch. Needs torch alone.

Letters mean the same everywhere:
  T  tokens, packed and flat      D  hidden size         V  vocabulary
  S  sequences                    U  units of a loss     K  entries a token of a stored teacher
p is the policy's distribution over the vocabulary, q a reference's or teacher's, both after temperature.
`target[t]` is the token that `hidden[t]` predicts: it is already shifted. All logarithms are natural.

A loss never sees the logits. It sees `Stats`, a few numbers per token, and `Batch`, what was known before the
forward pass; it returns one number per *unit*, the smallest group of tokens that must be seen together.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.quantised import Quantised, Weight

Unit = Literal["token", "sequence", "pair", "batch"]


def nearest(name: str, known: Sequence[str]) -> str:
    """ " (did you mean 'beta'?)", or nothing: the tail of every message about an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_tensor(name: str, value: object) -> None:
    """ValueError unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def check_pairs(S: int) -> None:
    """ValueError for an odd number of sequences."""
    if S % 2:
        raise ValueError(f"a pair is two adjacent sequences, chosen then rejected, but the batch has {S} sequences")


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
            "layer of bitsandbytes is read by fastpost.quantised.weight_of(layer)"
        )


@dataclass(frozen=True)
class Shard:
    """A vocabulary in pieces (tensor parallel): rank i of `group` holds the next sizes[i] rows of it.

    Each rank makes a Head of its own rows, and all make the same calls with the same hidden states, targets and batch;
    a target counts in the whole vocabulary. See fastpost.shard.
    """

    sizes: tuple[int, ...]
    group: dist.ProcessGroup | None = None  # None: all processes

    def __post_init__(self):
        if not isinstance(self.sizes, tuple) or not all(isinstance(size, int) and size > 0 for size in self.sizes):
            raise ValueError(
                f"Shard.sizes must be a tuple of positive row counts, one for each rank, got {self.sizes!r}"
            )
        if not dist.is_initialized():
            raise ValueError("Shard needs a process group: call torch.distributed.init_process_group first")
        if self.rank < 0 or len(self.sizes) != dist.get_world_size(self.group):
            raise ValueError(
                f"Shard.sizes must have one entry for each rank of its group, and this process must be in it: got "
                f"{self.sizes} for {dist.get_world_size(self.group)} ranks, here rank {self.rank}"
            )

    @staticmethod
    def of(weight: Weight, group: dist.ProcessGroup | None = None) -> Shard:  # (V of this rank, D)
        """The vocabulary that the weights of all ranks make up. It asks them: make it once, and keep it."""
        sizes = [0] * dist.get_world_size(group)
        dist.all_gather_object(sizes, weight.shape[0], group)
        return Shard(tuple(sizes), group)

    @property
    def ranks(self) -> list[int]:
        """The processes, in the order of their rows."""
        return dist.get_process_group_ranks(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def rows(self) -> int:
        """How many this rank holds."""
        return self.sizes[self.rank]

    @property
    def start(self) -> int:
        """The first row that this rank holds."""
        return sum(self.sizes[: self.rank])

    @property
    def vocabulary(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: softcap(scale * (hidden @ weight.T + bias)), softcap(x) = c * tanh(x / c),
    with each adapter of `lora` added to the product. With a `shard`, weight, bias and the adapters' b are this rank's
    rows of them."""

    weight: Weight  # (V, D), the dtype of the hidden states; or quantised, and then it is frozen
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None  # c, as Gemma 2 caps its logits; None: no cap
    scale: float = 1.0
    lora: tuple[LowRank, ...] = ()  # exact, and trained through: see fastpost.lowrank
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


# None, for fields typed as the Tensor they are once given. A loss may rely on the type: the view it gets of Stats and
# Batch refuses to hand out a None (`_Given`).
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

IGNORE = -100  # the target of a position where nothing is to be predicted

PER_TOKEN = ("old_logp", "ref_logp", "rollout_logp", "advantage", "old_value", "return_")
PER_SEQUENCE = ("label", "completion_length")


@dataclass(frozen=True)
class Batch:
    """A packed batch: S sequences laid end to end in T positions, with what is known of each before the forward pass.

    Positions count whole sequences, prompt and last position included; where nothing is to be predicted, target is
    -100. Pairs are adjacent sequences: chosen, then rejected.
    """

    target: Tensor  # (T,) int64, or -100
    lengths: Tensor  # (S,) int64, positions of each sequence in order; they sum to T
    old_logp: Tensor = NOT_GIVEN  # (T,) under the policy that is being improved; None: on policy
    ref_logp: Tensor = NOT_GIVEN  # (T,) under the reference
    rollout_logp: Tensor = NOT_GIVEN  # (T,) as the sampler reported it
    advantage: Tensor = NOT_GIVEN  # (T,); one of shape (S,) is spread over its sequence
    old_value: Tensor = NOT_GIVEN  # (T,)
    return_: Tensor = NOT_GIVEN  # (T,)
    label: Tensor = NOT_GIVEN  # (S,) bool, desirable or not (KTO)
    completion_length: Tensor = NOT_GIVEN  # (S,) tokens of the completion, before any masking
    margin: Tensor = NOT_GIVEN  # (S / 2,)
    kl: Tensor = NOT_GIVEN  # scalar, KTO's baseline
    weight: Tensor = NOT_GIVEN  # (U,) the normalisation; None: 1 / kept units
    kept: Tensor = NOT_GIVEN  # (N,) int64, positions with a target; a Batch from packing has them
    kept_lengths: Tensor = NOT_GIVEN  # (S,) int64 on the host, how many each sequence has; given with `kept`

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None or field.name in ("target", "lengths"):
                check_tensor(f"batch.{field.name}", getattr(self, field.name))
        T, S = self.target.numel(), self.lengths.numel()
        if self.target.ndim != 1:
            raise ValueError(f"batch.target must be flat, (T,), got shape {tuple(self.target.shape)}")
        if self.target.dtype != torch.int64:
            raise ValueError(f"batch.target must be int64, got {self.target.dtype}")
        if self.lengths.ndim != 1 or self.lengths.is_floating_point():
            raise ValueError(
                f"batch.lengths must be a flat integer tensor (S,), got {self.lengths.dtype} of shape "
                f"{tuple(self.lengths.shape)}"
            )
        # Only where reading costs nothing: on an accelerator the head looks at the sum, with the other range checks.
        if self.lengths.device.type == "cpu" and (
            S == 0 or int(self.lengths.min()) < 0 or int(self.lengths.sum()) != T
        ):
            raise ValueError(
                f"batch.lengths must be non-negative and sum to the {T} positions of batch.target, "
                f"got {S} lengths summing to {int(self.lengths.sum())}"
            )
        if self.advantage is not None and self.advantage.shape == (S,) and S != T:
            object.__setattr__(self, "advantage", self.spread(self.advantage))
        if self.label is not None and self.label.dtype != torch.bool:
            raise ValueError(f"batch.label must be bool, desirable or not, got {self.label.dtype}")
        shapes = dict.fromkeys(PER_TOKEN, (T,)) | dict.fromkeys(PER_SEQUENCE, (S,))
        for name, shape in (shapes | {"margin": (S // 2,), "kl": ()}).items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"batch.{name} must have shape {shape} to match {T} positions in {S} sequences, "
                    f"got {tuple(value.shape)}"
                )

    @functools.cached_property
    def counts(self) -> Tensor:
        """(S,) lengths, beside the other tensors. A loss, whose batch has kept tokens alone, divides by these."""
        return self.lengths.to(self.target.device, non_blocking=True)

    @functools.cached_property
    def sequence(self) -> Tensor:
        """(T,) the index of each position's sequence."""
        position = torch.arange(self.target.numel(), device=self.target.device)
        # (repeat_interleave would write past its end where lengths on an accelerator, not looked at yet, are wrong)
        return torch.searchsorted(self.counts.cumsum(0), position, right=True).clamp(max=self.lengths.numel() - 1)

    def per_sequence(self, x: Tensor) -> Tensor:  # (T,) -> (S,)
        """The sum of x over each sequence."""
        return x.new_zeros(self.lengths.numel()).index_add(0, self.sequence, x)

    def mean_per_sequence(self, x: Tensor) -> Tensor:  # (T,) -> (S,)
        """The mean of x over each sequence, 0 over an empty one."""
        return self.per_sequence(x) / self.counts.clamp(min=1)

    def spread(self, x: Tensor) -> Tensor:  # (S,) -> (T,)
        """x of each position's sequence."""
        return x.index_select(0, self.sequence)

    def behaviour_logp(self, logp: Tensor) -> Tensor:  # (T,) -> (T,)
        """old_logp; where it was not given the policy that sampled is the one being trained, so logp itself, as a
        constant."""
        return logp.detach() if self.old_logp is None else self.old_logp

    def beyond_margin(self, difference: Tensor) -> Tensor:  # (S / 2,) -> (S / 2,)
        """difference less the margin that was asked for, if one was."""
        return difference if self.margin is None else difference - self.margin

    @staticmethod
    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:  # (S,) -> (S / 2,), (S / 2,)
        """(chosen, rejected)."""
        check_pairs(x.numel())
        chosen, rejected = x.view(-1, 2).unbind(1)
        return chosen, rejected

    def units(self, unit: Unit) -> int:
        """U, how many numbers a loss of this unit returns."""
        T, S = self.target.numel(), self.lengths.numel()
        if unit == "pair":
            check_pairs(S)
        return {"token": T, "sequence": S, "pair": S // 2, "batch": 1}[unit]

    def kept_units(self, unit: Unit) -> Tensor:  # (U,) bool
        """Which units have a token left, for a batch from which the ignored ones are gone."""
        if unit == "token":
            return torch.ones_like(self.target, dtype=torch.bool)
        left = self.counts > 0
        if unit == "pair":
            chosen, rejected = self.pairs(left)
            return chosen | rejected
        return left if unit == "sequence" else left.any().reshape(1)

    def _each(self, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The fields of these names that are given, changed."""
        return {name: change(getattr(self, name)) for name in names if getattr(self, name) is not None}

    def _of_kept(self, lengths: Tensor, cut: dict[str, Tensor]) -> Batch:
        """Other positions. The weight, which belongs to units, is not carried, and all positions are kept ones."""
        return replace(self, **cut, lengths=lengths, weight=None, kept=None, kept_lengths=None)

    def at(self, rows: Tensor) -> Batch:  # (N,) ascending positions
        """The same sequences with only these positions left in them."""
        if len(rows) == self.target.numel():
            return self._of_kept(self.lengths, {})
        lengths = self.kept_lengths
        if self.kept is None or lengths is None or len(rows) != len(self.kept):
            lengths = torch.zeros_like(self.lengths, device=rows.device).index_add(
                0, self.sequence.index_select(0, rows), torch.ones_like(rows, dtype=self.lengths.dtype)
            )
        return self._of_kept(lengths, self._each(("target", *PER_TOKEN), lambda x: x.index_select(0, rows)))

    def tokens(self, rows: slice) -> Batch:
        """The same sequences with only these of their positions, for a loss of tokens."""
        ends = torch.cumsum(self.lengths, 0)
        lengths = ends.clamp(rows.start, rows.stop) - (ends - self.lengths).clamp(rows.start, rows.stop)
        return self._of_kept(lengths, self._each(("target", *PER_TOKEN), lambda x: x[rows]))

    def slice(self, first: int, last: int, start: int, stop: int) -> Batch:
        """Sequences first..last, which are positions start..stop: whole ones, so that every field keeps its meaning."""
        cut = self._each(("target", *PER_TOKEN), lambda x: x[start:stop])
        cut |= self._each(PER_SEQUENCE, lambda x: x[first:last])
        cut |= self._each(("margin",), lambda x: x[first // 2 : last // 2])
        return self._of_kept(self.lengths[first:last], cut)

    def blank(self, mask: Tensor) -> Batch:  # (T,) bool
        """Zeros in every per-token field where mask is false, so that nothing found there can reach a sum."""
        return replace(self, **self._each(PER_TOKEN, lambda x: torch.where(mask, x, torch.zeros_like(x))))

    def to(self, device: torch.device | str) -> Batch:
        """Every tensor on `device`, but for the lengths: they are read on the host."""
        names = [field.name for field in fields(self) if "lengths" not in field.name]
        ahead = torch.device(device).type == "cuda"  # a copy back to the host must be waited for
        return replace(self, **self._each(names, lambda x: x.to(device, non_blocking=ahead)))
