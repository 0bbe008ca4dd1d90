"""The tables as a whole, and where peers and papers part: what each side gives, in numbers, and which is right."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

import fastpost as fp
import test_parity_heads as heads
import test_parity_policy as policy
import test_parity_preference as preference
import test_parity_vocabulary as vocabulary
from fastpost import losses
from parity import by_liger as liger
from parity import by_paper as paper
from parity import by_trl as trl
from parity.settings import Case, named, tiny

ELSEWHERE = {"kl", "explained_variance", "prm"}  # no losses, or one without knobs: test_parity_heads.py has its tests
TABLES = [*preference.ROWS, *policy.ROWS, *vocabulary.ROWS, *vocabulary.LINES, *heads.LINES]
COMPARED = {row.loss for row in TABLES}  # a loss that nobody else has needs no row here
KNOBS = {
    name: [p.name for p in inspect.signature(named(name)).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in losses.__all__
    if name in COMPARED
}


def test_every_row_is_of_a_loss_that_is_there():
    assert set(losses.__all__) - ELSEWHERE >= COMPARED


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_has_a_row(name):
    told = {knob for row in TABLES if row.loss == name for knob in row.knobs}
    told |= {"temperature"} if name == "kd" else set()  # fused_loss hands it on
    assert set(KNOBS[name]) <= told


def test_no_row_is_written_twice():
    names = [(type(row), str(row)) for row in TABLES if not isinstance(row, heads.Line)]
    assert len(set(names)) == len(names)


# ---- where the sides differ ----


def ours(name: str, case: Case, **knobs: object) -> Tensor:
    """The mean over units that have a token."""
    units = named(name)(case.stats, case.batch, **knobs)
    return units.sum() / case.lengths.sum() if len(units) == len(case.batch.target) else units.mean()


def same(*values: Tensor | float) -> None:
    """All of these, to rounding."""
    for value in values[1:]:
        torch.testing.assert_close(torch.as_tensor(values[0]), torch.as_tensor(value), check_dtype=False)


PAIR = tiny([[-1.0, -2.0], [-3.0]], ref_logp=[[-2.0, -2.0], [-2.0]])  # d = 1 - (-1) = 2


def test_trls_sigmoid_loss_ignores_label_smoothing():
    """Ours is conservative DPO, -(1 - e) log s(x) - e log s(-x); TRL's sigmoid loss is the same at every e."""
    x = 0.1 * 2
    same(ours("dpo", PAIR, label_smoothing=0.1), 0.9 * math.log(1 + math.exp(-x)) + 0.1 * math.log(1 + math.exp(x)))
    same(trl.dpo("sigmoid", PAIR, label_smoothing=0.1), trl.dpo("sigmoid", PAIR), math.log(1 + math.exp(-x)))


def test_trls_alpha_is_one_minus_the_papers():
    """f-DPO's table has f'(u) = (1 - u^-alpha) / alpha; TRL's coefficient, and ours, is 1 - alpha."""
    alpha, knobs = 0.2, {"f_divergence_type": "alpha_divergence"}
    right = paper.alpha_divergence(PAIR, alpha=alpha)
    same(ours("dpo", PAIR, f_alpha_divergence_coef=1 - alpha, **knobs), right.mean())
    single = tiny([[-1.0, -2.0], [-3.0]], ref_logp=[[-2.0, -2.0], [-2.0]], dtype=torch.float32)
    same(trl.dpo("sigmoid", single, f_alpha_divergence_coef=1 - alpha, **knobs), right.mean().float())
    assert not torch.isclose(ours("dpo", PAIR, f_alpha_divergence_coef=alpha, **knobs), right.mean())


def test_trls_bco_has_no_reward_shift():
    """Its bco_pair is ours at delta 0, -log s(0.1) - log s(0.1); the paper subtracts a mean of the rewards."""
    same(trl.dpo("bco_pair", PAIR), ours("bco", PAIR), 2 * math.log(1 + math.exp(-0.1)))
    want = math.log(1 + math.exp(-(0.1 - 0.5))) + math.log(1 + math.exp(-0.1 - 0.5))
    same(ours("bco", PAIR, delta=0.5), paper.bco(PAIR, delta=0.5).mean(), want)


