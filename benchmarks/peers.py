"""Who is measured: one small function per way of computing a case, and the settings it runs at.

A function takes the inputs and returns per-token statistics as autograd tensors, or the loss itself where that is all
that its library makes; `run` completes either to the loss and its gradients. A library is imported when first run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from cases import CASES, Case, Inputs, Outcome, statistics
from torch import Tensor

import fastpost as fp


@dataclass(frozen=True)
class Found:
    stats: fp.Stats = field(default_factory=fp.Stats)
    loss: Tensor | None = None  # None: the case's own loss of the statistics


Function = Callable[[Inputs], Found]


@dataclass(frozen=True)
class Peer:
    name: str
    settings: str
    runs: Mapping[str, Function]  # by the name of the case
    package: str = "torch"  # as it is distributed
    module: str = "torch"  # as it is imported
    needs_cuda: bool = False
    ours: bool = False

    def absent(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a broken installation is as absent as none
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return "needs CUDA" if self.needs_cuda and device.type != "cuda" else None


def run(case: Case, function: Function, x: Inputs) -> Outcome:
    """Forward and backward of a case."""
    found = function(x)
    loss = case.loss(found.stats, x.batch).mean() if found.loss is None else found.loss
    dhidden, *dweight = torch.autograd.grad(loss, x.leaves)
    return Outcome(found.stats, loss, dhidden, dweight[0] if dweight else None)


# ---- fastpost and torch ----


def fastpost_stats(x: Inputs, outputs: tuple[str, ...]) -> Found:
    reference = (x.hidden_q, x.weight_q) if "reverse_kl" in outputs else None
    return Found(fp.token_stats(x.hidden, x.weight, x.batch.target, outputs=outputs, reference=reference))


def fastpost_loss(x: Inputs, loss: fp.Loss) -> Found:
    reference = (x.hidden_q, x.weight_q) if "reverse_kl" in loss.reads else None
    value, stats = fp.fused_loss(loss, x.hidden, x.weight, x.batch, reference=reference, return_stats=True)
    return Found(stats, value)


def naive(x: Inputs, outputs: tuple[str, ...]) -> Found:
    logits_q = F.linear(x.hidden_q, x.weight_q).float() if "reverse_kl" in outputs else None
    return Found(statistics(F.linear(x.hidden, x.weight).float(), x.batch.target, outputs, logits_q))


def torch_logp(x: Inputs, chunked: bool) -> Found:
    options = torch_options(x) if chunked else None
    nll = F.linear_cross_entropy(x.hidden, x.weight, x.batch.target, reduction="none", options=options)
    return Found(fp.Stats(logp=-nll))


def torch_sft(x: Inputs, chunked: bool) -> Found:
    options = torch_options(x) if chunked else None
    return Found(loss=F.linear_cross_entropy(x.hidden, x.weight, x.batch.target, options=options))


def torch_options(x: Inputs) -> torch.nn.LinearCrossEntropyOptions:
    """On a CPU the automatic chunk is a few rows, each widening the whole weight: 10 times slower."""
    return torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if x.hidden.is_cuda else 256)


def torch_runs(chunked: bool) -> dict[str, Function]:
    logp, sft = partial(torch_logp, chunked=chunked), partial(torch_sft, chunked=chunked)
    return {"logp": logp, "sft": sft, "grpo": logp}


# ---- TRL ----


def trl_logp(x: Inputs, outputs: tuple[str, ...] = ()) -> Found:
    from trl.kernels import ChunkedLogProbFunction

    temperature, columns, softcap, scale = 1.0, 32768, None, 1.0  # the columns of its trainers
    found = ChunkedLogProbFunction.apply(
        x.hidden, x.weight, None, x.batch.target, temperature, columns, softcap, scale, outputs
    )
    return Found(fp.Stats(logp=found[0], entropy=found[1]))


def trl_reverse_kl(x: Inputs) -> Found:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    kl, _ = ChunkedDivergenceFunction.apply(x.hidden, x.weight, None, x.hidden_q, x.weight_q, None, 1.0)
    return Found(fp.Stats(logp=trl_logp(x).stats.logp, reverse_kl=kl))


# ---- Liger ----


def liger_logp(x: Inputs) -> Found:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    logp = LigerFusedLinearPPOBase.chunk_forward(x.hidden[None], x.weight, x.batch.target[None])
    return Found(fp.Stats(logp=logp[0]))


def liger_grpo(x: Inputs) -> Found:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    S, compiled = x.batch.lengths.numel(), x.hidden.is_cuda
    loss = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="bnpo", chunk_size=S, use_ref_model=False, compiled=compiled)
    hidden, target, old_logp, advantage = (
        t.view(S, -1, *t.shape[1:]) for t in (x.hidden, x.batch.target, x.batch.old_logp, x.batch.advantage)
    )
    mask = torch.ones_like(target)
    value, _ = loss(hidden, x.weight, target, mask, advantage[:, 0], old_per_token_logps=old_logp)
    return Found(loss=value)


def liger_sft(x: Inputs) -> Found:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    settings = {"accum_dtype": torch.float32, "chunk_mem_const": 16}
    return Found(loss=liger_fused_linear_cross_entropy(x.hidden, x.weight, x.batch.target, **settings))


def liger_scaled(x: Inputs, entropy: bool) -> Found:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    found = Scaled.apply(x.hidden, x.weight, x.batch.target, return_entropy=entropy)
    nll, h = found if entropy else (found, None)
    return Found(fp.Stats(logp=-nll, entropy=h))


# ---- cut-cross-entropy, quack, verl ----


def cce_logp(x: Inputs) -> Found:
    from cut_cross_entropy import linear_cross_entropy

    return Found(fp.Stats(logp=-linear_cross_entropy(x.hidden, x.weight, x.batch.target, reduction="none")))


def cce_sft(x: Inputs) -> Found:
    from cut_cross_entropy import linear_cross_entropy

    return Found(loss=linear_cross_entropy(x.hidden, x.weight, x.batch.target))


def quack_sft(x: Inputs) -> Found:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return Found(loss=chunked_linear_cross_entropy(x.hidden, x.weight, x.batch.target, chunk_size=4096))


def verl_logp(x: Inputs, entropy: bool) -> Found:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logp, h = linear_cross_entropy(x.hidden, x.weight, x.batch.target, 1.0, "none")
    return Found(fp.Stats(logp=logp, entropy=h if entropy else None))


PEERS = (
    Peer(
        "fastpost token_stats",
        "defaults",
        {
            "logp": partial(fastpost_stats, outputs=("logp",)),
            "logp + entropy": partial(fastpost_stats, outputs=("logp", "entropy")),
            "logp + reverse_kl": partial(fastpost_stats, outputs=("logp", "reverse_kl")),
        },
        package="fastpost",
        module="fastpost",
        ours=True,
    ),
    Peer(
        "fastpost fused_loss",
        "defaults",
        {case.name: partial(fastpost_loss, loss=case.loss) for case in CASES if case.name != "logp"},
        package="fastpost",
        module="fastpost",
        ours=True,
    ),
    Peer(
        "naive torch",
        "logits in the inputs' dtype, then fp32",
        {case.name: partial(naive, outputs=case.loss.reads) for case in CASES},
    ),
    Peer("torch linear_cross_entropy", "options=None", torch_runs(chunked=False)),
    Peer(
        "torch linear_cross_entropy, chunked",
        "LinearCrossEntropyOptions(), on a CPU with batch_chunk_size=256",
        torch_runs(chunked=True),
    ),
    Peer(
        "TRL",
        "ChunkedLogProbFunction, 32768 columns; for the KL, ChunkedDivergenceFunction beside it",
        {
            **dict.fromkeys(("logp", "sft", "grpo"), trl_logp),
            "logp + entropy": partial(trl_logp, outputs=("entropy",)),
            "logp + reverse_kl": trl_reverse_kl,
        },
        package="trl",
        module="trl.kernels",
    ),
    Peer(
        "Liger chunked_loss",
        "chunk_forward; GRPO: bnpo, all sequences in a chunk, compiled on CUDA",
        {"logp": liger_logp, "grpo": liger_grpo},
        package="liger-kernel",
        module="liger_kernel.chunked_loss",
    ),
    Peer(
        "Liger fused linear cross entropy",
        "accum_dtype=float32, chunk_mem_const=16",
        {"sft": liger_sft},
        package="liger-kernel",
        module="liger_kernel.transformers.functional",
        needs_cuda=True,
    ),
    Peer(
        "Liger fused scaled cross entropy",
        "the sm90 kernel on Hopper, else its torch fallback",
        {
            **dict.fromkeys(("logp", "grpo"), partial(liger_scaled, entropy=False)),
            "logp + entropy": partial(liger_scaled, entropy=True),
        },
        package="liger-kernel",
        module="liger_kernel.ops.fused_linear_scaled_cross_entropy",
    ),
    Peer(
        "cut-cross-entropy",
        "defaults: gradients filtered at eps / 32",
        {"logp": cce_logp, "grpo": cce_logp, "sft": cce_sft},
        package="cut-cross-entropy",
        module="cut_cross_entropy",
        needs_cuda=True,
    ),
    Peer(
        "quack",
        "chunk_size=4096, tuned",
        {"sft": quack_sft},
        package="quack-kernels",
        module="quack.linear_cross_entropy",
        needs_cuda=True,
    ),
    Peer(
        "verl",
        "Triton kernel, reduction='none'",
        {
            **dict.fromkeys(("logp", "grpo"), partial(verl_logp, entropy=False)),
            "logp + entropy": partial(verl_logp, entropy=True),
        },
        package="verl",
        module="verl.utils.kernel.linear_cross_entropy",
        needs_cuda=True,
    ),
)
