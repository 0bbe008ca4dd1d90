"""DeepSpeed's ZeRO (arXiv:1910.02054): each process has a part of the moments, from stage 2 on of the gradients, in
stage 3 of the weights (`fastpost.trainers.zero3`). `accelerate launch --use_deepspeed` says by the environment and a
file how.

Its engine sees to gradients as they come, and then clips, steps and spreads the new weights in one call. So here it is
what a pass goes through, and an optimizer whose state is whole: checkpoints are those of any other engine. Stage 0 is
DDP by another name, and taken for it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastpost.trainers import zero3
from fastpost.trainers.config import Training
from fastpost.trainers.loop import check_norm, set_rate, the_device

T = TypeVar("T")

ON = "ACCELERATE_USE_DEEPSPEED"
OLDEST = "0.19"
STAGES = (0, 1, 2, 3)
MOMENTS = ("exp_avg", "exp_avg_sq")
# What a DeepSpeed config calls fields of the run; and what accelerate writes into one that is silent.
OURS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
UNSAID = ("gradient_accumulation_steps", 1)
# What it may hold that is the run's alone to say, and how the run says it.
REFUSED = {
    "optimizer": "leave optimizer out of the DeepSpeed config: the run's learning_rate and adam_beta1, ... say it",
    "scheduler": "leave scheduler out of the DeepSpeed config: the run's lr_scheduler_type and warmup_steps say it",
    "fp16": "fp16 is not supported: leave it out of the DeepSpeed config, and give the run bf16",
    "bf16": "leave bf16 out of the DeepSpeed config: the run's bf16 computes in it, and keeps fp32 what trains",
}


def stage() -> int:
    """What the processes are to have parts of: 1 of the moments, 2 of gradients too, 3 of weights too; 0: nothing, or
    no DeepSpeed."""
    return _told().get("zero_optimization", {}).get("stage", 0) if _is_on() else 0


def check() -> None:
    """ValueError for what is asked of DeepSpeed and is not to be had."""
    if not _is_on():
        return
    from accelerate.utils import compare_versions

    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("DeepSpeed is asked for and not installed: pip install deepspeed")
    if compare_versions("deepspeed", "<", OLDEST):
        raise ValueError(
            f"DeepSpeed must be {OLDEST} or newer, whose backward passes are torch's: pip install -U deepspeed"
        )
    if stage() not in STAGES:
        raise ValueError(f"ZeRO of stage {stage()} is not known: choose 1, 2 or 3")
    for name, remedy in REFUSED.items():
        said = _told().get(name)
        if said and said.get("enabled", True) is True:
            raise ValueError(remedy)


def _is_on() -> bool:
    return os.environ.get(ON, "false").lower() == "true"


def _told() -> dict[str, Any]:
    """The config of the file, or of the launcher's other words."""
    from accelerate.utils import DeepSpeedPlugin

    return DeepSpeedPlugin().deepspeed_config


