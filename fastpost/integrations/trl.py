"""TRL's trainers on fastpost's head: the per-token statistics they ask for, never the logits.

    with fastpost.integrations.trl.patch():
        trainer = DPOTrainer(...)
    trainer.train()

SFT, DPO, KTO, GRPO and RLOO ask one function, `add_fused_lm_head`, for a forward that returns log-probabilities; under
the patch that name means the function of this file. Distillation, and the experimental CPO and ORPO, have the head in
a method; under the patch a trainer is given another one when it is built. So what counts is where a trainer is built:
inside the patch it keeps fastpost's head for good, outside it is TRL's own.

An adapter on `lm_head`, which TRL refuses, is trained, where `Head.of` takes it.

Left alone: vLLM, Liger and server paths, the asynchronous trainers, encoder-decoder models. A head sharded by FSDP2 or
ZeRO-3 is refused by `Head.of`. CPO's and ORPO's `logits/*` are means over the scored positions; TRL's take in padding.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from types import MethodType
from typing import Any

import torch
import trl
from torch import Tensor
from torch.nn.functional import pad

from fastpost import losses
from fastpost.head import fused_loss, token_stats
from fastpost.types import IGNORE, Batch, Head, Stats

KNOWN = "1.16.0"

# TRL's name of a per-token field -> the statistics it is made of.
FIELDS = {
    "log_probs": ("logp",),
    "entropy": ("entropy",),
    "log_sum_sq_probs": ("log_sum_sq",),
    "mean_logits": ("mean_logp", "lse"),
    "is_top1": ("top1",),
}


@dataclass(frozen=True)
class Asked:
    """The arguments of `add_fused_lm_head`."""

    temperature: float
    in_fp32: bool
    outputs: tuple[str, ...]  # some of FIELDS


def add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """In place of TRL's: `model(..., labels=labels, fused_lm_head=True)` returns a FusedCausalLMOutput."""
    _refuse_adapter(model, cast_lm_head_to_fp32)
    asked = Asked(temperature, cast_lm_head_to_fp32, tuple(dict.fromkeys(("log_probs", *outputs))))
    before, own = model.forward, type(model).forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return _fused(self, args, kwargs, asked) if fused_lm_head else before(*args, **kwargs)

    forward.__name__, forward.__doc__ = own.__name__, own.__doc__
    # The signature alone, no __wrapped__: Accelerate unwraps mixed precision by following those, past this forward.
    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)


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
        aux_loss = _balance(lm, trunk.router_logits, kwargs.get("attention_mask"))
    return _output(lm, fields, target != IGNORE, items, aux_loss)


def _fields(
    hidden: Tensor,  # (B, L, D)
    head: Head,
    target: Tensor,  # (B, L)
    asked: Asked,
) -> dict[str, Tensor]:  # of (B, L)
    """By TRL's names; the log-probability and the entropy carry a gradient."""
    hidden = hidden.to(target.device)
    names = [name for field in asked.outputs for name in FIELDS[field]]
    with torch.autocast(hidden.device.type, enabled=False) if asked.in_fp32 else nullcontext():
        hidden = hidden.float() if asked.in_fp32 else hidden
        stats = token_stats(hidden, head, target, outputs=names, temperature=asked.temperature)
    values: dict[str, Callable[[Stats], Tensor]] = {
        "log_probs": lambda s: s.logp,
        "entropy": lambda s: s.entropy,
        "log_sum_sq_probs": lambda s: s.log_sum_sq.detach(),
        "mean_logits": lambda s: (s.mean_logp + s.lse).detach(),
        "is_top1": lambda s: s.top1,
    }
    return {field: values[field](stats) for field in asked.outputs}


def _balance(lm: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = lm.config.get_text_config()
    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)  # type: ignore[return-value]


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
    completion, mask = inputs["completion_ids"], inputs["completion_mask"]
    ids = torch.cat([inputs["prompt_ids"], completion], dim=1)
    attention = torch.cat([inputs["prompt_mask"], mask], dim=1)
    images = {
        name: inputs[name] for name in inspect.signature(self._get_last_hidden_state).parameters if name in inputs
    }
    trunk = functools.partial(self._get_last_hidden_state, **images)
    hidden = trunk(unwrapped_student, ids, attention, completion.shape[1])
    self.teacher_model.eval()
    teacher = self.accelerator.unwrap_model(self.teacher_model)
    with torch.no_grad():
        hidden_q = self._forward_redirection(
            self.teacher_model, teacher, trunk, teacher, ids, attention, completion.shape[1]
        )
    head, scored = Head.of(unwrapped_student), (mask * inputs.get("tool_mask", 1)).bool()
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


