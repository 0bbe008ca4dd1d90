"""What a step or a rollout takes on a CPU, part by part, at the instant where it takes the most.

The peak is that of the events of torch's allocator, above the bytes of all live tensors before; not RSS. Between those
events each gradient leaves a mark as it is made, so that what lies in `grad` at the peak is counted, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from live import live_bytes
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from fastpost import Head, fused_loss, linear_logprobs, losses
from fastpost.data import Prompt
from fastpost.models import attention
from fastpost.models.loading import recompute_activations
from fastpost.models.lora import with_lora
from fastpost.models.trunk import causal_lm, hidden_states
from fastpost.packing import Example, Packed, pack
from fastpost.packing.subsets import with_known
from fastpost.planning.config import Planned, PlannedGrpo, PlannedSft
from fastpost.rollout import Completion, Sampling
from fastpost.rollout.generate import generating
from fastpost.rollout.keyed import chosen
from fastpost.trainers import policy, sft
from fastpost.trainers.build import adapter_of
from fastpost.trainers.episodes import counts, episodes, packs_of
from fastpost.trainers.loop import apply_gradients
from fastpost.trainers.objectives import of_grpo
from fastpost.trainers.optimizers import adamw
from fastpost.trainers.reference import Reference
from fastpost.trainers.rollouts import Rollouts
from fastpost.trainers.start import Parts, Start

MARK = "made a gradient of bytes: "
SHORT = 16  # tokens of a row of the first step, which makes AdamW's moments


@dataclass(frozen=True)
class Measured:
    peak: int  # bytes
    live: int  # of them, what was there before
    parts: Mapping[str, int]  # at the peak


def measured(config: Planned, rows: int, length: int, *, rollout: bool = False) -> Measured:
    """Of the second step; or of a rollout before it."""
    before = live_bytes()
    model = built(config)
    parts = Parts.of(model)
    start = Start(parts, adamw(parts.parameters, config))
    reference = reference_of(start, config)

    def step(length: int) -> None:
        gradients(start, reference, config, rows, length)
        apply_gradients(parts.parameters, start.optimizer, 1e-5, 1.0)

    step(SHORT)
    live, caches = live_bytes() - before, []
    above, in_gradients = peak_of(lambda: caches.append(sample(model, config)) if rollout else step(length), parts)
    whole = not config.trains_adapter
    copied = reference is not None and whole
    known = {
        "weights": bytes_of(p for p in model.parameters() if whole or not p.requires_grad),
        "adapters": 0 if whole else bytes_of(parts.parameters),
        "other models": bytes_of(model.parameters()) if copied else 0,
        "optimizer": sum({s.data_ptr(): s.nbytes() for s in state_storages(start.optimizer)}.values()),
        "gradients": in_gradients,
        "KV cache": sum(bytes_of([layer.keys, layer.values]) for cache in caches for layer in cache.layers),
    }
    known["activations and the like"] = live + above - sum(known.values())
    return Measured(live + above, live, {name: size for name, size in known.items() if size})


def peak_of(function: Callable[[], object], parts: Parts) -> tuple[int, int]:
    """The most bytes above what there was, and those of gradients among them."""
    made: set[nn.Parameter] = set()

    def mark(parameter: nn.Parameter) -> None:
        if parameter not in made and parameter.grad is not None:
            made.add(parameter)
            with record_function(f"{MARK}{parameter.grad.nbytes}"):
                pass

    hooks = [parameter.register_post_accumulate_grad_hook(mark) for parameter in parts.parameters]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    for hook in hooks:
        hook.remove()
    held = gradients = 0
    most = (0, 0)
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, (held, gradients), key=lambda both: both[0])
        elif event.name().startswith(MARK):
            gradients += int(event.name().removeprefix(MARK))
    return most


def bytes_of(tensors: Any) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


def state_storages(optimizer: torch.optim.Optimizer) -> Iterator[torch.UntypedStorage]:
    for state in optimizer.state.values():
        for value in state.values():
            for x in value.values() if isinstance(value, Mapping) else (value,):
                if isinstance(x, Tensor):
                    yield x.untyped_storage()


def built(config: Planned) -> Any:
    """As `fastpost.trainers.build` makes it, but for a file of weights and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model), dtype=torch.float32)
    model.set_attn_implementation(attention.register())
    if config.lora_r:
        model = with_lora(model, adapter_of(config))
    if config.gradient_checkpointing:
        recompute_activations(model)
    return model.train()


