"""A model directory -> (model, tokenizer).

A model that attends through transformers' interface is switched to `fastpost.models.attention`: SDPA, soft caps and
sinks, with packs done at their true cost. Every model is probed before it is handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpost.models import attention
from fastpost.models.adapters import base_of, is_adapter, load_adapter
from fastpost.models.lora import with_lora
from fastpost.models.probe import probe
from fastpost.models.qlora import keep_differentiable
from fastpost.models.vocabulary import check_words, has_tokenizer, read_tokenizer
from fastpost.types import nearest

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    peft_config: LoraConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The causal LM and the tokenizer of a directory (or a hub name).

    The directory of a PEFT adapter is its base with this adapter, which goes on training; any other model gets the
    fresh one of peft_config (`fastpost.models.lora.lora_config`), or none, and then all weights train.

    quantization_config (`fastpost.models.qlora.four_bit_config`) leaves the head as it is. A checkpoint that
    bitsandbytes has quantised already is taken as it is, with a quantised head, too.
    """
    if is_adapter(path) and peft_config is not None:
        raise ValueError(
            f"model {str(path)!r} is an adapter, which trains on as it is: leave lora_r out, or merge it into its base "
            "(fastpost merge) to begin another on that"
        )
    load = partial(
        _model_and_tokenizer,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
        trust_remote_code=trust_remote_code,
    )
    model, tokenizer = _adapted(path, load) if is_adapter(path) else load(path)
    return prepare_model(model, peft_config, gradient_checkpointing), tokenizer


def prepare_model(model: Any, peft_config: LoraConfig | None = None, gradient_checkpointing: bool = False) -> Any:
    """A model that is loaded, ready to train: with a fresh adapter where one is wanted, and probed."""
    if peft_config is not None:
        model = with_lora(model, peft_config)
    probe(model)
    if gradient_checkpointing:
        recompute_activations(model)
    return model


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing. transformers renamed it in 5.2x; reentrant, it would need an input with a gradient, which
    LoRA has not."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _adapted(path: str | PathLike[str], load: Callable[[str], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The adapter of a directory on its base, with the tokenizer that it was trained with."""
    try:
        model, tokenizer = load(base_of(path))
    except ValueError as error:
        raise ValueError(f"model {str(path)!r} is an adapter, and its base: {error}") from error
    if has_tokenizer(Path(path).expanduser()):
        base, tokenizer = tokenizer, read_tokenizer(Path(path).expanduser().resolve())
        check_words(tokenizer, base, f"the tokenizer in {path}", f"that of the adapter's base, {base.name_or_path}")
        _check_size(tokenizer, model, path)
    return load_adapter(model, path), tokenizer


def _model_and_tokenizer(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | str,
    attn_implementation: str | None,
    quantization_config: BitsAndBytesConfig | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """The model of a directory, or of the hub, as it is there."""
    from transformers import AutoModelForCausalLM

    source = _source(path)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": isinstance(source, Path)}
    quantised = {} if quantization_config is None else {"quantization_config": quantization_config}
    attention.register()  # a config may name ours already
    try:
        tokenizer = read_tokenizer(source, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            output_loading_info=True,
            dtype=_dtype(dtype),
            attn_implementation=attn_implementation,
            **quantised,  # None would undo what a checkpoint has
            **options,
        )
        model, report = loaded
    except Exception as error:  # transformers, tokenizers and safetensors each raise kinds of their own
        near = "" if isinstance(source, Path) else _near(source)
        raise ValueError(f"model {str(path)!r} could not be loaded{near}: {error}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"model {str(path)!r} is an adapter on the hub: download it, and pass its directory")
    check_complete(report["missing_keys"], f"model {str(path)!r}")
    _check_size(tokenizer, model, path)
    keep_differentiable(model)
    if attn_implementation is None:
        attend_packed(model)
    return model, tokenizer


def check_complete(missing: Iterable[str], where: str) -> None:
    """ValueError for weights that were not in the files: transformers draws them at random, and goes on."""
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{where} has not all of its weights, which would be random: no {', '.join(names[:3])}{more}")


def load_tokenizer(path: str | PathLike[str], trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The tokenizer of a model, or of an adapter on one, and the config; its weights stay where they are."""
    from transformers import AutoConfig

    source = _source(base_of(path) if is_adapter(path) else path)
    own = Path(path).expanduser()
    options = {"trust_remote_code": trust_remote_code, "local_files_only": isinstance(source, Path)}
    try:
        return (
            read_tokenizer(own if has_tokenizer(own) else source, **options),
            AutoConfig.from_pretrained(source, **options),
        )
    except Exception as error:  # transformers and tokenizers each raise kinds of their own
        raise ValueError(f"the tokenizer of {str(path)!r} could not be loaded: {error}") from error


def _check_size(tokenizer: Any, model: Any, path: str | PathLike[str]) -> None:
    """A model may have more rows than there are tokens, padding, but not fewer."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer in {path} has {len(tokenizer)} tokens, but the model embeds only {rows}")


def _source(path: str | PathLike[str]) -> Path | str:
    """A directory with a model and a tokenizer in it, or what may be a name on the hub."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        looks_local = directory.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1
        if looks_local or directory.is_file():
            near = nearest(directory.name, _directories(directory.parent))
            raise ValueError(f"model {str(path)!r} is no directory{near}")
        return str(path)
    if not (directory / "config.json").is_file():
        raise ValueError(f"model {str(path)!r} has no config.json: it is not a Hugging Face model directory")
    if not has_tokenizer(directory):
        raise ValueError(f"model {str(path)!r} has no tokenizer (no tokenizer.json, no tokenizer_config.json)")
    return directory.resolve()  # an adapter names its base, and must find it from anywhere


def _near(name: str) -> str:
    """What a name that the hub does not know may have meant here."""
    directory = Path(name)
    if directory.parent == Path() or not directory.parent.is_dir():
        return nearest(name, _directories(Path()))
    near = nearest(directory.name, _directories(directory.parent))
    return f"; the directory {str(directory.parent)!r} has no {directory.name!r} in it{near}"


def _directories(parent: Path) -> list[str]:
    return [path.name for path in parent.glob("*/")] if parent.is_dir() else []


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A dtype by the name that a command line gives it."""
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{nearest(dtype, list(DTYPES))}")
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def attend_packed(lm: Any) -> None:
    """Packed attention, where the model attends by SDPA, or would but for a soft cap or sinks, which SDPA has not."""
    attention.register()
    how = lm.config._attn_implementation
    if how == "sdpa" or (how == "eager" and lm._supports_attention_backend):
        lm.set_attn_implementation(attention.NAME)
