"""Gradients that have none of their own: the backward pass of the head is not differentiable."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *upstream: Tensor):
        raise RuntimeError("a gradient of the head has none of its own: the head is differentiable once")


def differentiable_once(backward: Callable) -> Callable:
    """A second derivative is refused. torch's once_differentiable takes it for zero where the upstream is constant."""

    @functools.wraps(backward)
    def checked(ctx, *upstream):
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(None if x is None else _Once.apply(x.requires_grad_()) for x in gradients)

    return checked