def test_trls_hinge_with_weights_has_no_backward():
    """It multiplies the output of a relu in place. Ours is the paper's (arXiv:2406.11827) product, and has one."""
    weighted = trl.dpo("hinge", PAIR, use_weighting=True)
    same(ours("hinge", PAIR, use_weighting=True), weighted)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(weighted, PAIR.stats.logp)
    assert torch.autograd.grad(ours("hinge", PAIR, use_weighting=True), PAIR.stats.logp)[0].any()


TWO_PAIRS = tiny([[-4.0], [-1.0], [-1.0, -1.0, -1.0], [-1.0]])  # the chosen: -4 and -1, and -7/4 all together


def test_trls_cpo_takes_its_nll_over_the_microbatch():
    """A pair beside longer ones counts less: 7/4, the mean over all chosen tokens, where the mean over pairs is 5/2.
    Ours is a loss of pairs, so that splitting the batch changes nothing."""
    kept = [0.0, 0.1]
    theirs = [trl.cpo("sigmoid", TWO_PAIRS, cpo_alpha=a) for a in kept]
    same((theirs[1] - theirs[0]) / 0.1, 7 / 4)
    same((ours("cpo", TWO_PAIRS, cpo_alpha=0.1) - ours("cpo", TWO_PAIRS, cpo_alpha=0.0)) / 0.1, 5 / 2)
    same(theirs[0], ours("cpo", TWO_PAIRS, cpo_alpha=0.0), liger.cpo(TWO_PAIRS))


def test_trls_orpo_takes_its_nll_over_the_prompt_too():
    """Ours and Liger's is of the completion, as in the paper's equation 6, log P(y | x); TRL's of the prompt and it."""
    prompted = tiny([[-4.0, -4.0], [-1.0, -1.0]])  # TRL is shown a prompt's token more, of log-probability -1
    same(ours("orpo", prompted, beta=0.0), liger.orpo(prompted, beta=0.0), paper.orpo(prompted, beta=0.0).mean(), 4.0)
    same(trl.orpo(prompted, beta=0.0), (4.0 + 4.0 + 1.0) / 3)


def test_trls_orpo_has_no_gradient_where_the_answer_is_certain():
    """log(1 - P) at P = 1: TRL's and Liger's gradient is NaN; ours stops the odds an ulp before."""
    sure = tiny([[0.0, 0.0], [-1.0]], dtype=torch.float32)
    for value in (trl.orpo_completions(sure), liger.orpo(sure)):
        assert torch.autograd.grad(value, sure.stats.logp)[0].isnan().any()
    got = ours("orpo", sure)
    assert got.isfinite() and torch.autograd.grad(got, sure.stats.logp)[0].isfinite().all()


ROLLOUT = tiny(
    [[-1.0, -1.0, -1.0], [-2.0]],
    old_logp=[[-1.0 - math.log(6.0), -1.0, -1.0 + math.log(3.0)], [-2.0]],  # ratios 6, 1, 1/3; 1
    ref_logp=[[-1.5, -1.5, -1.0], [-2.0]],
    entropy=[[1.0, 2.0, 3.0], [10.0]],
    advantage=[1.0, 1.0],
)


def test_cispos_bound_is_on_the_ratio():
    """In TRL, Liger and ScaleRL (arXiv:2510.13786) epsilon_high is the bound, 4; MiniMax-M1 (arXiv:2506.13585) would
    write 3, since its bound is 1 + epsilon_high. Here the first ratio, 6, meets it."""
    got = named("cispo")(ROLLOUT.stats, ROLLOUT.batch, epsilon_high=4.0)
    same(ROLLOUT.each(got)[0], torch.tensor([4.0, 1.0, 1 / 3], dtype=torch.float64))
    same(trl.grpo("cispo", ROLLOUT, epsilon_high=4.0), (4.0 + 1.0 + 1 / 3 + 2.0) / 4)


