"""What takes the place of TRL's own under `fastpost.integrations.trl`: the forward that its trainers ask for, and the
methods of those that have the head in one.

Every field of `FusedCausalLMOutput` is TRL's: (B, L - 1), or (B, L) with `shift_labels`, zero where the label is -100.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastpost import losses
from fastpost.head import fused_loss, token_stats
from fastpost.integrations.routers import router_loss
from fastpost.types import IGNORE, Batch, Head, Stats

# TRL's name of a per-token field -> the statistics it is made of, and how.
FIELDS: dict[str, tuple[tuple[str, ...], Callable[[Stats], Tensor]]] = {
    "log_probs": (("logp",), lambda s: s.logp),
    "entropy": (("entropy",), lambda s: s.entropy),
    "log_sum_sq_probs": (("log_sum_sq",), lambda s: s.log_sum_sq),
    "mean_logits": (("mean_logp", "lse"), lambda s: s.mean_logp + s.lse),
    "is_top1": (("top1",), lambda s: s.top1),
}


@dataclass(frozen=True)
class Asked:
    """What a fused forward returns.

    An entropy that is only looked at, as most trainers do, costs nothing; its gradient takes a frozen head from 2
    products to 3. TRL's always has one; here it is an error to differentiate it unasked.
    """

    temperature: float = 1.0
    in_fp32: bool = False  # the head, outside autocast
    outputs: tuple[str, ...] = ("log_probs",)  # some of FIELDS
    differentiable_entropy: bool = False


def fuse(model: Any, asked: Asked) -> None:
    """Gives a causal LM the forward that `model(..., labels=labels, fused_lm_head=True)` calls."""
    _refuse_adapter(model, asked.in_fp32)
    before, own = vars(model).get("forward"), type(model).forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head:
            return _fused(self, args, kwargs, asked)
        return own(self, *args, **kwargs) if before is None else before(*args, **kwargs)

    forward.__name__, forward.__doc__ = own.__name__, own.__doc__
    # The signature alone, no __wrapped__: Accelerate unwraps mixed precision by following those, past this forward.
    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)


def add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """In place of TRL's."""
    fuse(model, Asked(temperature, cast_lm_head_to_fp32, tuple(dict.fromkeys(("log_probs", *outputs)))))


def _refuse_adapter(lm: Any, cast_lm_head_to_fp32: bool) -> None:
    """What `Head.of` cannot read is refused when the trainer is built, as it would be by TRL."""
    if not hasattr(lm.get_output_embeddings(), "base_layer"):
        return
    if cast_lm_head_to_fp32:
        raise ValueError(
            "cast_lm_head_to_fp32=True would take the adapter off lm_head: leave it False (the logits are fp32 here, "
            "whatever the model's dtype), or leave lm_head out of target_modules"
        )
    Head.of(lm)