class Zero:
    """An engine as an optimizer of `parameters`, in the order of its groups."""

    def __init__(self, door: nn.Module, optimizer: torch.optim.Optimizer, config: Training):
        if config.optim != "adamw_torch":
            raise ValueError(f"optim {config.optim} is not supported under ZeRO: give adamw_torch")
        import deepspeed  # type: ignore[import-not-found]

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.group_of = [i for i, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        told = settings(config)
        if stage() == 3:
            zero3.cut(door, told)
        self.engine, *_ = deepspeed.initialize(model=door, optimizer=optimizer, config=told)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """With the parameters themselves, where DeepSpeed has this process' part of them, end to end."""
        groups = enumerate(self.engine.optimizer.param_groups)
        return [{**group, "params": self._own(g)} for g, group in groups]

    def descend(self, rate: float) -> float:
        """One step on the gradients at hand, clipped; returns their norm before clipping."""
        set_rate(self.engine.optimizer, rate)
        self.engine.step()
        return check_norm(float(self.engine.get_global_grad_norm()))

    def state_dict(self) -> dict[str, Any]:
        """As one process would have it, on the host of the first; all must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state as whole  # type: ignore[import-not-found]

        first = torch.distributed.get_rank() == 0
        self._link()
        state: dict[int, dict[str, Tensor]] = {}
        for i, p in enumerate(self.parameters):
            own = self.engine.optimizer.state.get(self._flat(i))
            if not own:
                continue
            found = {name: whole(p, name) for name in MOMENTS}
            found = {name: x.cpu() if first else x.new_empty(0) for name, x in found.items()}
            state[i] = {"step": own["step"], **found}
        return {"state": state, "param_groups": self.param_groups}

    def load_state_dict(self, given: Mapping[str, Any]) -> None:
        """What `state_dict` gave, or that of torch's AdamW."""
        adamw = self.engine.optimizer.optimizer
        steps = {self._flat(i): float(found["step"]) for i, found in given["state"].items()}
        for flat, step in steps.items():
            empty = {name: torch.zeros_like(flat) for name in MOMENTS}
            adamw.state[flat] = {"step": torch.tensor(step, device=flat.device), **empty}
        self._link()
        for i, found in given["state"].items():
            for name in MOMENTS:
                _set_moment(self.parameters[i], found[name].to(self._flat(i).device), name)

    def _link(self) -> None:
        """Joins parameters to their part of the moments, which up to stage 2 DeepSpeed does for those of the first
        group alone."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state  # type: ignore[import-not-found]

        state = self.engine.optimizer.state
        for g, group in enumerate(self.engine.optimizer.param_groups):
            flat = next(iter(group["params"]), None)  # of stage 3 there is none
            if flat is not None and state.get(flat):
                lazy_init_hp_params_optimizer_state(self._own(g), flat, state)

    def _own(self, group: int) -> list[nn.Parameter]:
        return [p for p, of in zip(self.parameters, self.group_of, strict=True) if of == group]

    def _flat(self, i: int) -> Tensor:
        """Where this process has its part of a parameter, end to end with its parts of others."""
        own, p = self.engine.optimizer, self.parameters[i]
        if not zero3.is_part(p):
            return own.param_groups[self.group_of[i]]["params"][0]
        return own.fp32_partitioned_groups_flat[own.grad_position[own.get_param_id(p)][0]]


def _set_moment(parameter: nn.Parameter, x: Tensor, name: str) -> None:
    """To x, which every process has whole."""
    from deepspeed.utils import (  # type: ignore[import-not-found]
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    if zero3.is_part(parameter):
        safe_set_local_optimizer_state(parameter, zero3.own_part(x, parameter), name)
    else:
        safe_set_full_optimizer_state(parameter, x, name)


def frozen(door: nn.Module) -> Any:
    """An engine for what does not train, whose weights are in parts."""
    import deepspeed  # type: ignore[import-not-found]

    of_weights = dict(_without_auto(_told())["zero_optimization"])
    of_weights.pop("offload_optimizer", None)
    told = {"zero_optimization": of_weights, "train_micro_batch_size_per_gpu": 1}
    zero3.cut(door, told)
    return deepspeed.initialize(model=door, config=told)[0]


def settings(config: Training) -> dict[str, Any]:
    """What DeepSpeed is told: the run's batch and clipping, and beside them whatever the file says. ValueError where
    that says another."""
    told = _without_auto(_told())
    for name, field in OURS.items():
        value = getattr(config, field)
        if (name, told.get(name, value)) not in ((name, value), UNSAID):
            raise ValueError(f"{name} of the DeepSpeed config is {told[name]} and the run's {field} {value}: say auto")
        told[name] = value
    told.pop("train_batch_size", None)
    # The loss is weighed for the whole step, whose end `apart` tells; and offloaded moments are torch's to step.
    return {"zero_force_ds_cpu_optimizer": False} | told | {"gradient_accumulation_steps": 1}


def _without_auto(told: Mapping[str, Any]) -> dict[str, Any]:
    nested = {name: _without_auto(value) if isinstance(value, Mapping) else value for name, value in told.items()}
    return {name: value for name, value in nested.items() if value != "auto"}


def through(engine: Any, work: Callable[[], T]) -> T:
    """What a pass gives, in the precision of the caller: the engine knows autocast by its own config alone, which would
    have gradients sent in bfloat16, too, and turns off what it finds."""
    kind = the_device().type
    inside = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
    with torch.autocast(kind, enabled=False):
        return engine(inside(work))


@contextmanager
def apart(engine: Any) -> Iterator[None]:
    """Gradients of a pass are added up, and the step's do not end with them."""
    engine.set_gradient_accumulation_boundary(False)
    try:
        yield
    finally:
        engine.set_gradient_accumulation_boundary(True)
