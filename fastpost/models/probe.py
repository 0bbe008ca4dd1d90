"""What is assumed of a model, tried on a few tokens before anything is trained.

Two assumptions fail without a sound: that the `Head` found in a model gives the model's own logits, and that sequences
in a pack do not see each other (some models of transformers 5.23 ignore positions when they build their mask).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.core.quantised import Quantised, Weight
from fastpost.models.heads import head_of
from fastpost.models.trunk import causal_lm, hidden_states
from fastpost.packing import Example, Packed, pack
from fastpost.shared_prompt import share_prompts

ROWS = 4096  # of a weight that are widened together


@torch.no_grad()
def probe(model: nn.Module) -> None:
    """ValueError if the model cannot be trained on packs through its Head; its mode is left as it was."""
    with _in_eval_mode(model):
        check_head(model)
    check_packing(model)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_head(model: nn.Module) -> None:
    """The Head against the model's own logits, for one sequence."""
    lm = causal_lm(model)
    packed = _packed(lm, _sequence(lm, 2, 4))
    truth = lm(input_ids=packed.input_ids, use_cache=False).logits[0].float()
    head, hidden = head_of(model), hidden_states(model, packed)[0]
    if head.shard is not None:
        truth = truth[:, head.shard.start :][:, : head.shard.rows]
    rounding = _rounding(head.weight, hidden.dtype)
    hidden, weight = hidden.float(), head.weight
    if isinstance(weight, Quantised):
        weight = weight.to(torch.float32)
    blocks = (weight[start : start + ROWS].float() for start in range(0, weight.shape[0], ROWS))
    logits = torch.cat([hidden @ block.T for block in blocks], 1)
    if head.bias is not None:
        logits += head.bias.float()
    logits += sum(x.scaling * (hidden @ x.a.float().T @ x.b.float().T) for x in head.lora)
    logits *= head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if logits.shape != truth.shape or (logits - truth).norm() > rounding * truth.norm():
        raise ValueError(
            f"the head found in {type(lm).__name__} does not give the model's own logits "
            f"(softcap {head.softcap}, scale {head.scale}): fastpost does not know this architecture"
        )


def _rounding(weight: Weight, dtype: torch.dtype) -> float:
    """By how much, relative to their norm, the logits of the layer itself may be off."""
    if isinstance(weight, Quantised) and weight.kind == "int8":
        return 4 / 127  # outside training it rounds the hidden states to 8 bits
    return 1e-5 + 4 * max(torch.finfo(x).eps for x in (dtype, weight.dtype or dtype))


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """One sequence alone, behind another one, and behind a third of the other's length."""
    lm = causal_lm(model)
    first, other, second = (_sequence(lm, k, n) for k, n in ((1, 5), (3, 5), (2, 4)))

    def last(*sequences: list[int]) -> Tensor:  # (4, D), of the second
        return hidden_states(model, _packed(lm, *sequences))[0, -4:].float()

    try:
        with _in_eval_mode(model):
            alone, beside, changed = last(second), last(first, second), last(other, second)
    except (RuntimeError, TypeError, IndexError) as error:  # a mask that is a layout does not fit code of its own
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{type(lm).__name__} cannot run over a pack with attn_implementation="
            f"{lm.config._attn_implementation!r}: {error}"
        ) from error
    # The same shapes and kernels twice, so only a leak can differ. Alone, shapes differ, and with them the rounding of
    # every layer, in bf16 too: this looser bound is for what is wrong beside any other sequence, such as positions.
    leak = (beside - changed).norm() > 4 * torch.finfo(lm.dtype).eps * alone.norm()
    if leak or (beside - alone).norm() > 0.05 * alone.norm():
        raise ValueError(
            f"{type(lm).__name__} lets packed sequences see each other with attn_implementation="
            f"{lm.config._attn_implementation!r}: it cannot be trained on packs"
        )


@torch.no_grad()
def check_sharing(model: nn.Module) -> None:
    """Two continuations of one prompt: behind it once, and each behind its own."""
    lm = causal_lm(model)
    prompt, *rests = (_sequence(lm, k, n) for k, n in ((1, 5), (2, 4), (3, 2)))
    plain = pack([Example(prompt + rest, [False] * 5 + [True] * len(rest)) for rest in rests])
    with _in_eval_mode(model):
        own = hidden_states(model, plain.to(_device(lm)))[0, plain.batch.kept].float()
        shared = hidden_states(model, share_prompts(plain, 2).to(_device(lm)))[0].float()
    if (shared - own).norm() > 0.05 * own.norm():
        raise ValueError(
            f"{type(lm).__name__} does not see a shared prompt as it sees one of its own: set share_prompts to false"
        )


def _sequence(lm: Any, first: int, length: int) -> list[int]:
    """Some tokens, all different from those of another `first`."""
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    return [(7 * i + first) % vocabulary for i in range(length)]


def _packed(lm: Any, *sequences: list[int]) -> Packed:
    """A pack with nothing to predict, where the model is."""
    return pack([Example(ids, [False] * len(ids)) for ids in sequences]).to(_device(lm))


def _device(lm: Any) -> torch.device:
    return lm.get_input_embeddings().weight.device