def reference_of(start: Start, config: Planned) -> Any:
    """Of GRPO and DPO; by the trainers' own rule for the one, and likewise for the other, which has no trainer."""
    if isinstance(config, PlannedGrpo):
        return Reference.of(start, config)
    if isinstance(config, PlannedSft):
        return None
    return start.model if config.lora_r else copy.deepcopy(start.model).requires_grad_(False)


def gradients(start: Start, reference: Any, config: Planned, rows: int, length: int) -> None:
    """Adds those of one step, over rows of so many tokens."""
    vocabulary = causal_lm(start.model).config.vocab_size
    ids = torch.randint(0, vocabulary, (rows * config.gradient_accumulation_steps, length)).tolist()
    examples = [Example(row, [True] * length) for row in ids]
    if isinstance(config, PlannedSft):
        sft.backward(start.model, examples, config)
    elif isinstance(config, PlannedGrpo):
        grpo(start.model, reference, ids, config)
    else:
        dpo(start.model, reference, pack(examples))


def grpo(model: Any, reference: Reference, ids: Sequence[list[int]], config: PlannedGrpo) -> None:
    prompt = len(ids[0]) // 4
    prompts = [Prompt("", row[:prompt], {}) for row in ids]
    completions = [Completion(row[prompt:], True) for row in ids]
    rollouts = Rollouts(prompts, completions, [], None, {})  # type: ignore[arg-type]  # nobody asks what they scored
    stage: Any = SimpleNamespace(shared=False, config=config)
    whole = episodes(rollouts, config)
    whole = with_known(whole, advantage=whole.batch.spread(torch.linspace(-1, 1, len(ids))))
    packs = [reference.scored(packed) for packed in packs_of(whole, of_grpo(config), stage, rollouts)]
    policy.backward(model, packs, of_grpo(config), int(counts(whole).sum()), config)


def dpo(model: Any, reference: Any, packed: Packed) -> None:
    """Pairs are adjacent; the reference is the model with its adapter off, or a frozen copy."""
    off = model.disable_adapter() if reference is model else nullcontext()
    reference.eval()
    with torch.no_grad(), off:
        hidden = hidden_states(reference, packed)[0]
        ref_logp = linear_logprobs(hidden, Head.of(reference), packed.batch.target)
    del hidden
    model.train()
    batch = replace(packed.batch, ref_logp=ref_logp)
    loss = fused_loss(losses.dpo, hidden_states(model, packed), Head.of(model), batch)
    assert isinstance(loss, Tensor)
    loss.backward()


def sample(model: Any, config: Planned) -> Any:
    """As `fastpost.rollout` does, but with a cache that can be looked at, which is what comes back."""
    from transformers import DynamicCache, GenerationConfig

    assert isinstance(config, PlannedGrpo)
    lm, n = causal_lm(model), min(config.generation_batch_size, config.rows_per_step)
    ids = torch.randint(0, lm.config.vocab_size, (n, config.max_prompt_length))
    new = config.max_completion_length
    how = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0, use_cache=True)
    cache, mask = DynamicCache(config=lm.config), torch.ones_like(ids)
    draw = chosen(Sampling(max_completion_length=new), [(i, 0) for i in range(n)], mask)
    with generating(model, lm, how):
        lm.generate(ids, attention_mask=mask, generation_config=how, logits_processor=[draw], past_key_values=cache)
    return cache
