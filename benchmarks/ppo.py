"""A step of PPO (arXiv:1707.06347, arXiv:2203.02155) by four roles on one base, phase by phase.

rollout     completions of the prompts by the policy, with a KV cache; or given ones, which are random
reward      what the reward role says of each sequence
logp        of every completion's tokens, under the policy and under the reference
values      what the value role says of every token
advantages  the KL in the reward, GAE, whitened over all packs
updates     `epochs` times over the packs: the losses of policy and value of one, and a step of AdamW in 8 bits
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastpost import fused_loss, linear_logprobs, losses
from fastpost.advantages import gae, kl_in_reward, whiten
from fastpost.models.roles import Copied, Roles
from fastpost.packing import Example, Packed, pack, plan
from fastpost.rollout import Sampling, generate

Judge = Callable[[Packed], Tensor]  # -> (S,)
Meter = Callable[[str, Callable[[], Any]], Any]  # runs a phase of this name, and notes what it cost


@dataclass(frozen=True)
class Work:
    """Of a step."""

    prompts: int = 16
    prompt_tokens: int = 256  # of the longest; the shortest has half as many
    completion_tokens: int = 64
    minibatch_tokens: int = 2048  # at most, of a pack; a pack is a minibatch
    epochs: int = 2
    lora_r: int = 16
    learning_rate: float = 1e-5
    completions: Literal["generated", "given"] = "generated"


@dataclass(frozen=True)
class Step:
    """What came of one."""

    packs: list[Packed]
    scores: Tensor  # (S,) in the order of the packs
    finite: bool  # all losses


@dataclass(frozen=True)
class Words:
    """What generation asks of a tokenizer."""

    eos_token_id: int | None = None
    pad_token_id: int = 0


# ---- the models ----


def four_roles(base: Any, lora_r: int) -> Roles:
    """Policy and value have learnt nothing yet; the reward is noise, so that it says something."""
    from peft import LoraConfig

    adapter = LoraConfig(r=lora_r, target_modules="all-linear")
    roles = Roles.of(base, policy=adapter, reward=Copied("policy"), value=adapter)
    head = roles.reward.scalar
    assert head is not None
    with torch.no_grad():
        for tensor in roles.reward.switch.parameters("reward"):
            tensor.add_(torch.randn_like(tensor), alpha=0.01)
        nn.init.normal_(head.weight, std=head.in_features**-0.5)  # scores of about 1
    return roles


def adamw_8bit(roles: Roles, learning_rate: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([p for tensors in roles.trainable().values() for p in tensors], lr=learning_rate)


# ---- the phases ----


def random_rows(count: int, lengths: Sequence[int], vocab: int, seed: int) -> list[list[int]]:
    """Texts of these lengths, in turns."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (lengths[i % len(lengths)],), generator=draw).tolist() for i in range(count)]


def prompts_of(work: Work, vocab: int, seed: int) -> list[list[int]]:
    """Lengths go down evenly from the longest to half of it."""
    fall = work.prompt_tokens // 2 / max(1, work.prompts - 1)
    return random_rows(work.prompts, [work.prompt_tokens - int(i * fall) for i in range(work.prompts)], vocab, seed)


def rollout(roles: Roles, prompts: Sequence[Sequence[int]], work: Work, seed: int) -> list[list[int]]:
    if work.completions == "given":
        return random_rows(len(prompts), [work.completion_tokens], roles.policy.head().vocabulary, seed)
    model: Any = roles.policy.model
    sampling = Sampling(max_completion_length=work.completion_tokens, seed=seed)
    with roles.policy.using(), _precision(model.device):
        found = generate(model, Words(), prompts, sampling, batch_size=len(prompts))
    return [completion.ids for completion in found]


def packed(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], work: Work) -> list[Packed]:
    examples = [
        Example([*prompt, *said], [False] * len(prompt) + [True] * len(said))
        for prompt, said in zip(prompts, completions, strict=True)
    ]
    rows = plan([len(example.input_ids) for example in examples], work.minibatch_tokens)
    return [pack([examples[i] for i in each]) for each in rows]


@torch.no_grad()
def said(judge: Judge, pack: Packed) -> Tensor:
    with _precision(pack.input_ids.device):
        return judge(pack)


@torch.no_grad()
def logp_of(roles: Roles, name: str, pack: Packed) -> Tensor:  # (T,)
    with _precision(pack.input_ids.device):
        return linear_logprobs(roles[name].hidden(pack), roles[name].head(), pack.batch.target)


def with_logp(roles: Roles, pack: Packed) -> Packed:
    return _with(pack, old_logp=logp_of(roles, "policy", pack), ref_logp=logp_of(roles, "reference", pack))


def with_advantages(packs: Sequence[Packed], scores: Sequence[Tensor]) -> list[Packed]:
    """A completion that was cut off counts as ended, as in TRL."""
    batches = [pack.batch for pack in packs]
    rewards = [kl_in_reward(score, b.old_logp, b.ref_logp, b) for score, b in zip(scores, batches, strict=True)]
    found = [gae(reward, b.old_value, b) for reward, b in zip(rewards, batches, strict=True)]
    white = whiten(torch.cat([advantage for advantage, _ in found]), torch.cat([b.target for b in batches]) != -100)
    parts = white.split([len(b.target) for b in batches])
    return [_with(p, advantage=a, return_=r) for p, a, (_, r) in zip(packs, parts, found, strict=True)]


def update(roles: Roles, optimizer: torch.optim.Optimizer, pack: Packed) -> Tensor:  # ()
    """Policy and value have adapters of their own: one backward pass after the other, then one step."""
    batch, precision = pack.batch, _precision(pack.input_ids.device)
    with precision:
        loss = fused_loss(losses.ppo, roles.policy.hidden(pack), roles.policy.head(), batch)
    assert isinstance(loss, Tensor)
    loss.backward()
    with precision:
        error = losses.value(roles.value(pack), batch)[batch.kept].mean()
    error.backward()
    optimizer.step()
    optimizer.zero_grad()
    return (loss + error).detach()


def step(
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Sequence[int]],
    work: Work,
    seed: int,
    judge: Judge | None = None,  # None: the reward role
    meter: Meter = lambda name, run: run(),
) -> Step:
    completions = meter("rollout", lambda: rollout(roles, prompts, work, seed))
    device = next(roles.policy.model.parameters()).device
    packs = [pack.to(device) for pack in packed(prompts, completions, work)]
    scores = meter("reward", lambda: [said(judge or roles.reward.at_ends, pack) for pack in packs])
    packs = meter("logp", lambda: [with_logp(roles, pack) for pack in packs])
    packs = meter("values", lambda: [_with(pack, old_value=said(roles.value, pack)) for pack in packs])
    packs = meter("advantages", lambda: with_advantages(packs, scores))
    found = meter("updates", lambda: [update(roles, optimizer, pack) for _ in range(work.epochs) for pack in packs])
    return Step(packs, torch.cat(scores), bool(torch.stack(found).isfinite().all()))


def _with(pack: Packed, **known: Tensor) -> Packed:
    """The pack, of whose tokens this is known as well."""
    return replace(pack, batch=replace(pack.batch, **known))


def _precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)
