"""Of verbs whose policy samples: what each of them learns by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastpost.trainers.config.groups import LOSS, MODEL, ROLLOUT, STEPS
from fastpost.trainers.config.sampled import Sampled
from fastpost.trainers.options import option


@dataclass(frozen=True, kw_only=True)
class Clipped(Sampled):
    """Those that take several steps on the same rollouts, with clipped ratios."""

    share_prompts: bool | None = option(
        None, STEPS, "completions in one microbatch have their common prompt once; default: on a CPU, if attention can"
    )
    epsilon_high: float | None = option(None, LOSS, "and above 1 + epsilon_high; default: epsilon", least=0)
    num_iterations: int = option(
        1, LOSS, "optimizer steps on the same rollouts; files are written between rollouts", above=0
    )

    updates_field: ClassVar[str] = "num_iterations"

    @property
    def updates_per_round(self) -> int:
        return self.num_iterations


@dataclass(frozen=True, kw_only=True)
class Grpo(Clipped):
    """Group-relative policy optimisation on rewards that a function computes. arXiv:2402.03300"""

    num_generations: int = option(8, ROLLOUT, "completions of a prompt, a group", least=2)
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", ROLLOUT, "whose standard deviation divides the advantages"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize", ROLLOUT, "of several rewards; normalize_then_sum is GDPO's"
    )
    dynamic_sampling: bool = option(
        False, ROLLOUT, "sample more prompts in the place of groups without variance (DAPO)"
    )
    max_resamplings: int = option(10, ROLLOUT, "rounds of sampling for a step, with dynamic_sampling", above=0)
    rollout_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = option(
        "none",
        LOSS,
        "weigh by what the trainer's probability is of the sampler's; costs a pass (TRL, with vLLM: sequence_mask)",
    )
    rollout_correction_clip_max: float = option(3.0, LOSS, "largest such weight", above=0)
    top_entropy_quantile: float = option(
        1.0,
        LOSS,
        "learn from this share of tokens, those of most entropy; below 1 it costs a pass",
        above=0,
        most=1,
    )

    beta: float = option(0.0, LOSS, "weight of the KL (k3) to the model as it was; 0: no reference at all", least=0)
    epsilon: float | None = option(
        None,
        LOSS,
        "ratios are clipped below 1 - epsilon; default: the loss's own, grpo 0.2, gspo 3e-4 (TRL: 0.2)",
        least=0,
    )
    delta: float | None = option(None, LOSS, "and never above this, of grpo, dapo, dr_grpo, bnpo by tokens", above=1)
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", LOSS, "of the ratios: token is GRPO's, sequence GSPO's"
    )
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "gmpo", "luspo", "vespo"] = option(
        "dapo", LOSS, "dapo is a mean over a step's tokens, grpo first within completions, dr_grpo by a fixed length"
    )
    entropy_coef: float = option(0.0, LOSS, "of a bonus for entropy", least=0)
    use_bias_correction_kl: bool = option(False, LOSS, "the KL times the ratio: unbiased off policy (TRL's default)")
    sapo_temperature_pos: float = option(1.0, LOSS, "of sapo's gate where the advantage is positive", above=0)
    sapo_temperature_neg: float = option(1.05, LOSS, "and where it is not", above=0)

    rewards_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multi_objective_aggregation == "normalize_then_sum" and (
            self.soft_punish_cache is not None or self.missing_eos_penalty is not None
        ):
            raise ValueError(
                "normalize_then_sum normalises each reward function apart, and soft_punish_cache and "
                "missing_eos_penalty are none: make a function of them, or leave them out"
            )


@dataclass(frozen=True, kw_only=True)
class Rloo(Clipped):
    """REINFORCE with the mean of the others of a group as baseline. arXiv:2402.14740"""

    num_generations: int = option(2, ROLLOUT, "completions of a prompt, a group", least=2)
    normalize_advantages: bool = option(False, ROLLOUT, "to mean 0 and deviation 1 over a step")
    reward_clip_range: tuple[float, ...] | None = option(None, ROLLOUT, "least and largest reward, two numbers")
    beta: float = option(0.05, LOSS, "of the KL (k1, summed over a completion) that is taken from the reward", least=0)
    epsilon: float = option(0.2, LOSS, "ratios of completions are clipped below 1 - epsilon", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = self.reward_clip_range
        if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
            raise ValueError(f"reward_clip_range must be the least and the largest reward, got {bounds}")


@dataclass(frozen=True, kw_only=True)
class Reinforce(Clipped):
    """REINFORCE++: no critic, advantages whitened over the whole step. arXiv:2501.03262"""

    advantage: Literal["reinforce_plus_plus", "reinforce_plus_plus_baseline", "reinforce"] = option(
        "reinforce_plus_plus",
        ROLLOUT,
        "rewards to go, whitened; less the mean of the group, whitened; or rewards as they are",
    )
    gamma: float = option(1.0, ROLLOUT, "discount, a token", least=0, most=1)
    kl_coef: float = option(0.01, LOSS, "of the KL in each token's reward; 0: no reference at all", least=0)
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", LOSS, "of that KL")
    epsilon: float = option(0.2, LOSS, "ratios are clipped below 1 - epsilon", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage == "reinforce_plus_plus_baseline" and self.num_generations < 2:
            raise ValueError("reinforce_plus_plus_baseline compares with a group: num_generations must be at least 2")


@dataclass(frozen=True, kw_only=True)
class Ppo(Sampled):
    """Proximal policy optimisation with a critic: four roles, on one base where adapters train. arXiv:1707.06347"""

    learning_rate: float = option(3e-6, STEPS, "peak of the schedule", least=0)
    value_learning_rate: float | None = option(None, STEPS, "of the value; default: learning_rate", least=0)
    reward: tuple[str, ...] = option(
        (), ROLLOUT, "built-in names or file.py:function; repeatable; beside a reward_model or in its place"
    )
    max_completion_length: int = option(53, ROLLOUT, "tokens, the end-of-sequence token included", above=0)
    temperature: float = option(0.7, ROLLOUT, "of sampling, and of the policy that is trained", above=0)
    reward_model: str | None = option(
        None, MODEL, "directory of a reward model: an adapter of the base, or a model of its own; its score is added"
    )
    value_model: str | None = option(
        None,
        MODEL,
        "directory that the value begins from, 'reward' for the reward model, 'policy' to share the policy's adapter "
        "and pass; default: the reward model, or else the base with a head of zeros",
    )
    ref_model: str | None = option(None, MODEL, "directory of the reference; default: the policy as it was")
    num_ppo_epochs: int = option(4, LOSS, "passes over the same rollouts", above=0)
    num_mini_batches: int = option(1, LOSS, "optimizer steps of such a pass; multiplies the rollouts", above=0)
    kl_coef: float = option(0.05, LOSS, "of the KL to the reference in each token's reward", least=0)
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", LOSS, "of that KL")
    target_kl: float | None = option(
        None, LOSS, "nats a completion; given, kl_coef is adapted to hold the KL there (arXiv:1909.08593)", above=0
    )
    kl_horizon: int = option(10000, LOSS, "completions in which it may adapt, by a factor of about 1.2", above=0)
    gamma: float = option(1.0, LOSS, "discount, a token", least=0, most=1)
    lam: float = option(0.95, LOSS, "of generalised advantage estimation", least=0, most=1)
    whiten_rewards: bool = option(False, LOSS, "divide rewards of tokens by their deviation")
    cliprange: float = option(0.2, LOSS, "ratios are clipped outside 1 - cliprange and 1 + cliprange", above=0, most=1)
    dual_clip: float | None = option(None, LOSS, "bound of the loss of a bad token, in advantages", above=1)
    cliprange_value: float = option(0.2, LOSS, "values are clipped so far from the old ones", above=0)
    vf_coef: float = option(0.1, LOSS, "of the value's loss", least=0)
    entropy_coef: float = option(0.0, LOSS, "of a bonus for entropy", least=0)
    value_warmup_rounds: int = option(0, LOSS, "rounds of rollouts at first from which the value alone learns", least=0)

    rewards_steps: ClassVar[bool] = True
    updates_field: ClassVar[str] = "num_ppo_epochs x num_mini_batches"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_model == "reward" and self.reward_model is None:
            raise ValueError("value_model 'reward' begins from the reward model: give reward_model as well")

    @property
    def updates_per_round(self) -> int:
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def rows_per_round(self) -> int:
        return self.rows_per_step * self.num_mini_batches
