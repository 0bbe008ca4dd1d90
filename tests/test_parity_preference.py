"""The preference family against TRL's DPO, KTO, CPO and ORPO trainers, Liger's equations, and the papers."""

from __future__ import annotations

from functools import partial

import pytest

from parity import by_liger as liger
from parity import by_paper as paper
from parity import by_trl as trl
from parity.settings import Row, check, equal_chosen, idle, single

# ours -> TRL's loss_type of DPOTrainer
OF_PAIRS = {
    "dpo": "sigmoid",
    "ipo": "ipo",
    "hinge": "hinge",
    "robust": "robust",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "sppo": "sppo_hard",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sigmoid_norm": "sigmoid_norm",
}
WITH_F = ("dpo", "ipo", "hinge", "robust", "exo", "discopop", "sigmoid_norm")
IN_LIGER = ("dpo", "hinge", "exo", "nca", "robust", "bco", "sppo", "apo_zero", "apo_down", "discopop")
WEIGHTED = [name for name in OF_PAIRS if name != "hinge"]  # TRL multiplies a relu in place: it has no backward
SMOOTHED = {"label_smoothing": 1e-3}  # exo's own default, which TRL and Liger must be told


def of_trl(name: str, knobs: dict, **row: object) -> Row:
    theirs = SMOOTHED | knobs if name == "exo" else knobs
    return Row(name, knobs, partial(trl.dpo, OF_PAIRS[name]), theirs, **row)


def of_liger(name: str, knobs: dict) -> Row:
    return Row(name, knobs, partial(liger.dpo, OF_PAIRS[name]), SMOOTHED | knobs if name == "exo" else knobs)


