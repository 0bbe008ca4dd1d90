"""The whole catalogue at its edges: what is refused, by name, and what is ordinary input however strange."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import fastpost as fp
from fastpost import losses
from parity.settings import Case, case, named, tiny

LOSSES = [name for name in losses.__all__ if isinstance(named(name), fp.Loss)]
OF_PAIRS = [name for name in LOSSES if named(name).unit == "pair"]
OF_BATCH = [name for name in LOSSES if named(name).unit == "batch"]
POLICY = [name for name in LOSSES if "kl_estimator" in inspect.signature(named(name)).parameters]
RATIOS = [name for name in POLICY if name != "reinforce"]
REFERENCED = [name for name in [*OF_PAIRS, *OF_BATCH] if name not in ("cpo", "simpo", "orpo")]


def knobs_of(name: str) -> list[str]:
    return [p.name for p in inspect.signature(named(name)).parameters.values() if p.kind is p.KEYWORD_ONLY]


# ---- refused ----

NUMBERS = (math.nan, math.inf, "0.1", True, None)
POSITIVE, NOT_NEGATIVE = (0.0, -0.1, *NUMBERS), (-0.1, *NUMBERS)
FRACTION, BELOW_HALF, INSIDE_HALF = (-0.1, 1.1, *NUMBERS), (-0.1, 0.5, *NUMBERS), (0.0, 0.5, *NUMBERS)
OR_NONE = lambda values: tuple(x for x in values if x is not None)  # noqa: E731
OUTSIDE: dict[str, tuple] = {  # knob, or loss.knob -> what is not in its domain
    "beta": POSITIVE,
    **{f"{name}.beta": NOT_NEGATIVE for name in (*POLICY, "orpo")},
    "label_smoothing": BELOW_HALF,
    "exo.label_smoothing": INSIDE_HALF,
    "sft.label_smoothing": FRACTION,
    "z_loss": NOT_NEGATIVE,
    "ld_alpha": OR_NONE(FRACTION),
    "use_weighting": (1, 0, None, "yes"),
    "rpo_alpha": NOT_NEGATIVE,
    "cpo_alpha": NOT_NEGATIVE,
    "f_divergence_type": ("kl", "REVERSE_KL", None, 1),
    "f_alpha_divergence_coef": NUMBERS,
    "delta": OR_NONE((1.0, 0.5, *NUMBERS)),
    "bco.delta": NUMBERS,
    "discopop_tau": POSITIVE,
    "simpo_gamma": NUMBERS,
    "desirable_weight": NOT_NEGATIVE,
    "undesirable_weight": NOT_NEGATIVE,
    "kl_estimator": ("k4", "K3", None),
    "use_bias_correction_kl": (1, None),
    "entropy_coef": NUMBERS,
    "cliprange": FRACTION,
    "dual_clip": OR_NONE((1.0, 0.5, *NUMBERS)),
    "epsilon": FRACTION,
    "gmpo.epsilon": NOT_NEGATIVE,
    "epsilon_high": OR_NONE(NOT_NEGATIVE),
    "cispo.epsilon_high": POSITIVE,
    **dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), POSITIVE),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), POSITIVE),
    "alpha": FRACTION,
    "temperature": POSITIVE,
    "cliprange_value": OR_NONE(POSITIVE),
    "center_rewards_coefficient": NOT_NEGATIVE,
}


@pytest.mark.parametrize("name", [*LOSSES, "value", "bradley_terry"])
def test_a_knob_out_of_its_domain(name):
    c = case()
    first = {"value": c.stats.logp, "bradley_terry": torch.zeros(c.S)}.get(name, c.stats)
    for knob in knobs_of(name):
        for value in OUTSIDE.get(f"{name}.{knob}", OUTSIDE.get(knob, ())):
            with pytest.raises(ValueError, match=rf"'{name}': {knob} must be .*, got ") as error:
                named(name)(first, c.batch, **{knob: value})
            assert repr(value) in str(error.value)
        assert f"{name}.{knob}" in OUTSIDE or knob in OUTSIDE, f"{knob} has no row here"


@pytest.mark.parametrize("name", [*LOSSES, "value", "bradley_terry"])
def test_an_unknown_knob(name):
    c, known = case(), knobs_of(name)
    first = {"value": c.stats.logp, "bradley_terry": torch.zeros(c.S)}.get(name, c.stats)
    if not known:
        with pytest.raises(ValueError, match=f"the loss '{name}' has no knob 'gamma'; its knobs: none"):
            named(name)(first, c.batch, gamma=1.0)
        return
    with pytest.raises(ValueError, match=rf"'{name}' has no knob '{known[0]}s' \(did you mean '{known[0]}'\?\)"):
        named(name)(first, c.batch, **{f"{known[0]}s": 1.0})


@pytest.mark.parametrize("name", [*OF_PAIRS, *OF_BATCH])
def test_a_pair_without_its_mate(name):
    c = case((5, 3, 1))
    with pytest.raises(ValueError, match=r"a pair is two adjacent sequences.* has 3 sequences"):
        named(name)(c.stats, c.batch)


def test_a_score_without_its_mate():
    c = case((5, 3, 1))
    with pytest.raises(ValueError, match=r"a pair is two adjacent sequences.* has 3 sequences"):
        losses.bradley_terry(torch.zeros(3), c.batch)


NEEDED = {
    **dict.fromkeys(REFERENCED, ("ref_logp",)),
    "kto": ("ref_logp", "label", "kl"),
    "apo_zero_unpaired": ("ref_logp", "label"),
    **dict.fromkeys(POLICY, ("advantage",)),
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, needs in NEEDED.items() for field in needs])
def test_a_missing_field(name, field):
    c = case()
    with pytest.raises(ValueError, match=f"the loss '{name}' needs batch.{field}"):
        named(name)(c.stats, replace(c.batch, **{field: None}))


@pytest.mark.parametrize("name", POLICY)
def test_a_missing_reference_of_the_kl(name):
    c = case()
    without = replace(c.batch, ref_logp=None)
    with pytest.raises(ValueError, match=f"the loss '{name}' needs batch.ref_logp"):
        named(name)(c.stats, without, beta=0.1)
    named(name)(c.stats, without)
    named(name)(c.stats, without, beta=0.1, kl_estimator="exact")


STATISTICS = [
    *((name, {}, "logp") for name in LOSSES if "logp" in named(name).reads),
    *((name, {"entropy_coef": 0.1}, "entropy") for name in POLICY),
    *((name, {"beta": 0.1, "kl_estimator": "exact"}, "reverse_kl") for name in POLICY),
    *((name, {"use_weighting": True}, "log_sum_sq") for name in OF_PAIRS if "use_weighting" in knobs_of(name)),
    ("sft", {"label_smoothing": 0.1}, "mean_logp"),
    ("sft", {"z_loss": 0.1}, "lse"),
    ("kd", {}, "logp_at_1"),
    ("kd", {}, "forward_kl"),
    ("forward_kl", {}, "forward_kl"),
    ("reverse_kl", {}, "reverse_kl"),
    ("gkd", {}, "jsd"),
]


@pytest.mark.parametrize(("name", "knobs", "statistic"), STATISTICS)
def test_a_missing_statistic(name, knobs, statistic):
    c = case()
    with pytest.raises(ValueError, match=f"the loss '{name}' needs stats.{statistic}"):
        named(name)(replace(c.stats, **{statistic: None}), c.batch, **knobs)


@pytest.mark.parametrize(("name", "knobs", "statistic"), STATISTICS)
def test_what_a_loss_says_it_reads_is_enough(name, knobs, statistic):
    """And the statistic is among it."""
    c = case()
    reads = {"logp_at_1" if x == "logp@1" else x for x in named(name).bind(**knobs).reads}
    only = replace(c.stats, **{f.name: None for f in fields(c.stats) if f.name not in reads})
    assert torch.equal(named(name)(only, c.batch, **knobs), named(name)(c.stats, c.batch, **knobs))
    assert statistic in reads


# ---- ordinary, however strange ----


def variants(name: str) -> list[dict[str, object]]:
    """The plain loss, and each of its knobs that brings in other arithmetic."""
    knobs = knobs_of(name)
    strange = [
        {"label_smoothing": 0.1},
        {"rpo_alpha": 0.5},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        *({"f_divergence_type": f} for f in ("forward_kl", "js_divergence", "alpha_divergence")),
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
        {"delta": 1.5},
        {"dual_clip": 1.5},
        *({"beta": 0.1, "kl_estimator": k, "use_bias_correction_kl": True} for k in ("k1", "k2", "k3", "exact")),
        {"entropy_coef": 0.01},
        {"z_loss": 0.1},
    ]
    return [{}, *(each for each in strange if set(each) <= set(knobs))]


def every(name: str, c: Case) -> None:
    """All of its variants are finite."""
    for knobs in variants(name):
        results(name, c, **knobs)


def results(name: str, c: Case, **knobs: object) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients, all finite."""
    units = named(name)(c.stats, c.batch, **knobs)
    found = torch.autograd.grad(units.sum(), list(c.leaves.values()), materialize_grads=True)
    grads = dict(zip(c.leaves, found, strict=True))
    assert units.isfinite().all(), f"{knobs}: {units}"
    for statistic, x in grads.items():
        assert x.isfinite().all(), f"{knobs}: d/d{statistic} is {x}"
    return units, grads


