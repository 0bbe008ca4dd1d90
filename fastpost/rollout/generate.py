"""Sampling by transformers' `generate`: prompts in, completions out, in prompt-major order.

Prompts are sorted by length, so that little is padded. What is sampled depends on `Sampling` alone, its seed included,
and on the key of each prompt: the model's own generation_config is set aside (many models ship a top_k and a repetition
penalty in it, and then the policy that samples is not the policy that is trained), except for the tokens that end a
turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastpost.models.sharded import is_sharded
from fastpost.rollout.keyed import chosen
from fastpost.rollout.request import request
from fastpost.rollout.sampling import Completion, Ends, Sampling


@contextmanager
def generating(model: Any, lm: Any, config: Any) -> Iterator[None]:
    """Eval mode (which also rests gradient checkpointing) and a generation_config of ours; then all as it was."""
    was_training, own_config = model.training, lm.generation_config
    model.eval()
    lm.generation_config = config
    try:
        yield
    finally:
        lm.generation_config = own_config
        model.train(was_training)


def _config(sampling: Sampling, ends: Ends, pad: int) -> Any:
    """Greedy: a processor of ours has chosen."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_completion_length,
        eos_token_id=sorted(ends.tokens) or None,
        pad_token_id=pad,
        use_cache=True,
    )


def _left_padded(rows: list[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:  # (B, P), (B, P)
    """Token ids and the mask of those that are real."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _stopping(ends: Ends, prompt: int) -> Callable[[Tensor, Any], Tensor]:
    """Rows whose newest tokens complete a stop string: a criterion of `generate`."""

    def done(input_ids: Tensor, _: Any) -> Tensor:  # (B, P) -> (B,) bool
        new = input_ids[:, prompt:].tolist()
        found = [ends.stopped(row[-ends.window :]) and ends.stopped(row) for row in new]
        return torch.tensor(found, device=input_ids.device)

    return done


def _batch(
    lm: Any, prompts: list[Sequence[int]], of: list[tuple[int, int]], sampling: Sampling, ends: Ends, config: Any
) -> list[Completion]:
    """B prompts, each with its key and the number of its sample -> B completions."""
    ids, mask = (each.to(lm.device) for each in _left_padded(prompts, config.pad_token_id))
    choice = chosen(sampling, of, mask)
    criteria = [_stopping(ends, ids.shape[1])] if ends.stop else []
    out = lm.generate(
        ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=[choice],
        stopping_criteria=criteria,
        synced_gpus=None if any(map(is_sharded, lm.parameters())) else False,  # one that is gathered waits for nobody
    )
    new = out[:, ids.shape[1] :].tolist()
    logp = torch.stack(choice.logp, dim=1).tolist()
    return [ends.cut(row, noted[: len(row)]) for row, noted in zip(new, logp, strict=True)]


def _check_finite(completions: list[Completion]) -> None:
    for i, completion in enumerate(completions):
        wrong = next((at for at, logp in enumerate(completion.logp) if not abs(logp) < torch.inf), None)
        if wrong is not None:
            raise ValueError(
                f"the model's logits are not finite at token {wrong} of completion {i}: look at its weights, or load "
                "it in a wider dtype"
            )


def generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_generations: int = 1,
    keys: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """num_generations completions of each prompt: those of prompt i begin at [i * num_generations].

    The j-th completion of a prompt depends on the model, the prompt, `sampling`, j and the prompt's key (its number in
    `prompt_ids`, unless `keys` says another), and on nothing beside it: not on the other prompts, nor their order, nor
    batch_size, nor where it is generated, but for the rounding of the logits.

    `batch_size` completions are decoded together; `progress` is told how many were just finished. Torch's global random
    state is neither used nor moved. Where the weights are sharded, transformers has the ranks step together until the
    last of them is done; they must have equally many batches.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    asked = request(model, tokenizer, prompt_ids, sampling, num_generations, keys)
    lm, ends, keys = asked.lm, asked.ends, asked.keys
    config = _config(sampling, ends, asked.pad)
    slots = [(i, j) for i in range(len(prompt_ids)) for j in range(num_generations)]
    by_length = sorted(range(len(slots)), key=lambda slot: len(prompt_ids[slots[slot][0]]))
    found: dict[int, Completion] = {}
    with generating(model, lm, config):
        for start in range(0, len(slots), batch_size):
            batch = by_length[start : start + batch_size]
            prompts = [prompt_ids[slots[slot][0]] for slot in batch]
            of = [(keys[slots[slot][0]], slots[slot][1]) for slot in batch]
            found |= zip(batch, _batch(lm, prompts, of, sampling, ends, config), strict=True)
            if progress is not None:
                progress(len(batch))
    completions = [found[slot] for slot in range(len(slots))]
    _check_finite(completions)
    return completions
