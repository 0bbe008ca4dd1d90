"""TRL's trainers on fastpost's head: the per-token statistics they ask for, never the logits.

    with fastpost.integrations.trl.patch():
        trainer = DPOTrainer(...)
    trainer.train()

SFT, DPO, KTO, GRPO and RLOO ask one function, `add_fused_lm_head`, for a forward that returns log-probabilities; under
the patch that name means `trl_heads.add_fused_lm_head`. Distillation, and the experimental CPO and ORPO, have the head
in a method; under the patch a trainer is given another one when it is built. So what counts is where a trainer is
built: inside the patch it keeps fastpost's head for good, outside it is TRL's own.

An adapter on `lm_head`, which TRL refuses, is trained, where `Head.of` takes it.

Left alone: vLLM, Liger and server paths, the asynchronous trainers, encoder-decoder models. A head sharded by ZeRO-3 is
refused by `Head.of`; one of FSDP2 is gathered, and has not been tried with TRL's trainers. CPO's and ORPO's `logits/*`
are means over the scored positions; TRL's take in padding.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pkgutil import resolve_name
from types import MethodType
from typing import Any

import trl

from fastpost.integrations.trl_heads import (
    FIELDS,
    Asked,
    add_fused_lm_head,
    cpo_forward,
    distillation_loss,
    fuse,
    orpo_forward,
)

KNOWN = "1.16.0"

HEADS = tuple(f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "kto", "grpo", "rloo"))
GRPO = "trl.trainer.grpo_trainer.GRPOTrainer"
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
    **{f"{trainer}.__init__": None for trainer in (GRPO, *METHODS)},
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


def _changes() -> Iterator[Change]:
    """Those that are still to be made: what is fastpost's already stays."""
    replaced: dict[tuple[str, str], Any] = {(module, "add_fused_lm_head"): add_fused_lm_head for module in HEADS}
    if importlib.util.find_spec("peft"):
        replaced |= {(module, ADAPTER): NoLayer for module in REFUSING}
    finish = {trainer: _method_of(resolve_name(trainer), *METHODS[trainer]) for trainer in METHODS}
    for trainer, then in {GRPO: _entropy_of_grpo, **finish}.items():
        replaced[trainer, "__init__"] = _building(resolve_name(trainer).__init__, then)
    for (path, name), after in replaced.items():
        owner = resolve_name(path)
        before = vars(owner)[name]
        if not before.__module__.startswith("fastpost."):
            yield Change(owner, name, before, after)


def _building(before: Callable[..., None], then: Callable[[Any], None]) -> Callable[..., None]:
    """An __init__ that has something to do once the trainer is built."""

    @functools.wraps(before, assigned=("__name__", "__doc__"))
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        then(self)

    return __init__


def _method_of(owner: type, name: str, method: Callable[..., Any]) -> Callable[[Any], None]:
    """Gives a trainer our method, unless a subclass has one of its own."""
    theirs = vars(owner)[name]

    def give(trainer: Any) -> None:
        if getattr(type(trainer), name) is theirs and not getattr(trainer, "is_encoder_decoder", False):
            fuse(_lm(trainer), Asked(outputs=("log_probs", "mean_logits")))
            setattr(trainer, name, MethodType(method, trainer))

    return give


def _entropy_of_grpo(trainer: Any) -> None:
    """The one trainer that may have the entropy in its loss."""
    if trainer._entropy_bonus_enabled:
        fields = ("log_probs", "entropy")
        fuse(_lm(trainer), Asked(trainer.temperature, trainer.args.cast_lm_head_to_fp32, fields, True))


def _lm(trainer: Any) -> Any:
    return trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model


def patch() -> Patch:
    """Has TRL's trainers built from now on compute on fastpost's head, until the handle is restored.

    Use it as a context manager, or keep the handle and call `restore()`. Patching twice changes nothing more, and only
    the first handle restores. Raises ValueError, and changes nothing, for a TRL that is not the known one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        _check()
    changes = tuple(_changes())
    for change in changes:
        setattr(change.owner, change.name, change.after)
    return Patch(changes)
