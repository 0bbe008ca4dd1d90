"""A judge's file -> judges that can be asked."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import Any

from fastpost.judging.asking import Ask, Cache
from fastpost.judging.judge import Judge, Panel
from fastpost.judging.spec import JudgeSpec, read_specs


def _key(spec: JudgeSpec) -> str | None:
    if spec.api_key_env is None:
        return None
    key = os.environ.get(spec.api_key_env, "").strip()
    if not key:
        raise ValueError(f"api_key_env names {spec.api_key_env}, which the environment does not have")
    return key


def _ask(spec: JudgeSpec) -> Ask:
    how = {"temperature": spec.temperature, "max_tokens": spec.max_completion_length, "seed": spec.seed}
    if spec.endpoint is None:
        from fastpost.judging.local import local

        own = {"dtype": spec.dtype, "reasoning": spec.reasoning, "batch_size": spec.concurrency}
        return local(spec.model, **how, **own)
    from fastpost.judging.endpoint import Endpoint

    patience = {name: getattr(spec, name) for name in ("timeout", "retries", "backoff", "concurrency")}
    return Endpoint(spec.endpoint, spec.model, logprobs=spec.soft, key=_key(spec), **how, **patience)


def _files(directory: str) -> list[list[Any]]:
    """What tells the weights of a directory from those that were there before."""
    there = sorted(Path(directory).expanduser().glob("*"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in there if file.is_file()]


def judge_of(spec: JudgeSpec) -> Judge:
    """One judge."""
    facts = spec.answering | ({"files": _files(spec.model)} if spec.endpoint is None else {})
    directory = None if spec.cache_dir is None else Path(spec.cache_dir).expanduser()
    return Judge(spec, _ask(spec), Cache(directory, facts))


def load_judge(path: str | PathLike[str]) -> Panel:
    """The judges of a YAML file; `prefer` compares, `score` grades, and called it is a reward function."""
    return Panel([judge_of(spec) for spec in read_specs(path)])
