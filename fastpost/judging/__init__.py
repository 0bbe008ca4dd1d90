"""Judges: a model that is loaded here or one behind an endpoint, as a reward or as a preference between two answers.

    panel = load_judge("judge.yaml")
    panel.prefer(prompts, firsts, seconds)       # -> a Preference each: p, votes, orders
    panel(prompts, completions)                  # -> a score on [0, 1] each: --reward judge.yaml

spec       the file that describes a judge
wording    what it is asked, and what its words mean
asking     requests -> replies, kept on the disk
endpoint   replies over HTTP
transport  an answer of a server, or an error, in time
local      replies of a model that is loaded here
verdicts   replies -> preferences and scores
judge      a judge, and several
agreement  with labels
bias       for a place, for length, for its own answers
pairs      rows -> pairs to judge
report     what verdicts say of the judge
config     what `fastpost judge` is told
command    what it does
"""

from fastpost.judging.judge import Judge, Panel
from fastpost.judging.load import judge_of, load_judge
from fastpost.judging.report import verdict_metrics
from fastpost.judging.spec import JudgeSpec
from fastpost.judging.verdicts import Preference, Score

__all__ = ["Judge", "JudgeSpec", "Panel", "Preference", "Score", "judge_of", "load_judge", "verdict_metrics"]
