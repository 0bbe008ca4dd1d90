"""TRL 1.16's own code: each trainer's `_compute_loss`, on a trainer that was never set up and a model that is a table.

A trainer is made without its __init__ and given only what its loss reads. The model's forward returns TRL's own
`FusedCausalLMOutput`, whose numbers are the case's leaves, padded.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity.settings import Case


class OneProcess:
    """An accelerator with nobody to talk to."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True
    parallelism_config = None

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


class Trained(torch.nn.Module):
    """What a trainer asks of its model beside a forward pass."""

    is_gradient_checkpointing = False


def trainer(module: str, name: str, **attributes: object) -> Any:
    """A trainer with its methods and these attributes, and no set-up."""
    made = object.__new__(getattr(pytest.importorskip(f"trl.{module}"), name))
    shared = {
        "accelerator": OneProcess(),
        "model": Trained(),
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(made).update(shared | attributes)
    return made


def model(logp: Tensor, mask: Tensor, **more: Tensor):  # (B, N) each
    """A forward pass that has already happened."""
    utils = pytest.importorskip("trl.trainer.utils")
    nothing = torch.zeros_like(logp)
    given = {"entropy": nothing, "log_sum_sq_probs": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
    return lambda **_: utils.FusedCausalLMOutput(log_probs=logp, label_mask=mask.bool(), **(given | more))


def tokens(mask: Tensor) -> dict[str, Tensor]:  # (B, N)
    """What a collator makes of the same batch: each completion after a prompt of one token."""
    completion = F.pad(mask, (1, 0)).long()
    return {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
    }


def halves(rows: Tensor) -> Tensor:  # (S, ...) in pairs -> all the chosen, then all the rejected
    return torch.cat([rows[0::2], rows[1::2]])


def sft(loss_type: str, case: Case) -> Tensor:  # scalar: the mean over tokens
    made = trainer(
        "trainer.sft_trainer",
        "SFTTrainer",
        compute_loss_func=None,
        label_smoother=None,
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
    )
    mask = case.mask
    forward = model(case.rows(case.stats.logp), mask)
    return made.compute_loss(forward, {"labels": mask, "attention_mask": mask})


def dpo(
    loss_type: str,
    case: Case,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    rpo_alpha: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
) -> Tensor:  # scalar: the mean over pairs
    mask = halves(case.mask)
    reference = model(halves(case.rows(case.batch.ref_logp)), mask)
    made = trainer(
        "trainer.dpo_trainer",
        "DPOTrainer",
        args=SimpleNamespace(discopop_tau=discopop_tau, gradient_checkpointing_kwargs=None),
        ref_model=reference,
        precompute_ref_logps=False,
        beta=beta,
        label_smoothing=label_smoothing,
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        loss_types=[loss_type, "sft"] if rpo_alpha else [loss_type],
        loss_weights=[1.0, rpo_alpha] if rpo_alpha else [1.0],
    )
    policy = model(
        halves(case.rows(case.stats.logp)), mask, log_sum_sq_probs=halves(case.rows(case.stats.log_sum_sq)).detach()
    )
    return made._compute_loss(policy, tokens(mask), return_outputs=False)


def kto(
    loss_type: str, case: Case, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:  # scalar: the mean over sequences
    """The batch of the baseline is given by its sums: its mean log-ratio is batch.kl."""
    mask = case.mask
    policy, reference = (model(case.rows(x), mask) for x in (case.stats.logp, case.batch.ref_logp))
    made = trainer(
        "trainer.kto_trainer",
        "KTOTrainer",
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ref_model=reference,
        precompute_ref_logps=False,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    ahead = torch.tensor([0.5, -0.5, 0.0]) + case.batch.kl
    made._compute_kl_logps = lambda model, batch: ahead if model is policy else torch.zeros(3)
    return made._compute_loss(policy, tokens(mask) | {"label": case.batch.label}, return_outputs=False)


def replayed(case: Case) -> dict[str, Tensor]:
    """A generation batch: no prompt, and completions whose tokens were scored already."""
    S = case.S
    advantage = torch.stack([x[0] for x in case.each(case.batch.advantage)])
    flat = all(bool((x == x[0]).all()) for x in case.each(case.batch.advantage))
    old = case.batch.old_logp
    return {
        "prompt_ids": torch.zeros(S, 0, dtype=torch.long),
        "prompt_mask": torch.zeros(S, 0, dtype=torch.long),
        "completion_ids": case.mask.long(),
        "completion_mask": case.mask.long(),
        "advantages": advantage if flat else case.rows(case.batch.advantage),
        "old_per_token_logps": None if old is None else case.rows(old),
        "ref_per_token_logps": case.rows(case.batch.ref_logp),
        "num_items_in_batch": case.mask.sum(),
    }


def scored(case: Case):
    """TRL's method that runs the model, after it ran."""
    answer = case.rows(case.stats.logp), case.rows(case.stats.entropy), None
    return lambda *_, **__: answer


def grpo(
    loss_type: str,
    case: Case,
    *,
    level: str = "token",
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,  # TRL's own default is True
    entropy_coef: float = 0.0,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    max_completion_length: int = 16,
) -> Tensor:  # scalar, reduced as the loss type says
    of_grpo = "trainer.grpo_trainer", "GRPOTrainer"
    made = trainer(
        *(("experimental.gmpo.gmpo_trainer", "GMPOTrainer") if loss_type == "gmpo" else of_grpo),
        args=SimpleNamespace(
            use_bias_correction_kl=use_bias_correction_kl,
            delta=delta,
            steps_per_generation=1,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
        ),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=entropy_coef != 0,
        entropy_coef=entropy_coef,
        max_completion_length=max_completion_length,
        _get_per_token_logps_and_entropies=scored(case),
    )
    return made._compute_loss(None, replayed(case))


def rloo(case: Case, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> Tensor:  # scalar: over sequences
    made = trainer(
        "trainer.rloo_trainer",
        "RLOOTrainer",
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        _get_per_token_logps_and_entropies=scored(case),
    )
    old = case.stats.logp.detach() if case.batch.old_logp is None else case.batch.old_logp
    return made._compute_loss(None, replayed(case) | {"old_logps": case.rows(old).sum(1)})


def _two_tokens(logp: Tensor) -> Tensor:  # (B, N) -> (B, N + 2, 2)
    """Logits over the target and everything else, for TRL's code that wants logits: the last position and the prompt's
    own predict nothing of ours."""
    first = torch.full_like(logp[:, :1], -1.0)
    logp = torch.cat([first, logp, first], 1)
    return torch.stack([logp, torch.log(-torch.expm1(logp))], -1)


def _concatenated(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of two prompt tokens and the completion, and the logits that go with it."""
    mask = F.pad(case.mask, (2, 0), value=1.0)
    labels = torch.where(mask == 1, 0, -100)
    labels[:, :2] = -100
    batch = {}
    for side, first in (("chosen", 0), ("rejected", 1)):
        batch |= {
            f"{side}_input_ids": torch.zeros_like(labels[first::2]),
            f"{side}_labels": labels[first::2],
            f"{side}_attention_mask": mask[first::2].long(),
        }
    return batch, _two_tokens(halves(case.rows(case.stats.logp)))


def cpo(
    loss_type: str,
    case: Case,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 0.0,
    simpo_gamma: float = 0.5,
) -> Tensor:  # scalar: the mean over pairs, and over all chosen tokens
    batch, logits = _concatenated(case)
    made = trainer(
        "experimental.cpo.cpo_trainer",
        "CPOTrainer",
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        cpo_alpha=cpo_alpha,
        simpo_gamma=simpo_gamma,
        alpha=0.0,
        is_encoder_decoder=False,
        pad_token_id=0,
    )
    return made.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]


def cpo_sigmoid(case: Case, **knobs: float) -> Tensor:
    return cpo("sigmoid", case, **knobs)


def simpo(case: Case, **knobs: float) -> Tensor:
    return cpo("simpo", case, **knobs)


def orpo(case: Case, *, beta: float = 0.1) -> Tensor:  # scalar: over pairs; over all chosen tokens and their prompts
    batch, logits = _concatenated(case)
    made = trainer(
        "experimental.orpo.orpo_trainer",
        "ORPOTrainer",
        beta=beta,
        is_encoder_decoder=False,
        padding_value=0,
    )
    return made.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]


def orpo_completions(case: Case, *, beta: float = 0.1) -> Tensor:  # scalar, fp32
    """ORPO without the nll of the prompt: TRL's odds, and the mean over all chosen tokens of completions."""
    return odds_ratio(case, beta=beta).mean() - torch.cat(case.each(case.stats.logp)[0::2]).float().mean()


def odds_ratio(case: Case, *, beta: float = 0.1) -> Tensor:  # (S / 2,) fp32, without the nll
    made = trainer("experimental.orpo.orpo_trainer", "ORPOTrainer", beta=beta)
    mean = case.rows(case.stats.logp).sum(1) / case.lengths
    return -made.odds_ratio_loss(mean[0::2], mean[1::2])[0]


def reward(scores: Tensor, margin: Tensor | None, center_rewards_coefficient: float | None) -> Tensor:  # scalar
    made = trainer(
        "trainer.reward_trainer",
        "RewardTrainer",
        args=SimpleNamespace(center_rewards_coefficient=center_rewards_coefficient),
    )
    inputs = {"attention_mask": torch.ones(len(scores), 1)} | ({} if margin is None else {"margin": margin})
    forward = lambda **_: SimpleNamespace(logits=halves(scores)[:, None])  # noqa: E731
    return made.compute_loss(forward, inputs)
