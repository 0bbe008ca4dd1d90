"""Each family of losses end to end: `python benchmarks/families.py`. How, is said in contest.py.

From hidden states, a head and a batch to the loss and its gradients, on the same tensors for all: SFT, preferences,
policy optimisation, distillation. Sequences have one length and no token is ignored, which spares the libraries that
pad or mask their useless work. DPO and KTO compute the reference's log-probabilities in the run. Libraries that take
chosen sequences before rejected ones get them so, gathered from pairs.

TRL's trainers of CPO, ORPO and SimPO hold the logits; of the others its chunked kernels run. Both are completed by the
case's own equation on their log-probabilities, since TRL has its equations in its trainers, not in functions.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from cases import JSD_BETA, Case, Inputs
from contest import Contest, main
from expected import expected
from peers import Found, Peer, fastpost_loss, liger_policy, liger_sft, naive, trl_divergence, trl_logp
from torch import Tensor

import fastpost as fp
from fastpost import losses

PREFERENCES = ("dpo", "kto", "cpo", "simpo", "orpo")
SCORED = ("dpo", "kto")  # against a reference
POLICIES = {  # as Liger calls them
    "grpo": ("bnpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
    "cispo": ("cispo", "token"),
}
DISTILLATIONS = ("forward_kl", "reverse_kl", "gkd")
TRAINED = ("sft", "dpo", "grpo", "gkd")  # one of each family: its others differ by a few operations on T numbers
# Ratios of whole sequences: gspo's own corners are so near 1 that a rounding decides on which side a sequence falls.
LOSSES = {"gspo": losses.gspo.bind(epsilon=0.2)}

CASES = tuple(
    Case(name, LOSSES.get(name, getattr(losses, name)).bind(), trained, scores_reference=name in SCORED)
    for name in ("sft", *PREFERENCES, *POLICIES, *DISTILLATIONS)
    for trained in (False, True)[: 1 + (name in TRAINED)]
)


# ---- TRL ----


def trl_logits(case: Case, x: Inputs) -> Found:
    from trl.trainer.utils import selective_log_softmax

    logits = F.linear(x.hidden, x.weight).float()  # as accelerate hands out a model's half-precision logits
    return Found(fp.Stats(logp=selective_log_softmax(logits, x.batch.target)))


# ---- Liger ----


def chosen_first(x: Inputs, t: Tensor) -> Tensor:  # (T, ...) -> (S, L, ...)
    sequences = t.view(x.batch.lengths.numel(), -1, *t.shape[1:])
    return torch.cat([sequences[0::2], sequences[1::2]])


def liger_preference(case: Case, x: Inputs) -> Found:
    """One pair in a chunk, as by default: more of them hold more logits."""
    from liger_kernel import chunked_loss as liger

    knobs, compiled = dict(case.loss.knobs or {}), x.hidden.is_cuda
    common = {"beta": knobs["beta"], "compiled": compiled}
    loss = {
        "dpo": lambda: liger.LigerFusedLinearDPOLoss(**common),
        "cpo": lambda: liger.LigerFusedLinearCPOLoss(alpha=knobs["cpo_alpha"], **common),
        "simpo": lambda: liger.LigerFusedLinearSimPOLoss(gamma=knobs["simpo_gamma"], compute_nll_loss=False, **common),
        "orpo": lambda: liger.LigerFusedLinearORPOLoss(**common),
    }[case.name]()
    reference = {"ref_input": chosen_first(x, x.hidden_q), "ref_weight": x.weight_q} if case.scores_reference else {}
    value, _ = loss(x.weight, chosen_first(x, x.hidden), chosen_first(x, x.batch.target), **reference)
    return Found(loss=value)


def liger_kto(case: Case, x: Inputs) -> Found:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    loss = LigerFusedLinearKTOLoss(beta=(case.loss.knobs or {})["beta"], use_ref_model=True, compiled=x.hidden.is_cuda)
    S = x.batch.lengths.numel()
    hidden, hidden_q, target = (t.view(S, -1, *t.shape[1:]) for t in (x.hidden, x.hidden_q, x.batch.target))
    options = {"preference_labels": x.batch.label, "ref_input": hidden_q, "ref_weight": x.weight_q, "kl": x.batch.kl}
    value, _ = loss(hidden, x.weight, target, **options)
    return Found(loss=value)


def liger_distillation(case: Case, x: Inputs) -> Found:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0, "reverse_kl": 1, "gkd": JSD_BETA}[case.name]
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=x.hidden.is_cuda)
    return Found(loss=loss(x.hidden, x.weight, x.hidden_q, x.weight_q, x.batch.target))


PEERS = (
    Peer(
        "fastpost",
        "fused_loss; linear_logprobs of the reference",
        {case.name: fastpost_loss for case in CASES},
        package="fastpost",
        module="fastpost",
        ours=True,
        expected=partial(expected, fused=True),
    ),
    Peer("naive torch", "logits in the inputs' dtype, then fp32", {case.name: naive for case in CASES}),
    Peer(
        "TRL",
        "ChunkedLogProbFunction, 32768 columns; CPO, ORPO, SimPO: logits and selective_log_softmax; distillation: "
        "ChunkedDivergenceFunction",
        dict.fromkeys(("sft", *SCORED, *POLICIES), trl_logp)
        | dict.fromkeys(("cpo", "simpo", "orpo"), trl_logits)
        | dict.fromkeys(DISTILLATIONS, trl_divergence),
        package="trl",
        module="trl.kernels",
    ),
    Peer(
        "Liger",
        "chunked_loss: a pair, a sequence, 1024 tokens or all of a policy's in a chunk; compiled on CUDA",
        dict.fromkeys(("dpo", "cpo", "simpo", "orpo"), liger_preference)
        | {"kto": liger_kto}
        | {name: partial(liger_policy, loss_type=kind, level=level) for name, (kind, level) in POLICIES.items()}
        | dict.fromkeys(DISTILLATIONS, liger_distillation),
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
)

FAMILIES = Contest(
    name="families",
    about="Families of losses, end to end",
    cases=CASES,
    peers=PEERS,
    shapes={"cpu": (512, 512, 32768), "cuda": (8192, 4096, 131072)},
    repeats={"cpu": 3, "cuda": 20},
    quick=(64, 128, 4096),
)

if __name__ == "__main__":
    sys.exit(main(FAMILIES))
