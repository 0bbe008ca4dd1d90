"""Rows -> token sequences: TRL's column formats, chat templates, and loud checks on the way.

columns   which columns a verb takes; every row is checked
chat      conversations and text -> tokens
sft       sequences to imitate
prompts   what is generated from
counts    what was cut, dropped or odd
"""

from fastpost.data.chat import Messages
from fastpost.data.columns import FORMATS, Verb, check_columns
from fastpost.data.counts import Counts
from fastpost.data.prompts import Prompt, prompts
from fastpost.data.sft import sft_examples

__all__ = ["FORMATS", "Counts", "Messages", "Prompt", "Verb", "check_columns", "prompts", "sft_examples"]
