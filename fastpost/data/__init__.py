"""Rows -> token sequences: TRL's column formats, chat templates, and loud checks on the way.

columns     which columns a verb takes; every row is checked
chat        conversations and text -> tokens
sft         sequences to imitate
pairs       where a pair's prompt ends; its two answers
preference  pairs whose tokens are compared: dpo, orpo, simpo, cpo
reward      pairs whose ends are scored
steps       solutions with a label for each step: prm
unpaired    completions with a label: kto
prompts     what is generated from
distill     what a teacher is asked about: any of these
counts      what was cut, dropped or odd
"""

from fastpost.data.chat import Messages
from fastpost.data.columns import FORMATS, Verb, check_columns, format_of
from fastpost.data.counts import Counts
from fastpost.data.distill import distill_examples, prompt_of
from fastpost.data.pairs import Pair, split_pair
from fastpost.data.preference import preference_examples
from fastpost.data.prompts import Prompt, prompt_examples, prompts
from fastpost.data.reward import reward_examples
from fastpost.data.sft import sft_examples
from fastpost.data.steps import Stepped, step_examples
from fastpost.data.unpaired import Unpaired, joined, unpaired_examples

__all__ = [
    "FORMATS",
    "Counts",
    "Messages",
    "Pair",
    "Prompt",
    "Stepped",
    "Unpaired",
    "Verb",
    "check_columns",
    "distill_examples",
    "format_of",
    "joined",
    "preference_examples",
    "prompt_examples",
    "prompt_of",
    "prompts",
    "reward_examples",
    "sft_examples",
    "split_pair",
    "step_examples",
    "unpaired_examples",
]
