"""Checks of a trend, from the first quarter of a run's lines to the last; as in `fastpost.watching.levels`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from fastpost.watching.curves import Found, Points, Run, correlation, joined, recent, sustained, trend
from fastpost.watching.levels import SPAN

CLEAR = 3.0  # standard errors that a trend has at least
FALL = 0.05  # share of a log-probability: batches differ by about as much
LENGTH_RISE = 1.2  # of the length; below it, whatever the reward does is not for the length
WITHIN = 0.6  # correlation over the completions of a step: a third of the reward's variance is length
LEVELS, CHANGES = 0.9, 0.6  # correlations over lines: of the curves, and of their changes
WORSE = 0.1  # rise of the held-out loss over its best


def both_fall(run: Run) -> Found:
    """Likelihood displacement, arXiv:2410.08847."""
    chosen, rejected = trend(run("logps/chosen")), trend(run("logps/rejected"))
    if chosen is None or rejected is None:
        return None
    least = chosen.first - FALL * abs(chosen.first)
    falls = chosen.last < least and rejected.last < rejected.first - FALL * abs(rejected.first)
    if not falls or max(chosen.errors, rejected.errors) > -CLEAR:
        return None
    seen = (
        f"Chosen answers get less likely ({chosen.first:.4g} to {chosen.last:.4g} nats) and so do rejected ones "
        f"({rejected.first:.4g} to {rejected.last:.4g}): the probability goes to answers that are in no pair."
    )
    return _first(run("logps/chosen"), lambda logp: logp < least), seen


def reward_is_length(run: Run) -> Found:
    """Both rise, and long completions are those with reward, within a step; or, where that is not known, each change of
    the length from line to line is one of the reward: two curves that merely rise together may both be deserved."""
    rewards, lengths = run("reward", "objective/scores"), run("completions/mean_length")
    reward, length = trend(rewards), trend(lengths)
    if reward is None or length is None or min(reward.errors, length.errors) < CLEAR:
        return None
    least = LENGTH_RISE * length.first
    tie = _tie(run("reward_length_correlation"), rewards, lengths)
    if length.last < least or tie is None:
        return None
    seen = (
        f"The reward, {reward.first:.3g} to {reward.last:.3g}, follows the length, {length.first:.0f} to "
        f"{length.last:.0f} tokens, at a correlation of {tie:.2f}."
    )
    return _first(lengths, lambda mean: mean > least), seen


def overfits(run: Run) -> Found:
    held_out, training = run("eval_loss"), trend(run("loss"))
    if len(held_out) < 3 or training is None or training.errors > -CLEAR:
        return None
    step, best = min(held_out, key=lambda point: point[1])
    now = min(value for _, value in held_out[-2:])
    if now < best + WORSE * abs(best):
        return None
    return step, f"The held-out loss was {best:.3g} at step {step:g} and is {now:.3g}; the training loss still falls."


def _tie(within: Points, rewards: Points, lengths: Points) -> float | None:
    """The correlation of reward and length, if it is as good as one."""
    if within:
        mean = recent(within, SPAN)
        return mean if mean > WITHIN else None
    _, x, y = zip(*joined(rewards, lengths), strict=True)
    level, change = correlation(x, y), correlation(_changes(x), _changes(y))
    return level if level > LEVELS and change > CHANGES else None


def _changes(values: tuple[float, ...]) -> list[float]:
    return [after - before for before, after in pairwise(values)]


def _first(points: Points, test: Callable[[float], bool]) -> float:
    """The step from which the level passes a test that its last quarter passes."""
    found = sustained(points, test, min(SPAN, len(points) // 4))
    assert found is not None
    return found[0]
