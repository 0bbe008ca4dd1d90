"""AdamW (arXiv:1711.05101) by transformers' names, and its state as tensors and back.

adamw_torch                      torch's, one fused kernel, on a CPU too: 8 times the speed there, and no temporaries
adamw_8bit, adamw_bnb_8bit       bitsandbytes': moments in 8 bits, an absmax to every 256 (arXiv:2110.02861)
paged_adamw_8bit, _32bit         the same, and fp32, in memory that the driver moves to the host when the GPU is full
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.models.sharded import copied, is_sharded, sharded_like
from fastpost.trainers.config import Training
from fastpost.trainers.log import say
from fastpost.trainers.zero import Zero
from fastpost.trainers.zero3 import full_numel, full_shape

BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}
MOMENTS = {"exp_avg", "exp_avg_sq", "state1", "state2"}


def adamw(
    parameters: Sequence[nn.Parameter], config: Training, faster: Mapping[nn.Parameter, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW over these; vectors, which are norms and biases, do not decay. `faster` multiplies the rate of some."""
    groups = [
        {"params": some, "weight_decay": config.weight_decay * decays, "faster": times}
        for times, of_rate in _by_rate(parameters, faster or {}).items()
        for decays in (True, False)
        if (some := [p for p in of_rate if (p.ndim >= 2) == decays])
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    on_gpu = bool(parameters) and parameters[0].is_cuda
    if config.optim != "adamw_torch" and any(is_sharded(p) for p in parameters):
        raise ValueError(f"optim {config.optim} does not know sharded parameters: under FSDP2 give adamw_torch")
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(groups, config.learning_rate, betas, config.adam_epsilon, fused=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"optim {config.optim} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    import bitsandbytes

    if config.optim.startswith("paged") and not on_gpu:
        say(f"optim {config.optim}: nothing is paged on a CPU")
    cls = getattr(bitsandbytes.optim, BITSANDBYTES[config.optim])
    return cls(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)


def _by_rate(
    parameters: Sequence[nn.Parameter], faster: Mapping[nn.Parameter, float]
) -> dict[float, list[nn.Parameter]]:
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(faster.get(parameter, 1.0), []).append(parameter)
    return found


def state_tensors(optimizer: torch.optim.Optimizer | Zero, first: bool = True) -> dict[str, Tensor]:
    """The moments as `<parameter>.<name>`, none of which shares memory with another; where they are sharded, in the
    first process."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": copied(torch.as_tensor(value), first) for i in state for name, value in _flat(state[i])}


def load_state_tensors(optimizer: torch.optim.Optimizer | Zero, tensors: Mapping[str, Tensor]) -> None:
    """What `state_tensors` gave, into an optimizer of the same kind and parameters, to the bit."""
    torch_own = isinstance(optimizer, torch.optim.AdamW)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    _check_moments(trained, tensors)
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        count = name == "step" and not torch_own  # a plain int there
        state.setdefault(int(index), {})[name] = int(value) if count else sharded_like(value, trained[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if getattr(optimizer, "is_paged", False):
        _page(optimizer)


def _check_moments(trained: Sequence[nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """ValueError for those of other parameters."""
    for key, value in tensors.items():
        index, name = key.split(".")
        if int(index) >= len(trained):
            raise ValueError(
                f"the checkpoint is of another model: it trained tensor {index}, and here {len(trained)} do"
            )
        if name in MOMENTS and value.numel() != full_numel(trained[int(index)]):
            then, now = tuple(value.shape), full_shape(trained[int(index)])
            raise ValueError(f"the checkpoint is of another model: tensor {index} that trains was {then}, and is {now}")


def _flat(state: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """bitsandbytes keeps its quantised moments one level down, away from FSDP."""
    nested = [item for value in state.values() if isinstance(value, Mapping) for item in value.items()]
    return [(name, value) for name, value in state.items() if not isinstance(value, Mapping)] + nested


def _page(optimizer: Any) -> None:
    """bitsandbytes loads the moments of a paged optimizer into plain memory."""
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            paged = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
            state[name] = paged.copy_(state[name])
