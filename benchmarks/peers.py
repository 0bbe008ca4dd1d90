"""Who is measured: one small function per way of computing a case, and the settings it runs at.

A function takes the case and the inputs, and returns per-token statistics as autograd tensors, or the loss itself where
that is all that its library makes; `run` completes either to the loss and its gradients. A library is imported when
first run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from cases import CASES, JSD_BETA, Case, Inputs
from counted import Cost
from expected import expected
from torch import Tensor
from truth import Outcome, statistics

import fastpost as fp


@dataclass(frozen=True)
class Found:
    stats: fp.Stats = field(default_factory=fp.Stats)
    loss: Tensor | None = None  # None: the case's own loss of the statistics
    ref_logp: Tensor | None = None  # (T,), where the case scores the reference


Function = Callable[[Case, Inputs], Found]


@dataclass(frozen=True)
class Peer:
    name: str
    settings: str
    runs: Mapping[str, Function]  # by the name of the case
    package: str = "torch"  # as it is distributed
    module: str = "torch"  # as it is imported
    needs_cuda: bool = False
    ours: bool = False
    expected: Callable[[Case, Inputs], Cost] | None = None  # what it should cost, if that is known

    def absent(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a broken installation is as absent as none
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return "needs CUDA" if self.needs_cuda and device.type != "cuda" else None


def run(case: Case, function: Function, x: Inputs) -> Outcome:
    """Forward and backward of a case."""
    found = function(case, x)
    batch = x.batch if found.ref_logp is None else replace(x.batch, ref_logp=found.ref_logp)
    loss = case.value(found.stats, batch) if found.loss is None else found.loss
    dhidden, *dweight = torch.autograd.grad(loss, x.leaves)
    return Outcome(found.stats, loss, dhidden, dweight[0] if dweight else None)


# ---- fastpost and torch ----


def fastpost_stats(case: Case, x: Inputs) -> Found:
    reference = (x.hidden_q, x.weight_q) if case.compares else None
    return Found(fp.token_stats(x.hidden, x.weight, x.batch.target, outputs=case.loss.reads, reference=reference))


def fastpost_loss(case: Case, x: Inputs) -> Found:
    batch, reference = x.batch, (x.hidden_q, x.weight_q) if case.compares else None
    if case.scores_reference:
        batch = replace(batch, ref_logp=fp.linear_logprobs(x.hidden_q, x.weight_q, batch.target))
    settings = {"reference": reference, "jsd_beta": JSD_BETA, "return_stats": True}
    value, stats = fp.fused_loss(case.loss, x.hidden, x.weight, batch, **settings)
    return Found(stats, value)


def naive(case: Case, x: Inputs) -> Found:
    target, logits_q, ref_logp = x.batch.target, None, None
    if case.compares:
        logits_q = F.linear(x.hidden_q, x.weight_q).float()
    if case.scores_reference:
        ref_logp = statistics(F.linear(x.hidden_q, x.weight_q).float(), target, ("logp",)).logp
    return Found(statistics(F.linear(x.hidden, x.weight).float(), target, case.loss.reads, logits_q), None, ref_logp)


def torch_logp(case: Case, x: Inputs, chunked: bool) -> Found:
    options = torch_options(x) if chunked else None
    nll = F.linear_cross_entropy(x.hidden, x.weight, x.batch.target, reduction="none", options=options)
    return Found(fp.Stats(logp=-nll))


def torch_sft(case: Case, x: Inputs, chunked: bool) -> Found:
    options = torch_options(x) if chunked else None
    return Found(loss=F.linear_cross_entropy(x.hidden, x.weight, x.batch.target, options=options))


def torch_options(x: Inputs) -> torch.nn.LinearCrossEntropyOptions:
    """On a CPU the automatic chunk is a few rows, each widening the whole weight: 10 times slower."""
    return torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if x.hidden.is_cuda else 256)


def torch_runs(chunked: bool) -> dict[str, Function]:
    logp, sft = partial(torch_logp, chunked=chunked), partial(torch_sft, chunked=chunked)
    return {"logp": logp, "sft": sft, "grpo": logp}


# ---- TRL ----


def trl_logp(case: Case, x: Inputs) -> Found:
    logp, entropy = _trl_chunked(x.hidden, x.weight, x.batch.target, tuple({"entropy"} & {*case.loss.reads}))
    ref_logp = _trl_chunked(x.hidden_q, x.weight_q, x.batch.target)[0] if case.scores_reference else None
    return Found(fp.Stats(logp=logp, entropy=entropy), None, ref_logp)


def _trl_chunked(hidden: Tensor, weight: Tensor, target: Tensor, outputs: tuple[str, ...] = ()) -> tuple[Tensor, ...]:
    from trl.kernels import ChunkedLogProbFunction

    temperature, columns, softcap, scale = 1.0, 32768, None, 1.0  # the columns of its trainers
    return ChunkedLogProbFunction.apply(hidden, weight, None, target, temperature, columns, softcap, scale, outputs)[:2]


def trl_divergence(case: Case, x: Inputs) -> Found:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    (name,) = {*case.loss.reads} - {"logp"}
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": JSD_BETA}[name]
    found, _ = ChunkedDivergenceFunction.apply(x.hidden, x.weight, None, x.hidden_q, x.weight_q, None, beta)
    logp = trl_logp(case, x).stats.logp if "logp" in case.loss.reads else None
    return Found(fp.Stats(logp=logp, **{name: found}))


# ---- Liger ----


def liger_logp(case: Case, x: Inputs) -> Found:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    logp = LigerFusedLinearPPOBase.chunk_forward(x.hidden[None], x.weight, x.batch.target[None])
    return Found(fp.Stats(logp=logp[0]))


def liger_policy(case: Case, x: Inputs, loss_type: str = "bnpo", level: str = "token") -> Found:
    """All sequences in a chunk: within it tokens and vocabulary are chunked again."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    S, knobs = x.batch.lengths.numel(), case.loss.bind().knobs
    high = knobs["epsilon_high"] or knobs["epsilon"]
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        epsilon_low=knobs.get("epsilon", high),
        epsilon_high=high,
        loss_type=loss_type,
        importance_sampling_level=level,
        chunk_size=S,
        use_ref_model=False,
        compiled=x.hidden.is_cuda,
    )
    hidden, target, old_logp, advantage = (
        t.view(S, -1, *t.shape[1:]) for t in (x.hidden, x.batch.target, x.batch.old_logp, x.batch.advantage)
    )
    mask = torch.ones_like(target)
    value, _ = loss(hidden, x.weight, target, mask, advantage[:, 0], old_per_token_logps=old_logp)
    return Found(loss=value)