@pytest.mark.parametrize("name", LOSSES)
def test_sequences_of_one_token(name):
    every(name, case((1,) * 8))


EMPTY = {"chosen": (0, 3, 2, 4), "rejected": (3, 0, 2, 4), "both": (0, 0, 2, 4)}


@pytest.mark.parametrize("which", EMPTY)
@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_completion(name, which):
    """Its sequence, or its pair where that is empty too, is exactly 0, and what predicts nothing has no gradient."""
    c = case(EMPTY[which])
    for knobs in variants(name):
        units, grads = results(name, c, **knobs)
        if named(name).unit == "sequence":
            assert [bool(x) for x in units] == [n > 0 for n in c.completions]
        if named(name).unit == "pair":
            assert [bool(x) for x in units] == [which != "both", True]
        assert not grads["logp"][c.batch.target == -100].any()


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_at_all(name):
    for knobs in variants(name):
        units, grads = results(name, case((0,) * 8), **knobs)
        assert not units.any() and not any(x.any() for x in grads.values())


LOG_2 = math.log(2)
TWINS = {  # of twins whose log-ratio is 0 and whose mean logp is -3.5 / 3, at the default beta
    "dpo": LOG_2,
    "ipo": 25.0,
    "hinge": 1.0,
    "robust": LOG_2,
    "exo": math.log(0.5) - 0.5 * (math.log(1e-3) + math.log1p(-1e-3)),
    "nca": 2 * LOG_2,
    "bco": 2 * LOG_2,
    "sppo": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LOG_2 + 0.5,
    "sigmoid_norm": LOG_2,
    "aot": LOG_2,
    "aot_unpaired": LOG_2,
    "cpo": LOG_2 + 3.5 / 3,
    "simpo": math.log(1 + math.exp(1)),
    "orpo": 3.5 / 3 + 0.1 * LOG_2,
}


