"""Which of a model's adapters are on: switched, put back, and on again where a checkpointed layer is recomputed.

PEFT's own switches, `set_adapter` and `disable_adapter`, set requires_grad as they go: what an optimizer holds stops
training, and a frozen adapter starts to. This one turns the two fields that PEFT's layers read in their forward, and
nothing else. An adapter that is not on is not computed, so neither is its dropout.

Gradient checkpointing runs a layer again in the backward pass, when the `with` of its forward has long been left. So
each run of a checkpointed layer notes which of its adapters were on, and is repeated under them: `Switch.noted` is the
`context_fn` of torch.utils.checkpoint.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import nn

FIELDS = ("_active_adapter", "_disable_adapters")  # of PEFT's BaseTunerLayer and AuxiliaryTrainingWrapper
State = tuple[Any, bool]  # the values of FIELDS: the names of the active adapters, and whether all of them are off


@dataclass(frozen=True)
class Snapshot:
    """What a switch moves."""

    states: Sequence[State]
    modes: Sequence[bool]  # training or not, of every module; or none, where the mode is left alone


@dataclass(frozen=True, eq=False)
class Switch:
    """The adapters of a model, or of a part of one."""

    modules: Sequence[nn.Module]
    layers: Sequence[Any]  # those of PEFT, each with a choice of adapters
    checkpointable: Sequence[Any]  # those that may be recomputed

    @staticmethod
    def of(model: nn.Module) -> Switch:
        """Of a model that has all its adapters. Without any there is only its mode to switch."""
        modules = list(model.modules())
        layers = [m for m in modules if all(hasattr(m, name) for name in FIELDS)]
        if any(getattr(layer, "merged", False) for layer in layers):
            raise ValueError("an adapter is merged into its base, which then is no base for others: unmerge it first")
        return Switch(modules, layers, [m for m in modules if hasattr(m, "gradient_checkpointing")])

    @property
    def model(self) -> nn.Module:
        return self.modules[0]

    @contextmanager
    def using(self, adapter: str | None, training: bool | None = None) -> Iterator[None]:
        """This adapter alone, or None; in this mode, or as it is. What was before comes back, after an error too."""
        for module in self.checkpointable if self.layers else ():  # checkpointing may have been turned on since
            _note(module)
        modes = [] if training is None else [training] * len(self.modules)
        with self._held(Snapshot([_state(layer, adapter) for layer in self.layers], modes)):
            yield

    def noted(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """What surrounds a function that is checkpointed: its run, which is now, and each repetition of that run."""
        now = Snapshot(self._states(), self._modes())
        return nullcontext(), _Repeatedly(lambda: self._held(now))

    def parameters(self, adapter: str) -> list[nn.Parameter]:
        """The tensors of an adapter."""
        held = [operator.attrgetter(name)(layer) for layer in self.layers for name in layer.adapter_layer_names]
        of_layers = [choice[adapter] for choice in held if adapter in choice]
        return [p for x in of_layers for p in (x.parameters() if isinstance(x, nn.Module) else [x])]

    def _states(self) -> list[State]:
        return [(layer._active_adapter, layer._disable_adapters) for layer in self.layers]

    def _modes(self) -> list[bool]:
        return [module.training for module in self.modules]

    @contextmanager
    def _held(self, wanted: Snapshot) -> Iterator[None]:
        before = Snapshot(self._states(), self._modes() if wanted.modes else [])
        try:
            self._set(wanted)
            yield
        finally:
            self._set(before)

    def _set(self, wanted: Snapshot) -> None:
        """Mostly all is as it should be, and a module is slow to set: so look first."""
        for layer, state in zip(self.layers, wanted.states, strict=True):
            for name, value in zip(FIELDS, state, strict=True):
                if getattr(layer, name) != value:
                    setattr(layer, name, value)
        for module, mode in zip(self.modules, wanted.modes, strict=False):
            if module.training != mode:
                module.training = mode


def _state(layer: Any, adapter: str | None) -> State:
    """A module that is trained whole (`modules_to_save`) must be off where this adapter has no copy of it."""
    known = getattr(layer, "_adapters", (adapter,))
    return (layer._active_adapter, True) if adapter is None or adapter not in known else ([adapter], False)


@dataclass
class _Repeatedly:
    """A context that can be entered again, as a graph that is retained is recomputed again."""

    make: Callable[[], AbstractContextManager]
    entered: list[AbstractContextManager] = field(default_factory=list)

    def __enter__(self) -> None:
        context = self.make()
        context.__enter__()
        self.entered.append(context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self.entered.pop().__exit__(kind, error, trace)


def _note(module: Any) -> None:
    """Has a module that checkpoints note, at each run, what its adapters are."""
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if checkpoint is None or not module.gradient_checkpointing:
        return
    keywords = getattr(checkpoint, "keywords", {})
    given = keywords.get("context_fn")
    if isinstance(getattr(given, "__self__", None), Switch):
        return
    if given is not None or keywords.get("use_reentrant", True):
        raise ValueError(
            "with several adapters gradient checkpointing must be non-reentrant and have no context_fn of its own: "
            f"turn it on with {{'use_reentrant': False}}, got {keywords}"
        )
    module._gradient_checkpointing_func = functools.partial(checkpoint, context_fn=Switch.of(module).noted)
