"""What a run is told: one flat frozen dataclass a verb. Names and, where sensible, defaults are TRL's.

A field's metadata are its group, its one line of help with the unit, and its domain; `fastpost.cli` makes flags, YAML
keys and `--help` from them. A config that exists has been checked.
"""

from fastpost.trainers.config.conversing import Conversing
from fastpost.trainers.config.distill import Distill
from fastpost.trainers.config.drawn import Engined, Rewarded
from fastpost.trainers.config.groups import DATA, GROUPS, LOSS, MODEL, PLAN, ROLLOUT, RUN, STEPS
from fastpost.trainers.config.loaded import Loaded
from fastpost.trainers.config.online import OnlineDpo
from fastpost.trainers.config.policy import Clipped, Grpo, Ppo, Reinforce, Rloo
from fastpost.trainers.config.preference import Contrasted, Cpo, Dpo, Kto, Orpo, Pairs, Preference, Reward, Simpo
from fastpost.trainers.config.prm import Prm
from fastpost.trainers.config.sampled import Sampled
from fastpost.trainers.config.supervised import Sft
from fastpost.trainers.config.tools import Demo, Merge
from fastpost.trainers.config.training import Training

__all__ = [
    "DATA",
    "GROUPS",
    "LOSS",
    "MODEL",
    "PLAN",
    "ROLLOUT",
    "RUN",
    "STEPS",
    "Clipped",
    "Contrasted",
    "Conversing",
    "Cpo",
    "Demo",
    "Distill",
    "Dpo",
    "Engined",
    "Grpo",
    "Kto",
    "Loaded",
    "Merge",
    "OnlineDpo",
    "Orpo",
    "Pairs",
    "Ppo",
    "Preference",
    "Prm",
    "Reinforce",
    "Reward",
    "Rewarded",
    "Rloo",
    "Sampled",
    "Sft",
    "Simpo",
    "Training",
]
