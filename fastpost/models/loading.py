"""A model directory -> (model, tokenizer).

A model that attends by SDPA is switched to `fastpost.models.attention`, which is SDPA with packs done at their true
cost, and every model is probed before it is handed out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fastpost.models import attention
from fastpost.models.probe import probe
from fastpost.types import nearest

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    lora_r: int = 0,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    lora_target_modules: str | Sequence[str] = "all-linear",
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The causal LM and the tokenizer of a directory (or a hub name); lora_r 0: no adapter, all weights train.

    load_in_4bit leaves the head as it is. A checkpoint that bitsandbytes has quantised already is taken as it is, with
    a quantised head, too.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _source(path)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": isinstance(source, Path)}
    quantised = {"quantization_config": _nf4()} if load_in_4bit else {}  # None would undo what a checkpoint has
    attention.register()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=_dtype(dtype),
            attn_implementation=attn_implementation,
            **quantised,
            **options,
        )
    except Exception as error:  # transformers, tokenizers and safetensors each raise kinds of their own
        near = "" if isinstance(source, Path) else nearest(str(path), _directories(Path()))
        raise ValueError(f"model {str(path)!r} could not be loaded{near}: {error}") from error
    _keep_differentiable(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer in {path} has {len(tokenizer)} tokens, but the model embeds only {rows}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if attn_implementation is None and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention.NAME)
    if lora_r:
        model = _with_lora(model, lora_r, lora_alpha, lora_dropout, lora_target_modules)
    probe(model)
    if gradient_checkpointing:
        # transformers renamed it in 5.2x; reentrant, it would need an input with a gradient, which LoRA has not.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model, tokenizer


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
        if (directory / "adapter_config.json").is_file():
            raise ValueError(
                f"model {str(path)!r} holds a PEFT adapter, not a model: merge it into its base "
                "(peft's merge_and_unload) and pass the merged directory"
            )
        raise ValueError(f"model {str(path)!r} has no config.json: it is not a Hugging Face model directory")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ValueError(f"model {str(path)!r} has no tokenizer (no tokenizer.json, no tokenizer_config.json)")
    return directory.resolve()  # an adapter names its base, and must find it from anywhere


def _directories(parent: Path) -> list[str]:
    return [path.name for path in parent.glob("*/")] if parent.is_dir() else []


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A dtype by the name that a command line gives it."""
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{nearest(dtype, list(DTYPES))}")
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def _nf4() -> Any:
    """QLoRA's storage (arXiv:2305.14314): 4-bit normal floats; the head and the embedding stay as they are."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _keep_differentiable(model: Any) -> None:
    """bitsandbytes repacks a CPU weight at its first forward in eval mode, and then no gradient passes it any more."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _with_lora(model: Any, r: int, alpha: int, dropout: float, target_modules: str | Sequence[str]) -> Any:
    """The model, frozen, with trainable low-rank adapters (arXiv:2106.09685)."""
    from peft import LoraConfig, get_peft_model

    if r < 0:
        raise ValueError(f"lora_r must be positive, or 0 to train all weights, got {r}")
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"lora_target_modules {targets!r} do not fit {type(model).__name__}: {error}") from error
