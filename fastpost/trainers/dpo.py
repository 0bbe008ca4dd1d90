"""DPO and its kin (arXiv:2305.18290): the policy's log-ratios of a chosen and a rejected answer to a reference.

The reference is the model with its adapter off, or as it was, or another model, and reads every pair in the step that
trains on it; or all of them once, before training. Several losses are one, their weighted sum, on the statistics of one
pass: `--loss_type dpo bco sft --loss_weights 0.8 0.2 1` is MPO (arXiv:2411.10442).
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from inspect import signature
from typing import Any, Unpack

import torch

from fastpost import Batch, Loss, Stats, loss, losses, metrics
from fastpost.losses.mixed import mixed
from fastpost.losses.preference import chosen_nll
from fastpost.packing import Packed
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Contrasted, Dpo
from fastpost.trainers.examples import read_examples
from fastpost.trainers.given import GivenReference, read_data
from fastpost.trainers.loop import without_dropout
from fastpost.trainers.options import check_config
from fastpost.trainers.pairs import Objective, backward, evaluate, read_pairs, tokens_of, with_reference
from fastpost.trainers.reference import reference_of
from fastpost.trainers.run import Run
from fastpost.trainers.start import start

TRLS = {"sigmoid": "dpo", "exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco", "sppo_hard": "sppo"}
CHOSEN_NLL = loss(unit="pair")(chosen_nll)  # `sft` among losses of pairs
KNOBS = ("label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "discopop_tau")
KNOBS += ("use_weighting", "rpo_alpha")


def dpo(config: Dpo, **given: Unpack[GivenReference]) -> Any:
    """Trains config.model on the pairs of config.dataset and leaves the result in config.output_dir; returns it."""
    check_config(config, Dpo)
    check_output_dir(config)
    objective = objective_of(config)
    rows = read_data(config, given, "dpo")
    begun = start(config, given)
    model = begun.model
    if config.disable_dropout:
        without_dropout(model)
    data, facts = read_examples(rows, "dpo", begun.tokenizer, partial(read_pairs, begun, config))
    reference = indifferent if config.reference_free else reference_of(begun, config, given).scored
    with Run("dpo", config, begun, len(data["train"]), data=facts) as run:
        if config.precompute_ref_log_probs:
            data = {name: with_reference(pairs, reference, config, run.world) for name, pairs in data.items()}
            reference = indifferent
        objective = replace(objective, reference=run.clock.part("reference")(reference))
        for _ in run.steps():
            window = [data["train"][i] for i in run.take()]
            run.update(backward(model, window, objective, config, run.world), tokens_of(window))
            if run.evaluates and "eval" in data:
                run.note(evaluate(model, data["eval"], objective, config, run.world))
    return run.finish()


def objective_of(config: Dpo) -> Objective:
    """The losses with their knobs, and what the log shows of them."""
    return Objective(loss_of(config), partial(_shown, config))


def loss_of(config: Contrasted) -> Loss:
    """The losses with their knobs. ValueError for a knob that none of them has."""
    chosen = [_named(name) for name in config.loss_type]
    defaults = {field.name: field.default for field in fields(config)}
    given = {name: getattr(config, name) for name in KNOBS if getattr(config, name) != defaults[name]}
    for name in given:
        if not any(name in signature(each).parameters for each in chosen):
            raise ValueError(f"loss_type {', '.join(config.loss_type)} has no {name}: leave it out")
    given["beta"] = config.beta
    bound = [each.bind(**{n: x for n, x in given.items() if n in signature(each).parameters}) for each in chosen]
    if len({each.unit for each in bound}) > 1:
        raise ValueError("loss_type aot and aot_unpaired look at a whole microbatch: they cannot be mixed with others")
    weights = config.loss_weights or (1.0,) * len(bound)
    alone = len(bound) == 1 and weights == (1.0,)
    return bound[0] if alone else mixed(bound, weights)


def _named(name: str) -> Loss:
    return CHOSEN_NLL if name == "sft" else getattr(losses, TRLS.get(name, name))


def _shown(config: Dpo, stats: Stats, batch: Batch) -> dict[str, metrics.Part]:
    shown = metrics.preference(stats, batch, beta=config.beta)
    return shown if config.reference_free else shown | metrics.displacement(stats, batch)


def indifferent(packed: Packed) -> Packed:
    """With a ref_logp that prefers nothing."""
    none = torch.zeros(packed.num_tokens, device=packed.input_ids.device)
    return replace(packed, batch=replace(packed.batch, ref_logp=none))
