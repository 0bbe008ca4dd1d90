"""What keeps a mixture's experts equally busy: the loss of its routers, by the function in the model's own file."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor

TAKES = ["gate_logits", "num_experts", "top_k", "attention_mask"]
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def router_loss(lm: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """Before its coefficient. ValueError for a model that has no such function, or another one."""
    files = (sys.modules.get(kind.__module__) for kind in type(lm).__mro__)
    compute = next((f for file in files if (f := getattr(file, "load_balancing_loss_func", None))), None)
    if compute is None or list(inspect.signature(compute).parameters) != TAKES or not hasattr(lm, "num_experts"):
        raise _unknown(lm)
    return compute(router_logits, lm.num_experts, lm.num_experts_per_tok, attention_mask)


def router_coefficient(lm: Any) -> float:
    """The model's own; its configuration's where the model has none."""
    places = [(where, name) for where in (lm, lm.config.get_text_config()) for name in COEFFICIENTS]
    coefficient = next((c for where, name in places if (c := getattr(where, name, None)) is not None), None)
    if coefficient is None:
        raise _unknown(lm)
    return coefficient


def _unknown(lm: Any) -> ValueError:
    return ValueError(
        f"fastpost does not know how {type(lm).__name__} computes the loss of its routers: "
        "set model.config.output_router_logits = False"
    )
