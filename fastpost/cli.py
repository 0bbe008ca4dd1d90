"""`fastpost <verb> --config run.yaml [--field value]`: the edge where names become functions.

A verb is a config dataclass and a function of it. Flags and YAML keys are the config's fields; a flag wins over the
file. Bad input is one line on stderr that names it, and exit code 2.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastpost.doctor.config import Doctor
from fastpost.evaluation.config import Eval
from fastpost.files import read_yaml
from fastpost.judging.config import JudgePairs
from fastpost.planning import config as planned
from fastpost.report.config import Report
from fastpost.stages import config as staged
from fastpost.trainers import config as configs
from fastpost.trainers.options import bare, is_needed, placeholder
from fastpost.types import nearest

# verb -> (its config, module:function). The module is imported when the verb runs.
VERBS: dict[str, tuple[type, str]] = {
    "sft": (configs.Sft, "fastpost.trainers.sft:sft"),
    "reward": (configs.Reward, "fastpost.trainers.reward:reward"),
    "prm": (configs.Prm, "fastpost.trainers.prm:prm"),
    "dpo": (configs.Dpo, "fastpost.trainers.dpo:dpo"),
    "cpo": (configs.Cpo, "fastpost.trainers.reference_free:cpo"),
    "simpo": (configs.Simpo, "fastpost.trainers.reference_free:simpo"),
    "orpo": (configs.Orpo, "fastpost.trainers.reference_free:orpo"),
    "kto": (configs.Kto, "fastpost.trainers.kto:kto"),
    "online-dpo": (configs.OnlineDpo, "fastpost.trainers.online_dpo:online_dpo"),
    "grpo": (configs.Grpo, "fastpost.trainers.grpo:grpo"),
    "rloo": (configs.Rloo, "fastpost.trainers.rloo:rloo"),
    "ppo": (configs.Ppo, "fastpost.trainers.ppo:ppo"),
    "reinforce": (configs.Reinforce, "fastpost.trainers.reinforce:reinforce"),
    "distill": (configs.Distill, "fastpost.trainers.distill:distill"),
    "prm-label": (staged.PrmLabel, "fastpost.stages.step_labels:prm_label"),
    "guided": (staged.Guided, "fastpost.stages.guided:guided"),
    "best-of-n": (staged.BestOfN, "fastpost.stages.best_of_n:best_of_n"),
    "rejection": (staged.Rejection, "fastpost.stages.rejection:rejection"),
    "constitution": (staged.Constitution, "fastpost.stages.constitution:constitution"),
    "merge": (configs.Merge, "fastpost.trainers.merge:merge"),
    "demo": (configs.Demo, "fastpost.demo:demo"),
    "judge": (JudgePairs, "fastpost.judging.command:judge"),
    "eval": (Eval, "fastpost.evaluation.command:evaluate"),
    "report": (Report, "fastpost.report.command:report"),
    "doctor": (Doctor, "fastpost.doctor.command:doctor"),
    "plan sft": (planned.PlannedSft, "fastpost.planning.command:plan"),
    "plan dpo": (planned.PlannedDpo, "fastpost.planning.command:plan"),
    "plan reward": (planned.PlannedReward, "fastpost.planning.command:plan"),
    "plan grpo": (planned.PlannedGrpo, "fastpost.planning.command:plan"),
    "plan ppo": (planned.PlannedPpo, "fastpost.planning.command:plan"),
}
PACKAGE = Path(__file__).resolve().parent
HELP = ("-h", "--help")


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    words = of_two_words(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words and not words[0].startswith("-") else None
    try:
        if verb is None:
            if words and words[0] not in HELP:
                raise ValueError(f"the verb comes first, got {words[0]!r}; verbs: {', '.join(VERBS)}")
            print(overview(VERBS), flush=True)
            return 0
        if verb not in VERBS and verbs_of(verb):
            print(overview(verbs_of(verb)), flush=True)
            return 0
        if verb not in VERBS:
            raise ValueError(f"unknown verb {verb!r}{nearest(verb, list(VERBS))}; verbs: {', '.join(VERBS)}")
        cls, path = VERBS[verb]
        if any(word in HELP for word in words[1:]):
            print(help_of(verb, cls), flush=True)
            return 0
        config = read_config(cls, words[1:])
        module, function = path.split(":")
        verb_function = getattr(importlib.import_module(module), function)
        if not sys.stderr.isatty():
            hush_libraries()
        try:
            verb_function(config)
        finally:
            sys.stdout.flush()  # not at the exit of the process, where nobody could catch that the reader has gone
    except (ValueError, FloatingPointError) as error:
        if not said_by_us(error):
            raise
        print(f"fastpost{f' {verb}' if verb in VERBS else ''}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastpost"):
            raise
        print(
            f"fastpost {verb} needs {error.name}, which is not installed: pip install 'fastpost[train]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # whoever read has gone, as `head` does; nor is there anybody for the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def of_two_words(words: list[str]) -> list[str]:
    """A verb that has two words, as one."""
    if len(words) < 2 or words[1] in HELP or not verbs_of(words[0]):
        return words
    return [" ".join(words[:2]), *words[2:]]


def verbs_of(word: str) -> dict[str, tuple[type, str]]:
    """Those that begin with this word and have another."""
    return {verb: entry for verb, entry in VERBS.items() if verb.startswith(f"{word} ")}


def said_by_us(error: BaseException) -> bool:
    """Whether our own code raised it, to speak to the user; any other error is a defect and keeps its traceback."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and PACKAGE in Path(last.tb_frame.f_code.co_filename).resolve().parents