def _fused(lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], asked: Asked) -> Any:
    """The backbone's own forward, then the statistics of the rows that have a label."""
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    items = kwargs.pop("num_items_in_batch", None)
    if getattr(lm.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    trunk = lm.base_model(*args, **kwargs | {"use_cache": False})
    head = Head.of(lm)
    target = pad(labels, (0, 1), value=IGNORE)[:, 1:] if shifted is None else shifted
    target = target.to(head.weight.device)
    fields = _fields(trunk.last_hidden_state, head, target, asked)
    if shifted is None:  # the last position has nothing to predict
        target, fields = target[:, :-1], {name: x[:, :-1] for name, x in fields.items()}
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = router_loss(lm, trunk.router_logits, kwargs.get("attention_mask"))
    return _output(lm, fields, target != IGNORE, items, aux_loss)


def _fields(
    hidden: Tensor,  # (B, L, D)
    head: Head,
    target: Tensor,  # (B, L)
    asked: Asked,
) -> dict[str, Tensor]:  # of (B, L)
    """By TRL's names."""
    hidden = hidden.to(target.device)
    names = [name for field in asked.outputs for name in FIELDS[field][0]]
    with torch.autocast(hidden.device.type, enabled=False) if asked.in_fp32 else nullcontext():
        hidden = hidden.float() if asked.in_fp32 else hidden
        same = {
            "temperature": asked.temperature,
            "differentiates": ("logp", "entropy")[: 1 + asked.differentiable_entropy],
        }
        stats = token_stats(hidden, head, target, outputs=names, **same)
    fields = {field: FIELDS[field][1](stats) for field in asked.outputs}
    if "entropy" in fields and not asked.differentiable_entropy:
        fields["entropy"] = _LookedAt.apply(stats.entropy, stats.logp)
    return fields


class _LookedAt(torch.autograd.Function):
    """A statistic without a gradient that says so when one is asked for, instead of leaving it out of a loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, logp: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise RuntimeError(
            "this entropy is for looking at: for a loss on it call, once the trainer is built, fastpost.integrations."
            "trl_heads.fuse(model, Asked(..., differentiable_entropy=True))"
        )


def _output(
    lm: Any, fields: dict[str, Tensor], kept: Tensor, items: Tensor | int | None, aux_loss: Tensor | None
) -> Any:
    """With the loss that the model's own forward would compute."""
    from trl.trainer.utils import FusedCausalLMOutput

    loss = -fields["log_probs"].sum() / (kept.sum().clamp(min=1) if items is None else items)
    if aux_loss is not None:
        loss = loss + getattr(lm.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, **fields, label_mask=kept, aux_loss=aux_loss)  # type: ignore[arg-type]


def distillation_loss(
    self: Any, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """In place of DistillationTrainer._compute_loss: (loss, summed entropy of the student, scored tokens).

    TRL's beta is ours: m = beta q + (1 - beta) p, 0 the forward and 1 the reverse KL.
    """
    hidden, hidden_q, teacher = _of_completions(self, unwrapped_student, inputs)
    head, completion = Head.of(unwrapped_student), inputs["completion_ids"]
    scored = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
    count = scored.sum()
    items = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    batch = Batch(
        target=torch.where(scored, completion, IGNORE).flatten(),
        lengths=torch.tensor([scored.numel()]),
        weight=(torch.ones((), device=scored.device) / items).expand(scored.numel()),
    ).to(head.weight.device)
    loss, stats = fused_loss(
        losses.gkd,
        hidden.flatten(0, 1).to(head.weight.device),
        head,
        batch,
        reference=_as_reference(hidden_q.flatten(0, 1), Head.of(teacher), hidden),
        temperature=self.temperature,
        jsd_beta=self.beta,
        outputs=("entropy",),
        return_stats=True,
    )
    return loss, stats.entropy.sum(), count


def _of_completions(trainer: Any, student: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """(the student's last hidden states of the completions, the teacher's, the teacher): (B, L, D), (B, L, D_q)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    takes = inspect.signature(trainer._get_last_hidden_state).parameters  # images among them
    trunk = functools.partial(trainer._get_last_hidden_state, **{n: inputs[n] for n in takes if n in inputs})
    given = (ids, attention, inputs["completion_ids"].shape[1])
    trainer.teacher_model.eval()
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    hidden = trunk(student, *given)
    with torch.no_grad():
        hidden_q = trainer._forward_redirection(trainer.teacher_model, teacher, trunk, teacher, *given)
    return hidden, hidden_q, teacher


def _as_reference(hidden: Tensor, head: Head, like: Tensor) -> tuple[Tensor, Head]:
    """A teacher loaded in another dtype, read in the student's, as autocast would."""
    device, dtype = head.weight.device, like.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden.to(device, dtype), replace(head, weight=head.weight.to(dtype), bias=bias)


def cpo_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """In place of CPOTrainer.concatenated_forward: the negative log-likelihood is of the chosen answers."""
    pairs = self.concatenated_inputs(batch, padding_value=self.pad_token_id, device=self.accelerator.device)
    average, with_nll = self.loss_type in ("ipo", "simpo"), self.cpo_alpha != 0
    return _score_pairs(self, model, pairs, pairs["concatenated_labels"], average, with_nll)


def orpo_forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """In place of ORPOTrainer.concatenated_forward: the negative log-likelihood is of prompts and chosen answers."""
    pairs = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
    whole = torch.where(pairs["concatenated_attention_mask"] == 1, pairs["concatenated_input_ids"], IGNORE)
    half = len(whole) // 2
    labels = torch.cat([whole[:half], pairs["concatenated_labels"][half:]])
    return _score_pairs(self, model, pairs, labels, average=True, with_nll=True)


def _score_pairs(
    trainer: Any,
    model: Any,
    pairs: dict[str, Tensor],  # of (S, L): the chosen sequences, then the rejected
    labels: Tensor,  # (S, L), what is to be scored: the answers, and what else the nll is of
    average: bool,  # over an answer's tokens; a sum if not
    with_nll: bool,
) -> tuple[Tensor, ...]:
    """(logp of the chosen, of the rejected, mean logits of their scored tokens, nll of the chosen, [router loss])."""
    more = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
    ids, attention = pairs["concatenated_input_ids"], pairs["concatenated_attention_mask"]
    out = model(ids, attention_mask=attention, labels=labels, fused_lm_head=True, **more)
    own = slice(1 - labels.shape[1], None)  # PEFT's prompts put virtual tokens in front
    logp, mean_logits, half = out.log_probs[:, own], out.mean_logits[:, own], len(labels) // 2
    scored, answers = (x[:, 1:].to(logp.device) != IGNORE for x in (labels, pairs["concatenated_labels"]))
    of_answers = torch.where(answers, logp, 0.0).sum(1)
    if average:
        of_answers = of_answers / answers.sum(1).clamp(min=1)
    nll = -logp[:half].sum() / scored[:half].sum().clamp(min=1) if with_nll else logp.new_zeros(())
    means = (mean_logits[rows][scored[rows]] for rows in (slice(half), slice(half, None)))
    return (*of_answers.chunk(2), *means, nll, *([out.aux_loss] if more else []))
