"""KTO (arXiv:2402.01306): answers that are desirable or not, each by itself, against a reference and a baseline.

The baseline z_0 is what the policy has gained on the reference where nothing was asked for: on completions behind
prompts that are not theirs, in mean over the rows of a step. As in TRL each prompt has the completion of the row before
it, the first that of the last; and z_0 is a constant, at least 0. `apo_zero_unpaired` (arXiv:2408.06266) has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from fastpost import losses, metrics
from fastpost.data import Counts, Unpaired, joined, unpaired_examples
from fastpost.doctor.checks import label_problems
from fastpost.files import Rows
from fastpost.models.trunk import positions
from fastpost.packing import Example, Packed, pack, placeholder
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Kto
from fastpost.trainers.examples import read_examples, say_problems
from fastpost.trainers.given import GivenReference, read_data
from fastpost.trainers.log import say
from fastpost.trainers.loop import autocast, bins, check_lengths, evaluating, the_device, without_dropout
from fastpost.trainers.options import check_config
from fastpost.trainers.pairs import losses_of
from fastpost.trainers.reference import Reference, reference_of
from fastpost.trainers.run import Run
from fastpost.trainers.start import Start, start
from fastpost.trainers.world import ALONE, World
from fastpost.types import IGNORE
from fastpost.weights import Window, sequence_mean

LOSSES = {"kto": losses.kto, "apo_zero_unpaired": losses.apo_zero_unpaired}
SHOWN = ("entropy", "mean_logp", "lse")  # statistics that only the log reads
Scored = Callable[[Packed], Packed]  # with ref_logp
BALANCED = (1.0, 4 / 3)  # the paper's advice: the weight of all desirable rows over that of all others


def kto(config: Kto, **given: Unpack[GivenReference]) -> Any:
    """Trains config.model on the labelled rows of config.dataset and leaves the result in config.output_dir."""
    check_config(config, Kto)
    check_output_dir(config)
    rows = read_data(config, given, "kto")
    begun = start(config, given)
    model = begun.model
    if config.disable_dropout:
        without_dropout(model)
    data, facts = read_examples(rows, "kto", begun.tokenizer, partial(_unpaired, begun, config))
    _say_balance(data["train"], config)
    scored = reference_of(begun, config, given).scored
    with Run("kto", config, begun, len(data["train"]), data=facts) as run:
        reference = run.clock.part("reference")(scored)
        for _ in run.steps():
            window = [data["train"][i] for i in run.take()]
            tokens = sum(len(each.input_ids) for each in _examples(window))
            run.update(backward(model, window, reference, config, run.world), tokens)
            if run.evaluates and "eval" in data:
                run.note(evaluate(model, data["eval"], reference, config, run.world))
    return run.finish()


def _unpaired(begun: Start, config: Kto, name: str, rows: Rows) -> tuple[list[Unpaired], Counts]:
    room = positions(begun.model)
    found, counts = unpaired_examples(rows, begun.tokenizer, config.max_length, positions=room, path=name)
    check_lengths([len(each.input_ids) for each in _examples(found)], room, config)
    return found, counts


def _say_balance(rows: Sequence[Unpaired], config: Kto) -> None:
    """Where one label outweighs the other beyond the paper's advice, with the weights that would mend it."""
    desirable = sum(one.label for one in rows)
    other = len(rows) - desirable
    say_problems("train", label_problems(desirable, other))
    ours, theirs = config.desirable_weight * desirable, config.undesirable_weight * other
    if BALANCED[0] * theirs <= ours <= BALANCED[1] * theirs:
        return
    said = f"{desirable} desirable rows and {other} undesirable ones"
    if ours and theirs:
        low, high = (ratio * theirs / desirable for ratio in BALANCED)
        said += f": a desirable_weight from {low:.3g} to {high:.3g} would balance them"
    say(said)


def _examples(rows: Sequence[Unpaired]) -> list[Example]:
    return [joined(one.prompt_ids, one.completion_ids, None) for one in rows]


def backward(
    model: Any, window: Sequence[Unpaired], reference: Scored, config: Kto, world: World = ALONE
) -> dict[str, float]:
    """Adds the gradient of the mean loss over all rows of the window, and of a router's; returns means."""
    examples = _examples(window)
    lengths = [len(example.input_ids) for example in examples]
    whole = Window(sum(len(example.predicted) for example in examples), len(examples), world.size)
    baseline = {"kl": kl(model, window, reference, config, world)} if config.loss_type == "kto" else {}
    loss_of = LOSSES[config.loss_type].bind(
        beta=config.beta, desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight
    )
    seen = {}
    for rows in world.turns(world.share(bins(lengths, config), lengths)):
        label = torch.tensor([window[i].label for i in rows] or [True])
        packed = pack([examples[i] for i in rows] or placeholder(), label=label, **baseline).to(the_device())
        packed = reference(packed)
        weight = sequence_mean(packed.batch, whole, "sequence")
        packed = replace(packed, batch=replace(packed.batch, weight=weight))
        with autocast(config):
            work = partial(losses_of, model, packed, loss_of, sum(lengths) / world.size, config, SHOWN)
            loss, balance, stats, of_router = world.through(work)
        if torch.is_grad_enabled():
            (loss + balance).backward()
        shown = {"loss": metrics.total(loss / world.size)} | metrics.kto(stats, packed.batch, beta=config.beta)
        seen = metrics.joined(seen, shown, of_router)
    return metrics.floats(metrics.over_ranks(seen))


def kl(model: Any, window: Sequence[Unpaired], reference: Scored, config: Kto, world: World = ALONE) -> Tensor:  # ()
    """The baseline of a step; 0 where a row is alone in it, as the last of an epoch may be."""
    if len(window) < 2:
        return torch.zeros(())
    limit = min(x for x in (config.max_length, config.max_tokens_per_batch, positions(model), 2**31) if x is not None)
    others = [window[-1], *window[:-1]]
    mates = [joined(one.prompt_ids, o.completion_ids, limit) for one, o in zip(window, others, strict=True)]
    lengths = [len(mate.input_ids) for mate in mates]
    policy, seen = Reference.now(model, config, world), {}
    for rows in world.share(bins(lengths, config), lengths):
        packed = reference(pack([mates[i] for i in rows] or placeholder()).to(the_device()))
        batch = packed.batch
        gained = torch.where(batch.target != IGNORE, policy.logp(packed) - batch.ref_logp, 0.0)
        seen = metrics.joined(seen, {"kl": metrics.mean(batch.per_sequence(gained)[: len(rows)])})
    return torch.tensor(metrics.floats(metrics.over_ranks(seen))["kl"]).clamp(min=0)


@torch.no_grad()
def evaluate(
    model: Any, rows: Sequence[Unpaired], reference: Scored, config: Kto, world: World = ALONE
) -> dict[str, float]:
    """The same means over held-out rows, without gradients."""
    with evaluating(model):
        values = backward(model, rows, reference, config, world)
    return {f"eval_{name}": value for name, value in values.items()}
