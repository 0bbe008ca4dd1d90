"""Every loss of statistics, with knobs that switch on all it can do: a row here is what a new loss owes the tests.

Each row is checked against float64 on materialised logits, the loss and each gradient, in three dtypes, under each
schedule (`test_schedules.py`).
"""

from __future__ import annotations

from typing import Any

import fastpost as fp
from fastpost import losses

FAMILY = {"ld_alpha": 0.5, "use_weighting": True, "rpo_alpha": 0.3}  # of DPO
PENALTY = {"beta": 0.04, "entropy_coef": 0.01, "use_bias_correction_kl": True}  # of policies

CASES: dict[str, tuple[fp.Loss, dict[str, Any]]] = {
    "sft": (losses.sft, {}),
    "sft, all": (losses.sft, {"label_smoothing": 0.1, "z_loss": 1e-3}),
    "dft": (losses.dft, {}),
    "dpo": (losses.dpo, {"beta": 0.1, "label_smoothing": 0.1}),
    "dpo, all": (losses.dpo, {"f_divergence_type": "js_divergence", **FAMILY}),
    "ipo": (losses.ipo, {"beta": 0.2}),
    "hinge": (losses.hinge, {"beta": 0.1}),
    "robust": (losses.robust, {"label_smoothing": 0.1}),
    "exo": (losses.exo, {"label_smoothing": 0.01}),
    "nca": (losses.nca, {}),
    "bco": (losses.bco, {"delta": 0.2}),
    "sppo": (losses.sppo, {"beta": 0.5}),
    "apo_zero": (losses.apo_zero, {}),
    "apo_down": (losses.apo_down, {}),
    "discopop": (losses.discopop, {"beta": 0.05}),
    "sigmoid_norm": (losses.sigmoid_norm, {"beta": 5.0, "f_divergence_type": "forward_kl"}),
    "aot": (losses.aot, {"label_smoothing": 0.1}),
    "aot_unpaired": (losses.aot_unpaired, {"ld_alpha": 0.5}),
    "cpo": (losses.cpo, {"label_smoothing": 0.1}),
    "simpo": (losses.simpo, {"cpo_alpha": 0.5}),
    "orpo": (losses.orpo, {"beta": 0.5}),
    "kto": (losses.kto, {"desirable_weight": 1.5}),
    "apo_zero_unpaired": (losses.apo_zero_unpaired, {"undesirable_weight": 0.5}),
    "reinforce": (losses.reinforce, {}),
    "ppo": (losses.ppo, {"dual_clip": 3.0}),
    "grpo": (losses.grpo, {"epsilon_high": 0.3, "beta": 0.04}),
    "grpo, all": (losses.grpo, {"delta": 1.5, "kl_estimator": "exact", **PENALTY}),
    "bnpo": (losses.bnpo, {"beta": 0.04, "kl_estimator": "k1"}),
    "dr_grpo": (losses.dr_grpo, {"beta": 0.04, "kl_estimator": "k2"}),
    "dapo": (losses.dapo, {}),
    "cispo": (losses.cispo, {"epsilon_high": 1.1}),
    "sapo": (losses.sapo, {}),
    "gspo": (losses.gspo, {"epsilon": 0.1, "beta": 0.04}),
    "gspo, all": (losses.gspo, {"epsilon": 0.1, "kl_estimator": "exact", **PENALTY}),
    "gspo_token": (losses.gspo_token, {"epsilon": 0.1}),
    "gmpo": (losses.gmpo, {"epsilon": 0.1}),
    "luspo": (losses.luspo, {"epsilon": 0.1, "beta": 0.04}),
    "rloo": (losses.rloo, {"beta": 0.04}),
    "vespo": (losses.vespo, {}),
    "forward_kl": (losses.forward_kl, {}),
    "reverse_kl": (losses.reverse_kl, {}),
    "gkd": (losses.gkd, {}),
    "kd": (losses.kd, {"alpha": 0.3}),
    "kd, hard": (losses.kd, {"alpha": 1.0}),
    "kd, soft": (losses.kd, {"alpha": 0.0}),
}
