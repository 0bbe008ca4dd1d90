"""What vLLM is told and what it answers, in this process or in a server: settings, weights, completions.

Its log-probabilities are "processed" ones: after the temperature (vLLM 0.10.2 and newer), and after the filters too. So
they are those of a `Completion` where nothing is filtered; else there are none (trl#4159, trl#6789). "raw" ones, at
temperature 1, would be no help at another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastpost.models.heads import unwrapped
from fastpost.models.qlora import is_quantised
from fastpost.models.sharded import is_sharded
from fastpost.models.trunk import causal_lm
from fastpost.rollout.sampling import Completion, Ends, Sampling

LOGPROBS_MODE = "processed_logprobs"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters that vLLM makes room for


def settings(sampling: Sampling, num_generations: int, ends: Ends) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams, which its server takes by the same names."""
    return {
        "n": num_generations,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_completion_length,
        "logprobs": 0,  # of the sampled token alone
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # stop strings may be special tokens
        "stop_token_ids": sorted(ends.tokens),
    }


def completion(ids: Sequence[int], logp: Sequence[float], sampling: Sampling, ends: Ends) -> Completion:
    return ends.cut(ids, logp if sampling.unfiltered else [])


def adapter_of(model: Any) -> Any:
    """peft's config of the adapter that is on; None without one. ValueError for one that vLLM has no place for."""
    model = unwrapped(model)
    if not hasattr(model, "peft_config"):
        return None
    config = model.peft_config[model.active_adapter]
    kind = config.peft_type.value
    more = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
    if kind != "LORA" or more:
        raise ValueError(f"vLLM samples with plain LoRA, got {' and '.join([kind, *more])}")
    return config


def room_for(rank: int) -> int:
    """max_lora_rank for an adapter of this rank."""
    if rank > RANKS[-1]:
        raise ValueError(f"lora_r must be at most {RANKS[-1]} for vLLM, got {rank}")
    return next(room for room in RANKS if rank <= room)


def save_adapter(model: Any, directory: Path) -> Path:
    """Writes the adapter that is on, and returns where vLLM finds it."""
    model = unwrapped(model)
    name = model.active_adapter
    model.save_pretrained(directory, selected_adapters=[name], save_embedding_layers=False)
    return directory if name == "default" else directory / name


def announced(model: Any) -> list[tuple[str, str, list[int]]]:
    """Names, dtypes and shapes of `named_weights`."""
    named = causal_lm(unwrapped(model)).named_parameters()
    return [(name, str(each.dtype).removeprefix("torch."), list(each.shape)) for name, each in named]


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """All weights of a model without an adapter, one by one. Where they are sharded every rank must take part."""
    lm = causal_lm(unwrapped(model))
    if is_quantised(lm):
        raise ValueError("vLLM takes new weights in floating point alone, got a model in 4 or 8 bits: train an adapter")
    for name, parameter in lm.named_parameters():
        yield name, parameter.full_tensor() if is_sharded(parameter) else parameter.detach()
