"""Checks of a level: a metric that is where it should not be, as a mean over SPAN lines.

A check is given the run and returns the step at which it was first seen, and a sentence with the numbers; or None. Each
threshold has its reason: it is where people begin to look, not a law.
"""

from __future__ import annotations

from bisect import insort

from fastpost.watching.curves import Found, Run, is_number, recent, sustained

SPAN = 5  # lines that a level is the mean of: one noisy line warns of nothing
LONG = 10  # lines after which what should have begun to work has had its time

# Beyond about 50 nats a completion the score of a reward model still rises and the true reward falls, but for the
# largest reward models (arXiv:2210.10760: optima at 5 to 10 in the root of the KL).
KL_PER_COMPLETION = 50.0
KL_TARGETS = 2.0  # a controller that lets the KL be twice its target has lost hold of it
KL_PER_TOKEN = 0.5  # nats: what it writes is exp(0.5) = 1.6 times as likely as under the reference, at every token
ENTROPY_FLOOR = 0.02  # nats a token: less than one token in a hundred is a choice
ENTROPY_SHARE, ENTROPY_LOW = 0.1, 0.1  # of the start, and nats; both, since a confident model starts low
NO_VARIANCE = 0.9  # share of groups: a tenth of the batch is left to learn from
EXPLODES, LINES = 10.0, 3  # times the median so far, on so many lines in a row
NORM_TO_CARE = 1.0  # the default of max_grad_norm; ten times next to nothing is nothing
CLIPPED = 0.3  # share of tokens without a gradient; 0.05 to 0.2 is usual (arXiv:2403.17031)
UNENDED = 0.9  # share of completions
COIN = 0.5  # share of pairs
FLIPS = 0.5  # share of pairs; of hard ones a third is usual for large judges (arXiv:2306.05685)
RATIO = 0.5  # mean importance weight: half of every gradient is lost

ON_POLICY = {"online-dpo", "grpo", "rloo", "reinforce", "ppo"}
# These are numbers in every line of a healthy run. Others may be null: the length of completions that ended where none
# did, a reward function that applied to nothing.
NUMBERS = (
    *("loss", "grad_norm", "entropy", "kl", "reward", "rewards/margins", "logps/chosen", "logps/rejected"),
    *("objective/kl", "objective/scores", "loss/policy_avg", "loss/value_avg", "eval_loss", "eval_reward"),
)


def not_a_number(run: Run) -> Found:
    for line in run.lines:
        bad = [name for name in NUMBERS if name in line and not is_number(line[name])]
        if bad:
            return line["step"], f"{' and '.join(bad)} came out as no number."
    return None


def kl_beyond_budget(run: Run) -> Found:
    """A completion's, where it is known, against the target of the controller where there is one; else a token's."""
    points, unit, budget = run("kl_budget/sequence", "objective/kl"), "completion", KL_PER_COMPLETION
    if run.target_kl is not None:
        budget = KL_TARGETS * run.target_kl
    if not points and run.verb != "kto":  # whose kl is a baseline of its loss
        points, unit, budget = run("kl_budget/token", "kl"), "token", KL_PER_TOKEN
    found = sustained(points, lambda kl: kl > budget, SPAN)
    if found is None:
        return None
    seen = f"The KL to the reference reached {found[1]:.3g} nats a {unit}, and the budget is {budget:g}"
    return found[0], f"{seen}; it is {recent(points, SPAN):.3g} now."


def entropy_collapse(run: Run) -> Found:
    points = run("entropy", "policy/entropy_avg") if run.verb in ON_POLICY else []
    if len(points) < SPAN:
        return None
    start = recent(points[:SPAN], SPAN)
    least = max(ENTROPY_FLOOR, min(ENTROPY_LOW, ENTROPY_SHARE * start))
    found = sustained(points, lambda entropy: entropy < least, SPAN)
    if found is None:
        return None
    return found[0], f"The entropy is {found[1]:.2g} nats a token and was {start:.2g}: nothing new is tried any more."


def no_variance(run: Run) -> Found:
    found = sustained(run("frac_reward_zero_std"), lambda share: share >= NO_VARIANCE, SPAN)
    if found is None:
        return None
    reward = dict(run("reward")).get(found[0])
    level = "" if reward is None else f", {reward:.3g} on average"
    return found[0], f"In {found[1]:.0%} of the groups all completions have the same reward{level}: they teach nothing."


def gradient_explodes(run: Run) -> Found:
    points = run("grad_norm")
    before = sorted(norm for _, norm in points[:LONG])
    for at in range(LONG, len(points) - LINES + 1):
        usual = before[len(before) // 2]
        now = min(norm for _, norm in points[at : at + LINES])
        if now > max(EXPLODES * usual, NORM_TO_CARE):
            return points[at][0], f"The norm of the gradient stays at {now:.3g} or more and was {usual:.3g}."
        insort(before, points[at][1])
    return None


def much_is_clipped(run: Run) -> Found:
    points = run("clip_ratio/region_mean", "policy/clipfrac_avg")
    found = sustained(points, lambda share: share > CLIPPED, SPAN)
    if found is None:
        return None
    return found[0], f"{found[1]:.0%} of the tokens are clipped: the policy is far from the one that sampled them."


def critic_explains_nothing(run: Run) -> Found:
    found = sustained(run("val/explained_variance")[2 * LONG :], lambda share: share <= 0, LONG)
    if found is None:
        return None
    return found[
        0
    ], f"The critic explains {found[1]:.2g} of the variance of the returns, and a constant would explain 0."


def completions_do_not_end(run: Run) -> Found:
    found = sustained(run("completions/clipped_ratio"), lambda share: share >= UNENDED, SPAN)
    if found is not None:
        return found[0], f"{found[1]:.0%} of the completions are cut off at max_completion_length."
    found = sustained(run("val/num_eos_tokens"), lambda number: number == 0, SPAN)
    return found and (found[0], "No completion ends by itself.")


def no_better_than_a_coin(run: Run) -> Found:
    found = sustained(run("accuracy", "rewards/accuracies")[LONG:], lambda share: share < COIN, LONG)
    if found is not None:
        return found[0], f"The chosen answer is ahead in {found[1]:.1%} of the pairs, after {2 * LONG} lines."
    held_out = run("eval_accuracy", "eval_rewards/accuracies")
    if held_out and held_out[-1][1] < COIN:
        return held_out[-1][0], f"The chosen answer is ahead in {held_out[-1][1]:.1%} of the held-out pairs."
    return None


def judge_goes_by_place(run: Run) -> Found:
    found = sustained(run("judge/flips"), lambda share: share > FLIPS, SPAN)
    if found is None:
        return None
    return found[0], f"In {found[1]:.0%} of the pairs the judge's winner turns with the order of the two answers."


def sampler_mismatch(run: Run) -> Found:
    found = sustained(run("sampling/importance_sampling_ratio/mean"), lambda ratio: ratio < RATIO, SPAN)
    if found is None:
        return None
    return found[0], f"The mean importance weight is {found[1]:.2g}, and so much less is every gradient."
