"""A role: this trunk, this adapter (or none), this head.

Policy, reference and teacher speak: their head is the model's own, and gives a distribution over the vocabulary. Value
and reward judge: theirs is scalar. A role that is not trained is a constant: no gradient, no dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastpost.models.heads import head_of
from fastpost.models.scalar import scores
from fastpost.models.switch import Switch
from fastpost.models.trunk import hidden_states, hidden_states_and_router_loss
from fastpost.shared_prompt import AnyPack, SharedPack
from fastpost.types import Head


@dataclass(frozen=True, eq=False)
class Role:
    """What one model does for another's training. Roles of one base share its `switch`, which holds the model."""

    name: str
    switch: Switch = field(repr=False)
    adapter: str | None  # None: the model with its adapters off, or without any
    trained: bool
    scalar: nn.Linear | None = None  # None: the head is the model's own

    @property
    def model(self) -> nn.Module:
        return self.switch.model

    def parameters(self) -> list[nn.Parameter]:
        """What of it trains: of its adapter, or of its model where it has none, and of its scalar head."""
        if not self.trained:
            return []
        trunk = self.model.parameters() if self.adapter is None else self.switch.parameters(self.adapter)
        head = () if self.scalar is None else self.scalar.parameters()
        return list({id(p): p for p in (*trunk, *head) if p.requires_grad}.values())

    def using(self) -> AbstractContextManager[None]:
        """Whatever the model does inside, a generation or a forward pass of its own, it does in this role."""
        return self.switch.using(self.adapter, None if self.trained else False)

    def hidden(self, packed: AnyPack) -> Tensor:  # (T, D), or (R, D) where prompts are shared
        """One pass of the trunk, without a head. A role that trains drops as its model's mode says, any other never."""
        with self._passing():
            return hidden_states(self.model, packed)[0]

    def hidden_and_router_loss(self, packed: AnyPack) -> tuple[Tensor, Tensor]:  # (T, D) or (R, D), ()
        """Those of a mixture of experts, and its load-balancing loss, not multiplied by its coefficient yet."""
        with self._passing():
            hidden, loss = hidden_states_and_router_loss(self.model, packed)
            return hidden[0], loss

    @contextmanager
    def _passing(self) -> Iterator[None]:
        with self.using(), torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            yield

    def head(self) -> Head:
        """What turns this role's hidden states into logits; to be asked for anew at each pass, as `Head.of`."""
        if self.scalar is not None:
            raise ValueError(f"{self.name} has a scalar head: its numbers are {self.name}.scores(hidden)")
        with self.using():
            return head_of(self.model)

    def scores(self, hidden: Tensor) -> Tensor:  # (..., D) -> (...)
        """The scalar head's numbers for hidden states of this role."""
        if self.scalar is None:
            raise ValueError(
                f"{self.name} has no scalar head: its numbers are token_stats(hidden, {self.name}.head(), ...)"
            )
        return scores(self.scalar, hidden)

    def __call__(self, packed: AnyPack) -> Tensor:  # (T,), or (R,) where prompts are shared
        """The scalar head's number at every token, from a pass of its own."""
        return self.scores(self.hidden(packed))

    def at_ends(self, packed: AnyPack) -> Tensor:  # (S,)
        """The number at the last token of each sequence: where a reward model judges the whole."""
        if isinstance(packed, SharedPack):  # of whose rows it is none: they predict, and nothing comes after it
            return self(replace(packed, rows=packed.ends))
        ends = packed.batch.lengths.cumsum(0) - 1
        return self.scores(self.hidden(packed)[ends.to(packed.input_ids.device)])

    def shares_pass(self, other: Role) -> bool:
        """Whether the hidden states of one pass serve both."""
        return self.switch is other.switch and self.adapter == other.adapter
