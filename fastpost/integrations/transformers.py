"""A Hugging Face causal LM that returns its loss and per-token statistics without logits, in Trainer and plain loops.

    with fuse_head(model, outputs=("logp", "entropy")):
        trainer.train()

`forward` of the inner causal LM is replaced on the instance, so whatever calls the model by its wrappers (DDP, FSDP,
PEFT, Accelerate's autocast) still does, and their hooks run. With labels it runs the backbone and then fastpost's head
on the rows that have a label; without labels it is the model's own forward, so generation and logits are unchanged.

The trade-off taken: the end of a forward is computed here, not by the model. So `fuse_head` first runs six tokens both
ways, and refuses a model whose own loss is another one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from fastpost.integrations.forward import FusedOutput, Options, backbone, fused_forward
from fastpost.losses import sft
from fastpost.models.heads import unwrapped
from fastpost.models.sharded import fsdp_modules
from fastpost.types import IGNORE

__all__ = ["FusedHead", "FusedOutput", "fuse_head"]


class Patch:
    """The forward in the place of a model's own: it does what `options` say, or with None what was there before.

    Accelerate may wrap it, and then it cannot be taken out; it stays, passes calls through, and is used again.
    """

    def __init__(self, lm: Any):
        self.before = lm.__dict__.get("forward")
        self.options: Options | None = None
        self.function = _standing_in(self, type(lm).forward)
        lm.forward = MethodType(self.function, lm)

    @staticmethod
    def on(lm: Any) -> Patch:
        """The patch that the model has, if any, and else a new one."""
        forward = lm.__dict__.get("forward")
        while forward is not None and not hasattr(forward, "fastpost_patch"):
            forward = getattr(forward, "__wrapped__", None)
        return Patch(lm) if forward is None else forward.fastpost_patch

    def own(self, lm: Any) -> Callable[..., Any]:
        return type(lm).forward.__get__(lm) if self.before is None else self.before

    def remove(self, lm: Any) -> None:
        self.options = None
        if getattr(lm.__dict__.get("forward"), "__func__", None) is not self.function:
            return
        del lm.forward
        if self.before is not None:
            lm.forward = self.before


class FusedHead:
    """A fused model, until `restore()` or the end of a `with` block."""

    def __init__(self, lm: Any, options: Options):
        self.lm, self._options, self._patch = lm, options, Patch.on(lm)
        self._patch.options = options

    def restore(self) -> None:
        """The model as it was, unless another call of `fuse_head` has replaced this one."""
        if self._patch.options is self._options:
            self._patch.remove(self.lm)

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def _standing_in(patch: Patch, own: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the signature of `own`: Trainer and generate look at it."""
    names = [p.name for p in inspect.signature(own).parameters.values() if p.kind is not p.VAR_KEYWORD][1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if patch.options is None or len(args) > len(names):
            return patch.own(self)(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("labels") is None:
            _refuse_held_back(given)
            return patch.own(self)(*args, **kwargs)
        if "output_router_logits" in names and given.get("output_router_logits") is None:
            given["output_router_logits"] = self.config.output_router_logits
        return_dict = given.pop("return_dict", None)
        output = fused_forward(self, given, patch.options)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    forward.__name__, forward.__doc__ = own.__name__, own.__doc__
    # Not functools.wraps: Accelerate takes its own wrappers off by following __wrapped__ to the end, and us with them.
    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    forward.fastpost_patch = patch  # type: ignore[attr-defined]
    return forward


def _refuse_held_back(given: dict[str, Any]) -> None:
    """Trainer takes the labels out where it will read the logits itself."""
    if given.get("num_items_in_batch") is not None:
        raise ValueError(
            "Trainer kept the labels to itself, to compute a loss from the logits that a fused model does not have: "
            "leave label_smoothing_factor at 0 and pass label_smoothing to fuse_head; in place of compute_loss_func "
            "override Trainer.compute_loss, and build the loss from model(**inputs).logp with differentiable=True"
        )


@contextmanager
def _left_as_it_was(lm: Any, groups: Sequence[Any]) -> Iterator[None]:
    """The model is in evaluation meanwhile. What FSDP2 gathers for that are other parameters than its shards: were they
    left in place, an optimizer made next would train them in vain."""
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for group in groups:
            group.reshard()


@torch.no_grad()
def _check(model: nn.Module, lm: Any, same_tokens: bool | None) -> None:
    """ValueError unless a fused forward gives the model's own loss on six tokens, to the rounding of its logits."""
    if hasattr(lm, "_original_forward") and not hasattr(lm._original_forward, "fastpost_patch"):
        raise ValueError(
            "Accelerate has wrapped the model's forward in its mixed precision, where fuse_head cannot reach: call "
            "fuse_head before accelerator.prepare or trainer.train()"
        )
    embedding = lm.get_input_embeddings().weight
    ids = (torch.arange(6, device=embedding.device) * 7 + 2)[None] % len(embedding)
    labels = ids.masked_fill(torch.arange(6, device=ids.device) < 2, IGNORE)
    groups, patch = fsdp_modules(model), Patch.on(lm)
    whole = next((group for group in groups if lm in group.modules()), lm)  # its hooks gather what lm needs
    patch.options, dtypes = None, []
    hook = lm.get_output_embeddings().register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    with _left_as_it_was(lm, groups):
        try:
            theirs = whole(input_ids=ids, labels=labels)
            patch.options = Options(same_tokens=same_tokens)
            ours = whole(input_ids=ids, labels=labels)
        finally:
            hook.remove()
            patch.remove(lm)
    # What widens them afterwards (Accelerate, FSDP2's output_dtype) does not make them more precise.
    eps = max(torch.finfo(dtype).eps for dtype in (*dtypes, theirs.logits.dtype))
    rounding = (eps + 1e-5) * theirs.logits.abs().max()
    if not (ours.loss - theirs.loss).abs() <= rounding:
        raise ValueError(
            f"{type(lm).__name__} computes its loss otherwise than fuse_head would: {float(theirs.loss):.6g} for six "
            f"tokens, not {float(ours.loss):.6g}; fastpost does not know this architecture, or this loss_function"
        )


def _causal_lm(model: nn.Module) -> Any:
    """The Hugging Face causal LM inside DDP, FSDP, torch.compile and PEFT."""
    if isinstance(model, nn.DataParallel):
        raise ValueError("fuse_head takes one process a device: nn.DataParallel copies a model's forward with its self")
    model = unwrapped(model)
    lm: Any = getattr(model, "_orig_mod", model)
    lm = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    if not hasattr(lm, "get_output_embeddings") or lm.get_output_embeddings() is None:
        raise ValueError(f"fuse_head takes a Hugging Face causal LM, got {type(lm).__name__}")
    if lm.config.is_encoder_decoder or backbone(lm) is lm:
        raise ValueError(f"fuse_head takes a decoder with a language-model head, got {type(lm).__name__}")
    return lm


def fuse_head(
    model: nn.Module,
    *,
    outputs: Sequence[str] = ("logp",),
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    differentiable: bool = False,
    same_tokens: bool | None = None,
) -> FusedHead:
    """Makes a causal LM, wrapped by PEFT, DDP, FSDP2 or torch.compile or not, compute its loss without logits.

    Until the handle's `restore()`, or the end of a `with` block, `model(input_ids, ..., labels=labels)` returns a
    FusedOutput: the loss, `logits` None, and a field for each of `outputs`. Without labels nothing is different.

    loss: the sum over tokens that have a label, divided by num_items_in_batch (which Trainer passes: the whole
    accumulation window) or else by their number. With no such token it is 0, still connected to the parameters (the
    model's own is nan). The loss of a mixture's routers is added as the model itself adds it. `shift_labels` is taken
    as it is.
    outputs: any statistic of `fastpost.token_stats` that needs no reference.
    temperature: divides the logits of the loss and of the statistics.
    label_smoothing: in place of TrainingArguments.label_smoothing_factor, with which Trainer wants logits.
    differentiable: False: only the loss is, and costs 3 products of the head (2 if its weight is frozen). True: so are
    the statistics, for a loss of your own from `model(...).logp`, for 4 (3; 2 where logp is all that is asked).
    same_tokens: as in `Head.of`: whether the ranks that share a sharded head have the same tokens; None: as the names
    of its mesh say.

    A second call replaces the first. In Trainer's evaluation the outputs other than the loss, per-token statistics,
    stand where `compute_metrics` finds predictions; `prediction_loss_only=True` drops them. ValueError for a head that
    `Head.of` refuses, and for a model whose own loss is not this one.
    """
    names = (outputs,) if isinstance(outputs, str) else tuple(dict.fromkeys(outputs))
    options = Options(names, float(temperature), differentiable, sft.bind(label_smoothing=label_smoothing), same_tokens)
    lm = _causal_lm(model)
    _check(model, lm, same_tokens)
    return FusedHead(lm, options)