def leave() -> None:
    """Ends the talk of several processes. A thread that still listens may abort one that is through, whose exit code
    would then say that it failed."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def hush_libraries() -> None:
    """No progress bars for loading and saving where nobody watches them."""
    from transformers.utils import logging

    logging.disable_progress_bar()


# ---- words -> config ----


def read_config(cls: type, words: list[str]) -> Any:
    """The config that flags and, under them, a YAML file describe."""
    flags = read_flags(cls, words)
    path = flags.pop("config", None)
    values = (read_keys(cls, path) if path is not None else {}) | flags
    missing = [f.name for f in dataclasses.fields(cls) if is_needed(f) and values.get(f.name) in (None, "", [])]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given, as a flag (--{missing[0]} ...) or in the --config file")
    return cls(**values)


def read_flags(cls: type, words: list[str]) -> dict[str, Any]:
    """--name value, --name=value; a bool also as --name and --no-name, a list as several values or repeated flags."""
    kinds = {name: bare(hint)[0] for name, hint in typing.get_type_hints(cls).items()}
    found: dict[str, Any] = {}
    for flag, values in split_flags(with_flag(cls, words)):
        name = flag[2:].replace("-", "_")
        if not values and name.startswith("no_") and kinds.get(name[3:]) is bool:
            name, values = name[3:], ["false"]
        check_name(cls, name, "flag", flag)
        if not values and kinds.get(name) is bool:
            values = ["true"]
        if not values:
            raise ValueError(f"{flag} needs a value")
        if typing.get_origin(kinds.get(name)) is tuple:
            found[name] = [*found.get(name, []), *values]
        elif len(values) > 1 or name in found:
            raise ValueError(f"{flag} takes one value, got {' and '.join([*found.get(name, '').split(), *values])}")
        else:
            found[name] = values[0]
    return found


def with_flag(cls: type, words: list[str]) -> list[str]:
    """The words, where the first is no flag but the value of the field that needs none, behind its flag."""
    alone = [f"--{field.name}" for field in dataclasses.fields(cls) if field.metadata.get("positional")]
    return [*alone, *words] if words and not words[0].startswith("--") else words


def split_flags(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each --flag with the words that follow it up to the next one."""
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    if words and starts[:1] != [0]:
        raise ValueError(f"expected a flag, got {words[0]!r}: write --field value")
    for start, end in pairwise([*starts, len(words)]):
        flag, equals, value = words[start].partition("=")
        yield flag, ([value] if equals else []) + words[start + 1 : end]


def read_keys(cls: type, path: str) -> dict[str, Any]:
    """The keys of a YAML file, safe-loaded; each must be a field."""
    values = read_yaml(path, "config")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `field: value` lines, got a {type(values).__name__}")
    for name in values:
        check_name(cls, str(name), "key", f"{name!r} in {path}")
    return values


def check_name(cls: type, name: str, what: str, shown: str) -> None:
    """ValueError unless a field has this name."""
    known = [field.name for field in dataclasses.fields(cls)] + (["config"] if what == "flag" else [])
    if name not in known:
        raise ValueError(f"unknown {what} {shown}{nearest(name, known)}")


# ---- help ----


def overview(entries: Mapping[str, tuple[type, str]]) -> str:
    """What `fastpost --help` says of all verbs, or of those that begin with one word."""
    verbs = "\n".join(f"  {verb:<11} {first_line(cls)}" for verb, (cls, _) in entries.items())
    usage = "usage: fastpost VERB --config run.yaml [--field value ...]"
    return f"{usage}\n\n{verbs}\n\nfastpost VERB --help lists the fields."


def help_of(verb: str, cls: type) -> str:
    """What `fastpost VERB --help` says: every field by group, with its unit and default."""
    groups: dict[str, list[str]] = {}
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for field, kind in ((f, typing.get_type_hints(cls)[f.name]) for f in dataclasses.fields(cls)):
        groups.setdefault(field.metadata["group"], []).append(field_help(field, kind, width))
    body = "\n\n".join(f"{group}\n" + "\n".join(groups[group]) for group in configs.GROUPS if group in groups)
    alone = "".join(f" {field.name.upper()}" for field in dataclasses.fields(cls) if field.metadata.get("positional"))
    return (
        f"usage: fastpost {verb}{alone} --config run.yaml [--field value ...]\n\n{first_line(cls)}\n\n"
        f"Each field is a flag and a key of the YAML file; a flag wins.\n\n{body}"
    )


def field_help(field: dataclasses.Field, kind: Any, width: int) -> str:
    """A flag, what it takes, what it means."""
    if is_needed(field):
        default = " (required)"
    elif field.default is None:
        default = ""
    else:
        value = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = f" (default: {str(value).lower() if isinstance(value, bool) else value})"
    flag = f"  --{field.name} {placeholder(kind)}"
    column = 36
    text = textwrap.wrap(field.metadata["help"] + default, width - column)
    flags = [flag] if len(flag) <= width else wrapped(flag, width - column)
    lead = [f"{flag:<{column}}{text[0]}", *text[1:]] if len(flag) < column else [*flags, *text]
    return "\n".join([lead[0], *(" " * column + line for line in lead[1:])])


def wrapped(flag: str, width: int) -> list[str]:
    """A flag in as many lines as its choices need."""
    return [line.replace("| ", "|") for line in textwrap.wrap(flag.replace("|", "| "), width)]


def first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
