"""A judge's file: who judges, by which rubric, how often it is asked. YAML, a list of them where several judge.

model: runs/sft                          # a directory; or, with an endpoint, a name that it knows
endpoint: http://localhost:8000/v1       # any server that speaks OpenAI's chat completions
rubric: Which answer is more polite?     # $answer in it is the column `answer` of the row
"""

from __future__ import annotations

import string
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Literal
from urllib.parse import urlsplit

from fastpost.files import read_yaml
from fastpost.trainers.config import DATA, MODEL, ROLLOUT, RUN
from fastpost.trainers.options import REQUIRED, is_needed, option, read_fields
from fastpost.types import nearest

RUBRIC = "The better answer is correct, does what was asked, and says no more than it must."
FREE = ("api_key_env", "timeout", "retries", "backoff", "concurrency", "cache_dir")  # they decide no verdict

ANSWERING = ("model", "endpoint", "dtype", "reasoning", "soft", "temperature", "max_completion_length", "seed")


class Rubric(string.Template):
    """Names of columns behind a $; whatever else follows a $, a sum of money, is text."""


@dataclass(frozen=True, kw_only=True)
class JudgeSpec:
    """One judge."""

    model: str = option(REQUIRED, MODEL, "directory of a model; with an endpoint, the name that it knows it by")
    endpoint: str | None = option(None, MODEL, "http(s)://host/v1; default: the model is loaded here")
    api_key_env: str | None = option(None, MODEL, "environment variable that holds the endpoint's key")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", MODEL, "of a model that is loaded here")

    rubric: str = option(RUBRIC, DATA, "what makes an answer good; $name is the column `name` of the row")
    scale: tuple[int, ...] = option((1, 10), DATA, "the worst score and the best one")
    ties: bool = option(True, DATA, "two answers may be called equally good")

    reasoning: bool = option(True, ROLLOUT, "reasons come before the verdict")
    both_orders: bool = option(True, ROLLOUT, "a pair is asked about twice, each answer once in the first place")
    votes: int = option(1, ROLLOUT, "samples of each question", above=0)
    soft: bool = option(False, ROLLOUT, "verdicts are probabilities, from those of the tokens where these are told")
    reasks: int = option(1, ROLLOUT, "times that an answer without a verdict is asked for one", least=0)
    temperature: float = option(0.0, ROLLOUT, "of sampling; 0: the likeliest token", least=0)
    max_completion_length: int = option(1024, ROLLOUT, "tokens of reasons and verdict", above=0)
    seed: int = option(42, ROLLOUT, "of sampling", least=0)

    timeout: float = option(60.0, RUN, "seconds that an endpoint may take to answer", above=0)
    retries: int = option(5, RUN, "times that a request is made again which found nobody, or somebody busy", least=0)
    backoff: float = option(1.0, RUN, "seconds until the first of them; each waits up to twice as long", above=0)
    concurrency: int = option(8, RUN, "requests under way; or, for a model loaded here, decoded together", above=0)
    cache_dir: str | None = option(None, RUN, "directory that keeps every answer; the same question is not asked again")

    def __post_init__(self) -> None:
        read_fields(self)
        if len(self.scale) != 2 or self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale must be two numbers, the worst score and the best one, got {list(self.scale)}")
        if self.votes > 1 and self.temperature == 0:
            raise ValueError(f"votes {self.votes} would be the same vote at temperature 0: raise temperature")
        if self.endpoint is not None and (urlsplit(self.endpoint).scheme not in ("http", "https")):
            raise ValueError(f"endpoint must begin with http:// or https://, got {self.endpoint!r}")

    @property
    def facts(self) -> dict[str, Any]:
        """What decides its verdicts."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE}

    @property
    def answering(self) -> dict[str, Any]:
        """What decides its answer to a question."""
        return {name: getattr(self, name) for name in ANSWERING}


def _one(values: Any, where: str) -> JudgeSpec:
    known = [f.name for f in fields(JudgeSpec)]
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold `field: value` lines, got a {type(values).__name__}")
    for name in values:
        if name not in known:
            raise ValueError(f"{where} has an unknown key {name!r}{nearest(str(name), known)}")
    missing = [f.name for f in fields(JudgeSpec) if is_needed(f) and values.get(f.name) in (None, "")]
    if missing:
        raise ValueError(f"{where} must have {' and '.join(missing)}")
    try:
        return JudgeSpec(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_specs(path: str | PathLike[str]) -> list[JudgeSpec]:
    """The judges of a file."""
    values = read_yaml(path, "judge")
    if not isinstance(values, list):
        return [_one(values, str(path))]
    if not values:
        raise ValueError(f"{path} is a list of no judges")
    return [_one(each, f"{path}, judge {i}") for i, each in enumerate(values)]