@pytest.mark.parametrize("name", [*OF_PAIRS, *OF_BATCH])
def test_identical_chosen_and_rejected(name):
    c = tiny([[-1.0, -2.0, -0.5]] * 4, ref_logp=[[-1.5, -1.0, -1.0]] * 4)
    every(name, c)
    units, _ = results(name, c)
    torch.testing.assert_close(units, torch.full_like(units, TWINS[name]))


@pytest.mark.parametrize("name", POLICY)
def test_a_group_without_variance(name):
    """Advantage 0: no loss, and no gradient, not even a rounding's."""
    c = case(dtype=torch.float32)
    units, grads = results(name, replace(c, batch=replace(c.batch, advantage=torch.zeros(c.S))))
    assert not units.any() and not grads["logp"].any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*REFERENCED, "kto", "apo_zero_unpaired"])
def test_a_saturated_margin(name, dtype, sign):
    """Log-ratios of +-1e4, chosen and rejected apart."""
    far = sign * 5e3
    c = tiny(
        [[-1.0, -2.0], [-3.0, -1.0]] * 2,
        ref_logp=[[-1.0 - far, -2.0 - far], [-3.0 + far, -1.0 + far]] * 2,
        dtype=dtype,
        kl=0.5,
    )
    every(name, replace(c, batch=replace(c.batch, label=torch.tensor([True, False, True, False]))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("far", [-200.0, -20.0, 20.0, 200.0])
@pytest.mark.parametrize("name", RATIOS)
def test_a_ratio_beyond_all_bounds(name, far, dtype):
    """exp(200) is infinite in fp32. Both signs of advantage, and of the distance to the reference."""
    logp = [[-1.0, -2.0, -0.1], [-1.0, -1.0, -1.0]] * 2
    moved = [[x - far for x in each] for each in logp]
    c = tiny(logp, old_logp=moved, ref_logp=logp, advantage=[1.0, -1.0, 2.0, -2.0], dtype=dtype)
    every(name, c)


@pytest.mark.parametrize("far", [-200.0, 50.0, 200.0])
@pytest.mark.parametrize("name", POLICY)
def test_a_reference_beyond_all_bounds(name, far):
    logp = [[-1.0, -2.0, -0.1], [-1.0, -1.0, -1.0]]
    ref = [[x + far for x in each] for each in logp]
    c = tiny(logp, old_logp=logp, ref_logp=ref, advantage=[1.0, -1.0], dtype=torch.float32)
    every(name, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["cpo", "simpo", "orpo"])
def test_an_answer_that_is_certain_or_impossible(name, dtype):
    for x in (0.0, -1e-9, -1e-7, -1e-4, -math.log(2), -20.0, -100.0, -1e4):
        for logp in ([[x], [-1.0]], [[-1.0], [x]], [[x], [x]]):
            every(name, tiny(logp, dtype=dtype))


@pytest.mark.parametrize("x", [-1e-6, -1e-4, -2e-3, -0.01, -math.log(2), -1.0, -15.0])
def test_orpos_log_odds_keep_their_digits_in_fp32(x):
    """log(1 - exp(x)) near 0, and far below it, where one or the other form has none left."""
    exact = torch.tensor(x).item()  # the number that fp32 is given
    single, double = (tiny([[exact], [exact / 2]], dtype=dtype) for dtype in (torch.float32, torch.float64))
    (a, da), (b, db) = results("orpo", single, beta=1.0), results("orpo", double, beta=1.0)
    # Log-odds are rounded to an ulp of themselves, and neither the loss nor its gradient makes more of that.
    odds = abs(exact - math.log1p(-math.exp(exact)))
    for single, double in ((a, b), (da["logp"], db["logp"])):
        assert ((single - double).abs() <= torch.finfo(torch.float32).eps * (2 + odds) * double.abs()).all()
