"""Of verbs that learn from which of two answers is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastpost.trainers.config.groups import DATA, LOSS, MODEL, STEPS
from fastpost.trainers.config.training import Training
from fastpost.trainers.options import option

PairLoss = Literal[
    "dpo", "ipo", "hinge", "robust", "exo", "nca", "bco", "sppo", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm", "sft",
    "sigmoid", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
]  # fmt: skip  # the catalogue's names, and in the last line TRL's for some of them


@dataclass(frozen=True, kw_only=True)
class Preference(Training):
    """What every verb of preferences is told."""

    max_length: int | None = option(1024, DATA, "tokens of a prompt and its answer; cut at the end", above=1)
    learning_rate: float = option(1e-6, STEPS, "peak of the schedule", least=0)
    disable_dropout: bool = option(True, STEPS, "the model's own is off; adapters have what lora_dropout says")


@dataclass(frozen=True, kw_only=True)
class Pairs(Preference):
    """What every verb of pairs is told."""

    per_device_train_batch_size: int = option(8, STEPS, "pairs of a microbatch", above=0)


@dataclass(frozen=True, kw_only=True)
class Contrasted:
    """Which losses of the DPO family are descended, by their knobs."""

    loss_type: tuple[PairLoss, ...] = option(("dpo",), LOSS, "one, or several to be added up")
    loss_weights: tuple[float, ...] | None = option(None, LOSS, "one for each loss_type; default: 1", least=0)
    beta: float = option(0.1, LOSS, "how near the policy is kept to the reference", above=0)
    label_smoothing: float | None = option(
        None, LOSS, "probability that a label is wrong; below 0.5; default: 0, of exo 0.001", least=0, most=0.5
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = option(
        "reverse_kl", LOSS, "which distance to the reference"
    )
    f_alpha_divergence_coef: float = option(0.5, LOSS, "of alpha_divergence")
    ld_alpha: float | None = option(
        None, LOSS, "weight of the tokens by which an answer is longer than the other; default: 1", least=0, most=1
    )
    discopop_tau: float = option(0.05, LOSS, "temperature of discopop", above=0)
    use_weighting: bool = option(False, LOSS, "weigh pairs by how likely the policy finds them (WPO)")
    rpo_alpha: float = option(0.0, LOSS, "weight of the chosen answer's likelihood beside the loss (RPO)", least=0)

    def check_losses(self) -> None:
        """ValueError unless there is a loss, and a weight for each."""
        if not self.loss_type:
            raise ValueError("loss_type must name at least one loss, dpo say")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights must be one for each of the {len(self.loss_type)} of loss_type, got "
                f"{len(self.loss_weights)}"
            )


@dataclass(frozen=True, kw_only=True)
class Dpo(Pairs, Contrasted):
    """Direct preference optimisation on pairs, against the model as it was; and its kin. arXiv:2305.18290"""

    ref_model: str | None = option(None, MODEL, "directory of another reference; default: the model as it was")
    soft_labels: bool = option(
        False, LOSS, "of dpo: label_smoothing is each pair's own, what its column `probability` leaves of 1"
    )
    reference_free: bool = option(False, LOSS, "a reference that finds all answers equally likely")
    precompute_ref_log_probs: bool = option(
        False, STEPS, "the reference reads every row once, before training, and is gone; default: at each of its steps"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_losses()
        if self.reference_free and (self.ref_model or self.precompute_ref_log_probs):
            raise ValueError("reference_free has no reference: leave out ref_model and precompute_ref_log_probs")
        if self.soft_labels and not {"dpo", "sigmoid"} >= set(self.loss_type) - {"sft"}:
            raise ValueError(f"soft_labels are of loss_type dpo, alone or with sft: got {', '.join(self.loss_type)}")
        if self.soft_labels and self.label_smoothing is not None:
            raise ValueError("soft_labels are a label_smoothing of each pair's own: leave out one of them")


@dataclass(frozen=True, kw_only=True)
class Cpo(Pairs):
    """Contrastive preference optimisation: no reference, but the chosen answer's likelihood. arXiv:2401.08417"""

    beta: float = option(0.1, LOSS, "of the difference of the log-probabilities", above=0)
    label_smoothing: float = option(0.0, LOSS, "probability that a label is wrong; below 0.5", least=0, most=0.5)
    cpo_alpha: float = option(1.0, LOSS, "weight of the chosen answer's negative log-likelihood, a token", least=0)


@dataclass(frozen=True, kw_only=True)
class Simpo(Pairs):
    """SimPO: pairs without a reference, by the log-probability of a token, with a margin. arXiv:2405.14734"""

    beta: float = option(2.0, LOSS, "of the difference of the log-probabilities a token (TRL: 0.1)", above=0)
    simpo_gamma: float = option(1.0, LOSS, "margin that the chosen answer is to have (TRL: 0.5)")
    label_smoothing: float = option(0.0, LOSS, "probability that a label is wrong; below 0.5", least=0, most=0.5)
    cpo_alpha: float = option(0.0, LOSS, "weight of the chosen answer's negative log-likelihood (CPO-SimPO)", least=0)


@dataclass(frozen=True, kw_only=True)
class Orpo(Pairs):
    """ORPO: likelihood of the chosen answer and the odds against the other, without a reference. arXiv:2403.07691"""

    beta: float = option(0.1, LOSS, "weight of the odds ratio, the paper's lambda", least=0)


@dataclass(frozen=True, kw_only=True)
class Kto(Preference):
    """KTO: answers that are desirable or not, without pairs, against the model as it was. arXiv:2402.01306"""

    ref_model: str | None = option(None, MODEL, "directory of another reference; default: the model as it was")
    loss_type: Literal["kto", "apo_zero_unpaired"] = option("kto", LOSS, "apo_zero_unpaired has no KL estimate")
    beta: float = option(0.1, LOSS, "how near the policy is kept to the reference", above=0)
    desirable_weight: float = option(1.0, LOSS, "of desirable answers", least=0)
    undesirable_weight: float = option(1.0, LOSS, "of undesirable ones", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type == "kto" and self.rows_per_step == 1:
            raise ValueError(
                "loss_type kto compares a row with another one of its step, which has 1: make "
                "per_device_train_batch_size or gradient_accumulation_steps 2 or more"
            )


@dataclass(frozen=True, kw_only=True)
class Reward(Pairs):
    """A reward model, a scalar head on the model's trunk, from pairs (Bradley-Terry). arXiv:2204.05862"""

    max_length: int | None = option(
        1024, DATA, "tokens of a prompt and its answer; pairs of which one is longer are left out", above=1
    )
    learning_rate: float = option(1e-4, STEPS, "peak of the schedule", least=0)
    center_rewards_coefficient: float = option(
        0.0, LOSS, "weight of the squared sum of a pair's scores, which keeps them around 0; 0.01 say", least=0
    )
