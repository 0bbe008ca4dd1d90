"""liger-kernel's norms, rotary embedding and MLP in the trunk of one model. Its losses stay out: the head is ours.

liger binds another forward to each norm and MLP of the model. Beside that it puts its classes in the place of those of
transformers' module, for models to come, which is undone here; its rotary embedding has no other place.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from torch import nn

from fastpost.models.trunk import causal_lm


def apply_liger(model: nn.Module) -> None:
    """Kernels of liger in a causal LM, wrapped by PEFT or not; ValueError where they would not run."""
    if not torch.cuda.is_available():
        raise ValueError("use_liger_kernel puts Triton kernels into the model, which run on a GPU, and here is none")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("use_liger_kernel needs liger-kernel, which is not installed: pip install liger-kernel")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    lm = causal_lm(model)
    modeling = sys.modules[type(lm).__module__]
    classes = {name: value for name, value in vars(modeling).items() if isinstance(value, type)}
    before = _with_own_forward(lm)
    _apply_liger_kernel_to_instance(lm, cross_entropy=False, fused_linear_cross_entropy=False)
    vars(modeling).update(classes)
    if _with_own_forward(lm) == before:
        raise ValueError(f"use_liger_kernel: liger-kernel has none for the model type {lm.config.model_type!r}")


def _with_own_forward(lm: nn.Module) -> set[str]:
    return {name for name, module in lm.named_modules() if "forward" in vars(module)}