HEADS = tuple(f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "kto", "grpo", "rloo"))
DISTILLATION = "trl.trainer.distillation_trainer.DistillationTrainer"
CPO = "trl.experimental.cpo.cpo_trainer.CPOTrainer"
ORPO = "trl.experimental.orpo.orpo_trainer.ORPOTrainer"
# Trainer -> the method that has the head in it, and ours.
METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    DISTILLATION: ("_compute_loss", distillation_loss),
    CPO: ("concatenated_forward", cpo_forward),
    ORPO: ("concatenated_forward", orpo_forward),
}
# Modules that refuse an adapter on lm_head, by its class.
REFUSING = (*HEADS, DISTILLATION.rpartition(".")[0])
ADAPTER = "BaseTunerLayer"
# What is replaced or called, and its parameters where they matter.
RELIES_ON: dict[str, tuple[str, ...] | None] = {
    **{f"{module}.add_fused_lm_head": tuple(inspect.signature(add_fused_lm_head).parameters) for module in HEADS},
    **{f"{trainer}.{name}": tuple(inspect.signature(ours).parameters) for trainer, (name, ours) in METHODS.items()},
    **{f"{trainer}.__init__": None for trainer in METHODS},
    **{
        f"{trainer}.concatenated_inputs": ("batch", "is_encoder_decoder", "padding_value", "device")
        for trainer in (CPO, ORPO)
    },
    f"{DISTILLATION}._get_last_hidden_state": None,
    "trl.trainer.utils.FusedCausalLMOutput": ("loss", *FIELDS, "label_mask", "aux_loss"),
}


class NoLayer:
    """Stands for the class of adapters that TRL refuses on a head: no layer is one of these."""


@dataclass(frozen=True)
class Change:
    """One attribute of TRL."""

    owner: Any  # a module or a class
    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Patch:
    """What `patch` changed, until `restore()` or the end of a `with` block; nothing where TRL was patched already."""

    changes: tuple[Change, ...]

    def restore(self) -> None:
        """Every attribute as it was. One that was replaced again since is somebody else's, and stays."""
        for change in self.changes:
            if vars(change.owner).get(change.name) is change.after:
                setattr(change.owner, change.name, change.before)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def _check() -> None:
    """Before the first attribute is touched: this TRL is the one that was read."""
    remedy = f"install trl=={KNOWN}, or train without the patch, on TRL's own head"
    if trl.__version__ != KNOWN:
        raise ValueError(f"fastpost knows how trl {KNOWN} hangs together, and this is trl {trl.__version__}: {remedy}")
    with_peft = {f"{module}.{ADAPTER}": None for module in REFUSING} if importlib.util.find_spec("peft") else {}
    for path, parameters in (RELIES_ON | with_peft).items():
        owner, _, name = path.rpartition(".")
        try:
            found = vars(resolve_name(owner))[name]
        except (ImportError, AttributeError, KeyError) as error:
            raise ValueError(f"this trl {KNOWN} has no {path}, which fastpost relies on: {remedy}") from error
        if parameters is not None and (got := tuple(inspect.signature(found).parameters)) != parameters:
            raise ValueError(
                f"this trl {KNOWN} has another {path} than fastpost relies on: it takes {', '.join(got)}, "
                f"and should take {', '.join(parameters)}: {remedy}"
            )


def _changes() -> list[Change]:
    changes = [_change(module, "add_fused_lm_head", lambda _: add_fused_lm_head) for module in HEADS]
    if importlib.util.find_spec("peft"):
        changes += [_change(module, ADAPTER, lambda _: NoLayer) for module in REFUSING]
    for trainer, (name, method) in METHODS.items():
        changes.append(_change(trainer, "__init__", functools.partial(_building, resolve_name(trainer), name, method)))
    return changes


def _change(owner: str, name: str, after: Callable[[Any], Any]) -> Change:
    found = resolve_name(owner)
    before = vars(found)[name]
    return Change(found, name, before, after(before))


def _building(owner: type, name: str, method: Callable[..., Any], before: Callable[..., None]) -> Callable[..., None]:
    """An __init__ after which the trainer has our method, unless a subclass has one of its own."""
    theirs = vars(owner)[name]

    @functools.wraps(before, assigned=("__name__", "__doc__"))
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        if getattr(type(self), name) is not theirs or getattr(self, "is_encoder_decoder", False):
            return
        lm = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        add_fused_lm_head(lm, outputs=("log_probs", "mean_logits"))
        setattr(self, name, MethodType(method, self))

    return __init__


def patch() -> Patch:
    """Has TRL's trainers built from now on compute on fastpost's head, until the handle is restored.

    Use it as a context manager, or keep the handle and call `restore()`. Patching twice changes nothing more, and only
    the first handle restores. Raises ValueError, and changes nothing, for a TRL that is not the known one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        _check()
    changes = tuple(change for change in _changes() if getattr(change.before, "__module__", None) != __name__)
    for change in changes:
        setattr(change.owner, change.name, change.after)
    return Patch(changes)
