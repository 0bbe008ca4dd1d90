"""The policy family against TRL's GRPO, RLOO and GMPO trainers, Liger's GRPO, and the papers."""

from __future__ import annotations

from functools import partial

import pytest

from parity import by_liger as liger
from parity import by_paper as paper
from parity import by_trl as trl
from parity.settings import (
    Row,
    case,
    check,
    equal,
    fixed_length,
    idle,
    mean_of_sequences,
    mean_of_tokens,
    on_policy,
    ragged,
)

# ours -> TRL's and Liger's loss_type, and how those reduce it
OF_TOKENS = {
    "grpo": ("grpo", mean_of_sequences),
    "bnpo": ("bnpo", mean_of_tokens),
    "dr_grpo": ("dr_grpo", fixed_length),
    "dapo": ("dapo", mean_of_tokens),
    "cispo": ("cispo", mean_of_tokens),
    "sapo": ("sapo", mean_of_sequences),
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")
KL = {"beta": 0.3}
CORRECTED = KL | {"use_bias_correction_kl": True}
DEFAULTS = {"dapo": {"epsilon_high": 0.28}, "cispo": {"epsilon_high": 5.0}}  # which TRL must be told
WIDE = {"epsilon": 0.05}  # GSPO's own 3e-4 would clip every sequence of the case
VESPO = {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.5}


def of_tokens(name: str, knobs: dict, peer=trl.grpo, **row: object) -> Row:
    loss_type, weight = OF_TOKENS[name]
    return Row(name, knobs, partial(peer, loss_type), DEFAULTS.get(name, {}) | knobs, weight, **row)


def of_ppo(knobs: dict, theirs: dict) -> Row:
    return Row("ppo", knobs, partial(trl.grpo, "bnpo"), theirs, mean_of_tokens)


def of_mean_ratios(name: str, loss_type: str, knobs: dict, peer=trl.grpo, **row: object) -> Row:
    return Row(name, knobs, partial(peer, loss_type, level="sequence"), {"epsilon": 3e-4} | knobs, **row)


BOTH = trl.grpo, liger.grpo
OF_MEAN_RATIOS = {"gspo": "grpo", "gspo_token": "grpo", "luspo": "luspo"}
PENALTIES = [
    *(KL | {"kl_estimator": name, "use_bias_correction_kl": on} for name in paper.ESTIMATORS for on in (False, True)),
    {"entropy_coef": 0.01},
    {"entropy_coef": -0.01},
    CORRECTED | {"entropy_coef": 0.02},
]
PAPERS = {
    "reinforce": (paper.reinforce, {}),
    "ppo": (paper.ppo, {"cliprange": 0.1, "dual_clip": 1.2}),
    **dict.fromkeys(CLIPPED, (paper.grpo, {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4})),
    "cispo": (paper.cispo, {"epsilon_high": 1.1}),
    "sapo": (paper.sapo, {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.7}),
    "gspo": (paper.gspo, WIDE | {"epsilon_high": 0.1}),
    "gspo_token": (paper.gspo_token, WIDE | {"epsilon_high": 0.1}),
    "gmpo": (paper.gmpo, {"epsilon": 0.1, "epsilon_high": 0.2}),
    "luspo": (paper.luspo, WIDE | {"epsilon_high": 0.1}),
    "rloo": (paper.rloo, {"epsilon": 0.1, "epsilon_high": 0.3}),
    "vespo": (paper.vespo, VESPO),
}

ROWS = [
    # of tokens
    *(of_tokens(name, knobs, peer) for name in OF_TOKENS for knobs in ({}, KL, CORRECTED) for peer in BOTH),
    *(of_tokens(name, KL, peer, case=on_policy) for name in OF_TOKENS for peer in BOTH),
    *(of_tokens(name, {}, case=ragged) for name in OF_TOKENS),
    *(of_tokens(name, {"entropy_coef": c}) for name in ("bnpo", "dapo", "cispo") for c in (-0.01, 0.02)),
    *(of_tokens(name, {"entropy_coef": 0.02}, case=equal) for name in ("grpo", "sapo")),
    *(of_tokens(name, {"epsilon": e}) for name in CLIPPED for e in (0.0, 0.1, 1.0)),
    *(of_tokens(name, {"epsilon_high": e}) for name in CLIPPED for e in (0.0, 0.3)),
    *(of_tokens("dapo", {"epsilon": 0.1, "epsilon_high": None}, peer) for peer in BOTH),
    *(of_tokens(name, {"delta": d}, peer) for name in CLIPPED for d in (1.1, 1.5) for peer in BOTH),
    *(of_tokens("cispo", {"epsilon_high": e}, peer) for e in (0.8, 1.2) for peer in BOTH),
    *(of_tokens("sapo", {"sapo_temperature_pos": t}, peer) for t in (0.1, 3.0) for peer in BOTH),
    *(of_tokens("sapo", {"sapo_temperature_neg": t}, peer) for t in (0.1, 3.0) for peer in BOTH),
    of_ppo({}, {}),
    *(of_ppo({"cliprange": e}, {"epsilon": e}) for e in (0.0, 0.1, 1.0)),
    *(of_ppo({"dual_clip": c}, {"delta": c}) for c in (1.25, 1.5)),  # one and the same above 1 + cliprange
    # of sequences
    *(of_mean_ratios("gspo", "grpo", k, liger.grpo) for k in ({}, WIDE, WIDE | KL)),
    *(of_mean_ratios(*each, k) for each in OF_MEAN_RATIOS.items() for k in ({}, WIDE, WIDE | KL)),
    *(of_mean_ratios("luspo", "luspo", k, liger.grpo) for k in ({}, WIDE)),
    *(of_mean_ratios(*each, {"epsilon_high": 0.1}) for each in OF_MEAN_RATIOS.items()),
    *(of_mean_ratios("gspo", "grpo", WIDE | KL, peer, case=on_policy) for peer in BOTH),
    of_mean_ratios("gspo", "grpo", WIDE | {"entropy_coef": 0.02}, case=equal),
    *(Row("gmpo", {"epsilon": e}, partial(trl.grpo, "gmpo")) for e in (0.0, 0.1, 0.4)),
    Row("gmpo", {}, partial(trl.grpo, "gmpo"), {"epsilon": 0.4}),
    *(Row("gmpo", {"epsilon": 0.1, "epsilon_high": e}, partial(trl.grpo, "gmpo")) for e in (0.0, 0.3)),
    *(Row("gmpo", {"epsilon": 0.1} | KL, partial(trl.grpo, "gmpo"), case=c) for c in (case, on_policy)),
    *(Row("rloo", knobs, trl.rloo) for knobs in ({}, {"epsilon": 0.0}, {"epsilon": 1.0})),
    Row("rloo", {}, trl.rloo, case=on_policy),
    *(Row("rloo", {"epsilon": 0.1, "epsilon_high": e}, trl.rloo) for e in (0.0, 0.3)),
    *(
        Row("vespo", knobs, partial(peer, "vespo"), weight=mean_of_tokens, case=c)
        for knobs in ({}, VESPO, KL, CORRECTED)
        for peer in BOTH
        for c in (case, on_policy)
    ),
    # the papers: what no peer has
    *(Row(name, knobs, peer) for name, (peer, knobs) in PAPERS.items()),
    *(Row(name, knobs | more, peer) for name, (peer, knobs) in PAPERS.items() for more in PENALTIES),
    *(Row("ppo", {"cliprange": e, "dual_clip": c}, paper.ppo) for e in (0.0, 0.1, 0.5) for c in (1.01, 1.1, 3.0)),
    *(Row("gspo_token", WIDE | {"epsilon_high": e}, paper.gspo_token, case=ragged) for e in (None, 0.0, 0.1)),
    *(Row(name, PAPERS[name][1], PAPERS[name][0], case=ragged) for name in ("gspo", "gmpo", "luspo", "rloo", "vespo")),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_same_loss_and_gradients(row):
    check(row)


@pytest.mark.parametrize("name", sorted({row.loss for row in ROWS}))
def test_no_knob_of_the_rows_does_nothing(name):
    assert not idle(name, ROWS)