def liger_sft(case: Case, x: Inputs) -> Found:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    settings = {"accum_dtype": torch.float32, "chunk_mem_const": 16}
    return Found(loss=liger_fused_linear_cross_entropy(x.hidden, x.weight, x.batch.target, **settings))


def liger_scaled(case: Case, x: Inputs) -> Found:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    entropy = "entropy" in case.loss.reads
    found = Scaled.apply(x.hidden, x.weight, x.batch.target, return_entropy=entropy)
    nll, h = found if entropy else (found, None)
    return Found(fp.Stats(logp=-nll, entropy=h))


# ---- cut-cross-entropy, quack, verl ----


def cce_logp(case: Case, x: Inputs) -> Found:
    from cut_cross_entropy import linear_cross_entropy

    return Found(fp.Stats(logp=-linear_cross_entropy(x.hidden, x.weight, x.batch.target, reduction="none")))


def cce_sft(case: Case, x: Inputs) -> Found:
    from cut_cross_entropy import linear_cross_entropy

    return Found(loss=linear_cross_entropy(x.hidden, x.weight, x.batch.target))


def quack_sft(case: Case, x: Inputs) -> Found:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return Found(loss=chunked_linear_cross_entropy(x.hidden, x.weight, x.batch.target, chunk_size=4096))


def quack_logp(case: Case, x: Inputs) -> Found:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    settings = {"bias": None, "reduction": "none", "inplace_backward": True}
    return Found(fp.Stats(logp=-linear_cross_entropy_func(x.hidden, x.weight, target=x.batch.target, **settings)))


def verl_logp(case: Case, x: Inputs) -> Found:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logp, h = linear_cross_entropy(x.hidden, x.weight, x.batch.target, 1.0, "none")
    return Found(fp.Stats(logp=logp, entropy=h if "entropy" in case.loss.reads else None))


PEERS = (
    Peer(
        "fastpost token_stats",
        "defaults",
        dict.fromkeys(("logp", "logp + entropy", "logp + reverse_kl"), fastpost_stats),
        package="fastpost",
        module="fastpost",
        ours=True,
        expected=partial(expected, fused=False),
    ),
    Peer(
        "fastpost fused_loss",
        "defaults",
        {case.name: fastpost_loss for case in CASES if case.name != "logp"},
        package="fastpost",
        module="fastpost",
        ours=True,
        expected=partial(expected, fused=True),
    ),
    Peer(
        "naive torch",
        "logits in the inputs' dtype, then fp32",
        {case.name: naive for case in CASES},
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
        dict.fromkeys(("logp", "sft", "grpo", "logp + entropy"), trl_logp) | {"logp + reverse_kl": trl_divergence},
        package="trl",
        module="trl.kernels",
    ),
    Peer(
        "Liger chunked_loss",
        "chunk_forward; GRPO: bnpo, all sequences in a chunk, compiled on CUDA",
        {"logp": liger_logp, "grpo": liger_policy},
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
        dict.fromkeys(("logp", "sft", "grpo", "logp + entropy"), liger_scaled),
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
        "chunk_size=4096, tuned; per token: the logits, and its cross entropy overwriting them",
        {"sft": quack_sft, "logp": quack_logp, "grpo": quack_logp},
        package="quack-kernels",
        module="quack.linear_cross_entropy",
        needs_cuda=True,
    ),
    Peer(
        "verl",
        "Triton kernel, reduction='none'",
        dict.fromkeys(("logp", "sft", "grpo", "logp + entropy"), verl_logp),
        package="verl",
        module="verl.utils.kernel.linear_cross_entropy",
        needs_cuda=True,
    ),
)
