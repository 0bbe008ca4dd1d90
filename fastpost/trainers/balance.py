"""What the router of a mixture of experts adds to a step: its load-balancing loss, each pack by its share of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpost.metrics import Part, mean
from fastpost.models.router import coefficient
from fastpost.models.trunk import causal_lm, hidden_states, hidden_states_and_router_loss
from fastpost.shared_prompt import AnyPack
from fastpost.trainers.config import Training


def hidden_and_balance(
    model: Any, packed: AnyPack, tokens: float, config: Training
) -> tuple[Tensor, Tensor | float, dict[str, Part]]:
    """Hidden states; what to add to the pack's loss in a step of so many tokens, 0 for a dense model; and for the log
    aux_loss, the router's loss as it is, which a mean over the step's tokens makes of it. A placeholder
    does not count."""
    weight = coefficient(causal_lm(model), config.router_aux_loss_coef)
    if not weight:
        return hidden_states(model, packed), 0.0, {}
    hidden, balance = hidden_states_and_router_loss(model, packed)
    counted = packed.num_tokens if packed.longest > 1 else 0
    shown = {"aux_loss": mean(balance.expand(counted))}
    return hidden, weight * counted / tokens * balance, shown
