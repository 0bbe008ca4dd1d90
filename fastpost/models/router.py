"""The load-balancing loss of a mixture of experts over a pack (Switch Transformer, arXiv:2101.03961, eq. 4 to 6).

  E * sum_e f_e P_e    f_e: the share of tokens sent to expert e, P_e: the mean probability of e, over layers and tokens

The equation is the model's own, as its module in transformers has it: with the mask of a padded batch it is the mean
over real tokens. A pack has no others. A token that several sequences share counts once for each.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

NO_ROUTER = "which has no router, or none whose load is balanced by a loss"


def coefficient(lm: Any, asked: float | None = None) -> float:
    """What multiplies the loss: as asked, or as the model's config has it; 0 for a model without one.

    The config's output_router_logits, off by default, is not read: as in TRL, a coefficient of 0 turns the loss off.
    """
    if _equation(lm) is None:
        if asked:
            raise ValueError(f"router_aux_loss_coef must be 0 or left out for {type(lm).__name__}, {NO_ROUTER}")
        return 0.0
    return float(getattr(lm.config.get_text_config(), "router_aux_loss_coef", 0.0) if asked is None else asked)


def _equation(lm: Any) -> Any:
    """What the module of its class calls load_balancing_loss_func; wrappers (FSDP2) derive classes of their own."""
    modules = (sys.modules.get(cls.__module__) for cls in type(lm).__mro__)
    return next((found for module in modules if (found := getattr(module, "load_balancing_loss_func", None))), None)


def load_balancing_loss(lm: Any, router_logits: tuple[Tensor, ...] | None, copies: Tensor | None) -> Tensor:  # (T,)
    """A scalar, not multiplied by its coefficient yet. copies: how many sequences have each token; None: one."""
    equation = _equation(lm)
    if equation is None or not router_logits:
        raise ValueError(
            f"there is no router's loss of {type(lm).__name__}, {NO_ROUTER}: router_aux_loss_coef must be 0"
        )
    mask = None if copies is None else copies[None]
    return equation(router_logits, lm.num_experts, lm.num_experts_per_tok, mask)
