"""What a head's DTensor stands for. FSDP2 and tensor parallelism both leave `lm_head.weight` as Shard(0) of a mesh and
mean opposite things by it:

  own tokens   (FSDP2, HSDP) every rank has tokens of its own: the rows are gathered, and the gradient is averaged over
               the ranks and scattered, as FSDP2 does by default
  same tokens  (tensor parallel) the ranks work on the same ones: each keeps its rows, and together they are a
               fastpost.types.Shard; what is replicated is the same everywhere, and so is its gradient

Which of the two, the names of the mesh's dimensions say; they are those of torch, torchtitan, transformers and
Accelerate. While FSDP2 has a module unsharded, its parameters are plain tensors and FSDP2 sees to their gradients; what
is gathered here has the dtype in which the parameter is kept, not that of a MixedPrecisionPolicy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fastpost.types import Shard

SAME_TOKENS = ("tp",)
OWN_TOKENS = ("dp", "ddp", "fsdp", "dp_replicate", "dp_shard", "dp_shard_cp", "dp_cp", "cp", "replicate", "shard")


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor; without importing that where there can be none."""
    return type(x).__name__ == "DTensor"


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Those of its modules that FSDP2 has wrapped, outer ones first."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole(x: Tensor) -> Tensor:
    """All of x, in every process."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import DTensor

    assert isinstance(x, DTensor)
    return x.full_tensor()


def copied(x: Tensor, first: bool) -> Tensor:
    """A copy of x; of what is sharded all of it, on the host of the first process, and in the others nothing."""
    found = whole(x.detach())
    if not is_sharded(x):
        return found.clone()
    return found.cpu() if first else found.new_empty(0)


def sharded_like(x: Tensor, model: Tensor) -> Tensor:
    """All of x, which every process has, as `model` is sharded; a number stays as it is."""
    if not is_sharded(model) or x.ndim == 0:
        return x
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)
    return distribute_tensor(x.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


@dataclass(frozen=True)
class Reader:
    """Makes plain tensors of a model's parameters."""

    model: nn.Module
    same_tokens: bool | None  # of every mesh; None: as its names say

    def plain(self, x: Tensor) -> Tensor:
        """All of x, or this rank's rows of it; differentiable."""
        if not is_sharded(x):
            return x
        from torch.distributed.tensor import DTensor, Partial, Replicate

        assert isinstance(x, DTensor)
        same = self._same_tokens(x)
        kept = [placement if shared else Replicate() for placement, shared in zip(x.placements, same, strict=True)]
        of_gradient = [placement if shared else Partial("avg") for placement, shared in zip(kept, same, strict=True)]
        return x.redistribute(placements=kept).to_local(grad_placements=of_gradient)

    def shard(self, weight: Tensor) -> Shard | None:
        """The vocabulary of which `plain(weight)` has some rows; None if it has all."""
        if not is_sharded(weight):
            return None
        from torch.distributed.tensor import DTensor

        assert isinstance(weight, DTensor)
        pieces = zip(weight.placements, self._same_tokens(weight), strict=True)
        over = [dim for dim, (placement, shared) in enumerate(pieces) if shared and not placement.is_replicate()]
        if not over:
            return None
        if len(over) > 1 or not weight.placements[over[0]].is_shard(0):
            raise ValueError(
                f"the head's weight is sharded over {_mesh(weight)} as {weight.placements}: Head.of takes rows of the "
                "vocabulary, Shard(0), over one dimension of ranks that have the same tokens"
            )
        return Shard(_rows(len(weight), weight.device_mesh.size(over[0])), weight.device_mesh.get_group(over[0]))

    def _same_tokens(self, x) -> list[bool]:
        """For each dimension of the mesh, whether its ranks have the same tokens."""
        mesh = x.device_mesh
        if self.same_tokens is not None:
            return [self.same_tokens] * mesh.ndim
        if mesh.mesh_dim_names is None and fsdp_modules(self.model):
            return [False] * mesh.ndim
        names = mesh.mesh_dim_names or ()
        if not names or any(name not in SAME_TOKENS + OWN_TOKENS for name in names):
            raise ValueError(
                f"the head's weight is a DTensor over {_mesh(x)}, and it is not known whether those ranks have the "
                "same tokens: pass same_tokens=True for tensor parallelism, False for FSDP"
            )
        return [name in SAME_TOKENS for name in names]


def _mesh(x) -> str:
    names = x.device_mesh.mesh_dim_names
    return f"a mesh of {tuple(x.device_mesh.shape)} ranks " + (f"named {names}" if names else "without names")


def _rows(vocabulary: int, ranks: int) -> tuple[int, ...]:
    """How many rows each rank has: the first ones as many as the first, as torch.chunk cuts."""
    each = -(-vocabulary // ranks)
    return tuple(max(0, min(each, vocabulary - each * rank)) for rank in range(ranks))
