"""Preferences without a reference: CPO (arXiv:2401.08417), SimPO (arXiv:2405.14734), ORPO (arXiv:2403.07691).

One loop and three losses: there is one model, and one pass of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

from fastpost import losses, metrics
from fastpost.data import Verb
from fastpost.trainers.checkpoint import check_output_dir
from fastpost.trainers.config import Cpo, Orpo, Simpo
from fastpost.trainers.examples import read_examples
from fastpost.trainers.given import Given, read_data
from fastpost.trainers.loop import without_dropout
from fastpost.trainers.options import check_config
from fastpost.trainers.pairs import Objective, backward, evaluate, read_pairs, tokens_of
from fastpost.trainers.run import Run
from fastpost.trainers.start import start


def cpo(config: Cpo, **given: Unpack[Given]) -> Any:
    """Trains config.model on the pairs of config.dataset and leaves the result in config.output_dir; returns it."""
    check_config(config, Cpo)
    return _train("cpo", config, given)


def simpo(config: Simpo, **given: Unpack[Given]) -> Any:
    """As `cpo`, with another loss."""
    check_config(config, Simpo)
    return _train("simpo", config, given)


def orpo(config: Orpo, **given: Unpack[Given]) -> Any:
    """As `cpo`, with another loss."""
    check_config(config, Orpo)
    return _train("orpo", config, given)


def objective_of(config: Cpo | Simpo | Orpo) -> Objective:
    """The loss with its knobs. The rewards that are shown are what it compares: of a token, but for CPO."""
    shown = partial(metrics.preference, beta=config.beta, average=not isinstance(config, Cpo))
    if isinstance(config, Orpo):
        return Objective(losses.orpo.bind(beta=config.beta), shown)
    knobs = {"beta": config.beta, "label_smoothing": config.label_smoothing, "cpo_alpha": config.cpo_alpha}
    if isinstance(config, Cpo):
        return Objective(losses.cpo.bind(**knobs), shown)
    return Objective(losses.simpo.bind(**knobs, simpo_gamma=config.simpo_gamma), shown)


def _train(verb: Verb, config: Cpo | Simpo | Orpo, given: Given) -> Any:
    check_output_dir(config)
    objective = objective_of(config)
    rows = read_data(config, given, verb)
    begun = start(config, given)
    model = begun.model
    if config.disable_dropout:
        without_dropout(model)
    data, facts = read_examples(rows, verb, begun.tokenizer, partial(read_pairs, begun, config))
    with Run(verb, config, begun, len(data["train"]), data=facts) as run:
        for _ in run.steps():
            window = [data["train"][i] for i in run.take()]
            run.update(backward(model, window, objective, config, run.world), tokens_of(window))
            if run.evaluates and "eval" in data:
                run.note(evaluate(model, data["eval"], objective, config, run.world))
    return run.finish()