def test_trls_entropy_bonus_is_a_mean_over_tokens_whatever_the_loss():
    """Ours has the weight of the rest: under GRPO's mean of means the bonus is (2 + 10) / 2 rather than 16 / 4."""
    bonus = trl.grpo("grpo", ROLLOUT) - trl.grpo("grpo", ROLLOUT, entropy_coef=1.0)
    same(bonus, 4.0)
    weight = policy.mean_of_sequences(ROLLOUT)
    with_it, without = (named("grpo")(ROLLOUT.stats, ROLLOUT.batch, entropy_coef=c) for c in (1.0, 0.0))
    same(((without - with_it) * weight).sum(), 6.0)


def test_trl_corrects_the_kl_of_a_sequences_ratio_by_that_ratio():
    """DeepSeek-V3.2 weights a token's estimate by the token's own ratio: ours, (6 k + k + 0) / 3. With ratios of
    sequences TRL weights it by the sequence's, here 2^(1/3)."""
    k = math.exp(-0.5) + 0.5 - 1  # k3 of the first two tokens
    knobs = {"beta": 1.0, "use_bias_correction_kl": True}
    base = ours("gspo", ROLLOUT)
    same(ours("gspo", ROLLOUT, **knobs) - base, (6 * k + k) / 3 / 2)
    theirs = [trl.grpo("grpo", ROLLOUT, level="sequence", epsilon=3e-4, **more) for more in (knobs, {})]
    same(theirs[0] - theirs[1], 2 ** (1 / 3) * (2 * k) / 3 / 2)


def test_trl_corrects_the_kl_unless_told_otherwise():
    """Its GRPOConfig's default; GRPO's paper (arXiv:2402.03300) has no such ratio, and ours none unless asked."""
    config = pytest.importorskip("trl").GRPOConfig
    assert config.__dataclass_fields__["use_bias_correction_kl"].default is True
    assert inspect.signature(losses.grpo).parameters["use_bias_correction_kl"].default is False


def test_ligers_luspo_counts_padding_in_its_kl():
    """Here each token's is k, so that the sequences have 3 k and k, whose mean is 2 k. Liger's is a mean over the
    padded table, each row times its length: (3 * 3 k + 1 * k) / 6."""
    logp, ref = [[-1.0] * 3, [-1.0]], [[-1.5] * 3, [-1.5]]
    case = tiny(logp, old_logp=logp, ref_logp=ref, advantage=[1.0, 1.0])
    k = math.exp(-0.5) + 0.5 - 1
    for peer, want in ((trl.grpo, 2 * k), (liger.grpo, 10 * k / 6)):
        with_it, without = (peer("luspo", case, level="sequence", epsilon=3e-4, beta=b) for b in (1.0, 0.0))
        same(with_it - without, want)
    same(ours("luspo", case, beta=1.0) - ours("luspo", case), 2 * k)


def test_a_low_delta_also_stops_what_the_clip_would_allow():
    """min(r, delta) with delta < 1 + epsilon_high: TRL's order of the two clips, and ours. PPO's dual clip is for A < 0
    alone; from 1 + epsilon_high up they are one."""
    one = tiny([[-1.0]], old_logp=[[-1.0 - math.log(1.3)]], advantage=[1.0])
    low = {"epsilon_high": 0.5, "delta": 1.1}
    same(ours("grpo", one, **low), trl.grpo("grpo", one, **low), -1.1)
    same(ours("ppo", one, cliprange=0.5, dual_clip=1.1), -1.3)


def test_ktos_baseline_is_trls():
    """Over a batch of mismatched completions: its mean log-ratio, and not below 0."""
    case = tiny([[-1.0, -2.0], [-3.0]], ref_logp=[[-2.0, -2.0], [-2.5]])  # log-ratios 1 and -0.5
    same(losses.kl.kto_baseline(case.stats.logp, case.batch), 0.25)
    lower = fp.Batch(case.batch.target, case.batch.lengths, ref_logp=case.stats.logp.detach() + 1)
    baseline = losses.kl.kto_baseline(case.stats.logp, lower)
    same(baseline, 0.0)
    assert not baseline.requires_grad
