"""What happened between turns, as a log shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def turn_metrics(events: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Of the events of completions that may have had several turns; nothing where none could.

    turns/mean                turns of the policy in a completion
    turns/limited, overlong   share of completions that were not answered: too many calls, or no room for the answer
    turns/speechless          share of those whose user said nothing, or had no room for the conversation
    turns/rerendered          share of answers before which the template would have had other tokens than were sampled
    tools/call_frequency      calls a completion, malformed ones too                           (TRL's)
    tools/failure_frequency   share of calls without a result: malformed, unknown, raised, late (TRL's)
    tools/malformed, timeouts, truncated   how many calls
    """
    S = len(events)
    if not any(events):
        return {}

    def total(name: str) -> int:
        return sum(each.get(name, 0) for each in events)

    calls, answers = total("calls"), total("turns") - S
    return {
        "turns/mean": total("turns") / S,
        "turns/limited": total("limited") / S,
        "turns/overlong": total("overlong") / S,
        "turns/speechless": total("speechless") / S,
        "turns/rerendered": total("rerendered") / answers if answers else 0.0,
        "tools/call_frequency": calls / S,
        "tools/failure_frequency": total("failures") / calls if calls else 0.0,
        **{f"tools/{name}": float(total(name)) for name in ("malformed", "timeouts", "truncated")},
    }
