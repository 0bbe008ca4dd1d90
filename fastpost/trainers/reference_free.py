"""Preferences without a reference: CPO (arXiv:2401.08417), SimPO (arXiv:2405.14734), ORPO (arXiv:2403.07691).

One loop and three losses: there is one model, and one pass of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

from fastpost import losses, metrics
from fastpost.data import Verb
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Cpo, Orpo, Pairs, Simpo
from fastpost.trainers.given import Given, read_data
from fastpost.trainers.loop import without_dropout
from fastpost.trainers.pairs import Objective, backward, evaluate, read_pairs, tokens_of
from fastpost.trainers.run import Run
from fastpost.trainers.start import start


def cpo(config: Cpo, **given: Unpack[Given]) -> Any:
    """Trains config.model on the pairs of config.dataset and leaves the result in config.output_dir; returns it."""
    loss = losses.cpo.bind(beta=config.beta, label_smoothing=config.label_smoothing, cpo_alpha=config.cpo_alpha)
    return _train("cpo", config, given, Objective(loss, partial(metrics.preference, beta=config.beta)))


def simpo(config: Simpo, **given: Unpack[Given]) -> Any:
    """As `cpo`; rewards are those of a token."""
    loss = losses.simpo.bind(
        beta=config.beta,
        simpo_gamma=config.simpo_gamma,
        label_smoothing=config.label_smoothing,
        cpo_alpha=config.cpo_alpha,
    )
    return _train("simpo", config, given, Objective(loss, partial(metrics.preference, beta=config.beta, average=True)))


def orpo(config: Orpo, **given: Unpack[Given]) -> Any:
    """As `simpo`."""
    shown = partial(metrics.preference, beta=config.beta, average=True)
    return _train("orpo", config, given, Objective(losses.orpo.bind(beta=config.beta), shown))


def _train(verb: Verb, config: Pairs, given: Given, objective: Objective) -> Any:
    check_output_dir(config)
    rows = read_data(config, given, verb)
    begun = start(config, given)
    model = begun.model
    if config.disable_dropout:
        without_dropout(model)
    data = {name: read_pairs(name, part, begun.tokenizer, model, config) for name, part in rows.items()}
    with Run(verb, config, begun, len(data["train"])) as run:
        for _ in run.steps():
            window = [data["train"][i] for i in run.take()]
            run.update(backward(model, window, objective, config, run.world), tokens_of(window))
            if run.evaluates and "eval" in data:
                run.note(evaluate(model, data["eval"], objective, config, run.world))
    return run.finish()
