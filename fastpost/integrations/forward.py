"""The forward of a causal LM that is given labels, without logits: the backbone's own, and then fastpost's head on the
rows that have a label. `fastpost.integrations.transformers` puts it in the place of the model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils.generic import ModelOutput

from fastpost.core.door import eager_only
from fastpost.equation import Loss
from fastpost.head import fused_loss, token_stats
from fastpost.integrations.routers import router_coefficient, router_loss
from fastpost.losses import sft
from fastpost.types import IGNORE, NEEDS_REFERENCE, OUTPUTS, Batch, Head, nearest


@dataclass
class FusedOutput(ModelOutput):
    """What a fused model returns. A statistic at [b, t] is of the token that position t predicts, labels[b, t + 1], so
    all have the shape of labels, and are 0 in the last column and where the label is ignored."""

    loss: Tensor | None = None  # scalar
    logits: None = None
    logp: Tensor | None = None  # (B, L), as are the others; see fastpost.Stats
    lse: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq: Tensor | None = None
    mean_logp: Tensor | None = None
    top1: Tensor | None = None
    logp_at_1: Tensor | None = None
    aux_loss: Tensor | None = None  # of the routers, before its coefficient
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Options:
    """The arguments of `fuse_head`."""

    outputs: tuple[str, ...] = ()
    temperature: float = 1.0
    differentiable: bool = False
    loss: Loss = sft
    same_tokens: bool | None = None

    def __post_init__(self):
        known = [name for name in OUTPUTS if name not in NEEDS_REFERENCE]
        for name in self.outputs:
            if name in NEEDS_REFERENCE:
                raise ValueError(f"outputs: {name!r} compares with a reference, which a model's forward has not got")
            if name not in known:
                raise ValueError(f"unknown output {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


def backbone(lm: Any) -> Any:
    """Everything below the head, images included; itself if there is nothing else."""
    return lm.get_decoder() if lm.base_model is lm else lm.base_model


@eager_only
def _scored(
    lm: Any,
    hidden: Tensor,  # (B, L, D)
    target: Tensor,  # (B, L)
    items: Tensor | int | None,
    options: Options,
) -> tuple[Tensor, dict[str, Tensor]]:  # (), (B, L) each
    """The sum of the token losses over `items`, or their mean; and the statistics asked for, by field."""
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"labels {tuple(target.shape)} must have the shape of the input, {tuple(hidden.shape[:-1])}")
    head = Head.of(lm, same_tokens=options.same_tokens)
    flat, target = hidden.flatten(0, -2).to(head.weight.device), target.to(head.weight.device)
    kept = target.flatten() != IGNORE
    count = kept.sum() if items is None else torch.as_tensor(items, device=flat.device)
    one = torch.ones((), dtype=torch.promote_types(flat.dtype, torch.float32), device=flat.device)
    weight = torch.where(kept, one / count.reshape(()), 0.0)
    batch = Batch(target.flatten(), torch.full((len(target),), target.shape[-1]), weight=weight)
    loss, temperature, outputs = options.loss, options.temperature, options.outputs
    if options.differentiable:
        reads = tuple(dict.fromkeys((*loss.reads, *outputs)))
        stats = token_stats(flat, head, batch.target, outputs=reads, temperature=temperature)
        total = (loss(stats, batch) * weight).sum()
    else:
        same = {"temperature": temperature, "outputs": outputs, "return_stats": True}
        total, stats = fused_loss(loss, flat, head, batch, **same)
    return total, {OUTPUTS[name]: getattr(stats, OUTPUTS[name]).view(target.shape) for name in outputs}


def fused_forward(lm: Any, given: dict[str, Any], options: Options) -> FusedOutput:
    """The backbone's own forward, and then the head on the rows that have a label."""
    labels, shifted = given.pop("labels"), given.pop("shift_labels", None)
    items, ignore = given.pop("num_items_in_batch", None), given.pop("ignore_index", IGNORE)
    keep = given.pop("logits_to_keep", 0)
    if not isinstance(keep, int) or keep != 0:
        raise ValueError("logits_to_keep came with labels: a fused model given labels returns the loss and no logits")
    target = pad(labels, (0, 1), value=ignore)[..., 1:] if shifted is None else shifted
    target = target if ignore == IGNORE else target.masked_fill(target == ignore, IGNORE)
    outputs = backbone(lm)(**given, return_dict=True)
    loss, found = _scored(lm, outputs.last_hidden_state, target, items, options)
    aux_loss = None
    if given.get("output_router_logits"):
        aux_loss = router_loss(lm, outputs.router_logits, given.get("attention_mask"))
        loss = loss + router_coefficient(lm) * aux_loss.to(loss.device)
    also = ("past_key_values", "hidden_states", "attentions", "router_logits")
    return FusedOutput(loss=loss, **found, aux_loss=aux_loss, **{name: getattr(outputs, name, None) for name in also})