ROWS = [
    # what every loss of pairs has
    *(of_trl(name, knobs) for name in OF_PAIRS for knobs in ({}, {"beta": 0.7})),
    *(of_trl(name, {"ld_alpha": alpha}) for name in OF_PAIRS for alpha in (0.0, 0.4, 1.0)),
    *(of_trl(name, {"use_weighting": True}) for name in WEIGHTED),
    *(of_trl(name, {"use_weighting": True, "ld_alpha": 0.4, "beta": 0.5}) for name in WEIGHTED),
    *(of_trl(name, {"rpo_alpha": 0.5}, case=equal_chosen) for name in OF_PAIRS),
    *(of_trl(name, {"f_divergence_type": f}) for name in WITH_F for f in ("forward_kl", "js_divergence")),
    *(
        of_trl(name, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": a}, case=single)
        for name in WITH_F
        for a in (-0.5, 0.3, 0.5, 1.0, 2.0)
    ),
    *(of_trl(name, {"f_divergence_type": "js_divergence", "ld_alpha": 0.3, "beta": 0.4}) for name in WITH_F),
    *(of_liger(name, knobs) for name in IN_LIGER for knobs in ({}, {"beta": 0.7})),
    # what some have
    *(of_trl("robust", {"label_smoothing": e}) for e in (0.0, 0.1, 0.49)),
    *(of_liger("robust", {"label_smoothing": e}) for e in (0.0, 0.1, 0.49)),
    *(of_trl("exo", {"label_smoothing": e, "beta": 0.5}) for e in (1e-6, 0.1, 0.49)),
    *(of_liger("exo", {"label_smoothing": e, "beta": 0.5}) for e in (1e-6, 0.1, 0.49)),
    *(of_trl("discopop", {"discopop_tau": tau}) for tau in (0.01, 1.0)),
    *(of_liger("discopop", {"discopop_tau": tau}) for tau in (0.01, 1.0)),
    # of the whole batch
    *(
        Row(name, {"beta": 0.3, "label_smoothing": e}, partial(trl.dpo, name))
        for name in ("aot", "aot_unpaired")
        for e in (0.0, 0.1, 0.49)
    ),
    *(Row(name, {"ld_alpha": a}, partial(trl.dpo, name)) for name in ("aot", "aot_unpaired") for a in (0.0, 0.4, 1.0)),
    # without a reference
    *(Row("cpo", {"beta": b}, trl.cpo_sigmoid, {"beta": b, "cpo_alpha": 1.0}, case=equal_chosen) for b in (0.1, 0.7)),
    *(Row("cpo", {"cpo_alpha": a}, trl.cpo_sigmoid, case=equal_chosen) for a in (0.0, 0.3)),
    *(Row("cpo", {"label_smoothing": e, "cpo_alpha": 0.0}, trl.cpo_sigmoid) for e in (0.1, 0.49)),
    *(Row("cpo", {"label_smoothing": e, "cpo_alpha": 0.0}, liger.cpo, {"label_smoothing": e}) for e in (0.1, 0.49)),
    Row("simpo", {}, trl.simpo, {"beta": 2.0, "simpo_gamma": 1.0}),
    *(Row("simpo", {"beta": 0.5, "simpo_gamma": g}, trl.simpo) for g in (-0.5, 0.0, 1.4)),
    *(Row("simpo", {"beta": 0.5, "simpo_gamma": 0.7, "label_smoothing": e}, trl.simpo) for e in (0.1, 0.49)),
    Row("simpo", {"beta": 0.5, "simpo_gamma": 0.5, "cpo_alpha": 0.3}, trl.simpo, case=equal_chosen),
    Row(
        "simpo",
        {"beta": 0.5, "simpo_gamma": 1.4, "label_smoothing": 0.1},
        liger.simpo,
        {"beta": 0.5, "gamma": 1.4, "label_smoothing": 0.1},
    ),
    *(Row("orpo", {"beta": b}, liger.orpo, case=equal_chosen) for b in (0.0, 0.1, 0.9)),
    *(Row("orpo", {"beta": b}, trl.orpo_completions, case=equal_chosen) for b in (0.1, 0.9)),
    # one labelled sequence
    *(Row(name, {"beta": b}, partial(trl.kto, name)) for name in ("kto", "apo_zero_unpaired") for b in (0.1, 0.8)),
    *(
        Row(name, {"beta": 0.3, weight: w}, partial(trl.kto, name))
        for name in ("kto", "apo_zero_unpaired")
        for weight in ("desirable_weight", "undesirable_weight")
        for w in (0.0, 1.33)
    ),
    *(Row("kto", {"beta": b}, liger.kto) for b in (0.1, 0.8)),
    Row("apo_zero_unpaired", {"beta": 0.3}, partial(liger.kto, kl=False)),
    # what no peer has, or none has as the paper
    *(Row("dpo", {"beta": 0.3, "label_smoothing": e}, paper.dpo) for e in (0.0, 0.1, 0.49)),
    *(Row("dpo", {"beta": 0.3, "rpo_alpha": a}, partial(paper.with_nll, paper.dpo)) for a in (0.5, 1.0)),
    Row("hinge", {"beta": 0.3, "use_weighting": True}, partial(paper.wpo, paper.hinge)),
    *(Row("bco", {"beta": 0.3, "delta": d}, paper.bco) for d in (-0.8, 0.0, 0.8)),
    *(
        Row(
            "dpo",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - alpha},  # TRL's coefficient
            partial(paper.alpha_divergence, alpha=alpha),
            {},
        )
        for alpha in (0.2, 0.5, 0.8)
    ),
    *(Row("cpo", {"beta": 0.3, "cpo_alpha": a}, paper.cpo) for a in (0.0, 0.3, 1.0)),
    *(Row("cpo", {"beta": 0.3, "label_smoothing": e}, paper.cpo) for e in (0.0, 0.1, 0.49)),
    *(Row("orpo", {"beta": b}, paper.orpo) for b in (0.0, 0.1, 1.0)),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_same_loss_and_gradients(row):
    check(row)


@pytest.mark.parametrize("name", sorted({row.loss for row in ROWS}))
def test_no_knob_of_the_rows_does_nothing(name):
    assert not idle(name, ROWS)
