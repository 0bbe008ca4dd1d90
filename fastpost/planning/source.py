"""The architecture that a config names, and how its weights are stored: a directory, a config.json, or a hub name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpost.models.adapters import base_of, is_adapter
from fastpost.planning.config import Planned
from fastpost.types import nearest


def architecture(config: Planned) -> Any:
    """The transformers config of config.model, or of the base that it is an adapter for."""
    from transformers import AutoConfig

    path = base_of(config.model) if is_adapter(config.model) else config.model
    source = _source(str(path))
    try:
        return AutoConfig.from_pretrained(
            source, trust_remote_code=config.trust_remote_code, local_files_only=isinstance(source, Path)
        )
    except Exception as error:  # of many kinds
        raise ValueError(f"model {str(path)!r} has no config that transformers reads: {error}") from error


def _source(path: str) -> Path | str:
    """What there is, or what may be a name on the hub: two words, the first of which is no directory here."""
    local = Path(path).expanduser()
    if local.is_dir() and not (local / "config.json").is_file():
        raise ValueError(f"model {path!r} has no config.json: it is not a Hugging Face model directory")
    if local.exists():
        return local
    words = path.split("/")
    may_be_on_hub = len(words) == 2 and all(words) and words[0] not in (".", "..", "~") and local.suffix != ".json"
    if may_be_on_hub and not local.parent.is_dir():
        return path
    there = [entry.name for entry in local.parent.iterdir()] if local.parent.is_dir() else []
    raise ValueError(f"model {path!r} is neither a directory nor a config.json{nearest(local.name, there)}")


def as_stored(config: Planned, found: Any) -> Planned:
    """The config as a run over this architecture has it: a checkpoint that is in 4 bits stays in them."""
    how = getattr(found, "quantization_config", None)
    if how is None:
        return config
    how = how if isinstance(how, dict) else how.to_dict()
    if not how.get("load_in_4bit"):
        kind = "bitsandbytes, in 8 bits" if how.get("load_in_8bit") else how.get("quant_method", "a method of its own")
        raise ValueError(f"model {config.model!r} is quantised ({kind}), and a plan knows bitsandbytes' 4 bits alone")
    if not config.trains_adapter:
        raise ValueError(
            f"model {config.model!r} is quantised, so its weights cannot train: give lora_r, 16 say, for adapters"
        )
    return replace(config, load_in_4bit=True, use_bnb_nested_quant=bool(how.get("bnb_4bit_use_double_quant")))
