"""transformers' continuous batching: the policy's tokens, and their log-probabilities where they are the policy's."""

import pytest
import torch

pytest.importorskip("transformers")

import rules
import tiny
from fastpost.models.attention import NAME, register
from fastpost.rollout import Sampling, generate
from fastpost.rollout.continuous import Continuous

TOKENIZER = tiny.tokenizer()
PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
MEMORY = 0.05  # of what is free: others are on this machine, too


@pytest.fixture
def model():
    """As `load_model` leaves one, with packed attention of our own, and in the midst of training."""
    found = tiny.model()
    found.set_attn_implementation(register())
    return found.train()


def test_greedy_is_generate(model):
    greedy = Sampling(temperature=0, max_completion_length=6)
    state = torch.get_rng_state()
    found = Continuous(model, TOKENIZER, MEMORY)(PROMPTS, greedy, 2)
    assert [c.ids for c in found] == [c.ids for c in generate(model, TOKENIZER, PROMPTS, greedy, num_generations=2)]
    assert model.config._attn_implementation == NAME and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_logp_is_what_the_trainer_would_say(model):
    sampling = Sampling(temperature=0.7, max_completion_length=8)
    found = Continuous(model, TOKENIZER, MEMORY)(PROMPTS, sampling, 2)
    assert len({tuple(c.ids) for c in found}) == 6
    for i, completion in enumerate(found):
        ids, n = PROMPTS[i // 2] + completion.ids, len(completion.ids)
        said = [
            like(torch.tensor([ids])).logits[0, -n - 1 : -1].div(0.7).log_softmax(-1)
            for like in (tiny.model(), tiny.model().double())
        ]
        fp32, fp64 = (each.detach()[range(n), completion.ids] for each in said)
        rules.assert_close_to_truth(torch.tensor(completion.logp), fp32, fp64, "logp")


def test_of_what_a_filter_left_there_is_no_logp(model):
    found = Continuous(model, TOKENIZER, MEMORY)(PROMPTS, Sampling(top_k=3, max_completion_length=4))
    assert all(len(c.ids) == 4 and c.logp == [] for c in found)


def test_a_stop_string_cuts(model):
    greedy = Sampling(temperature=0, max_completion_length=8)
    sampler = Continuous(model, TOKENIZER, MEMORY)
    free = sampler(PROMPTS[:1], greedy)[0]
    text = str(TOKENIZER.decode(free.ids[2:4]))
    cut = sampler(PROMPTS[:1], Sampling(temperature=0, max_completion_length=8, stop=(text,)))[0]
    assert cut.finished and cut.ids == free.ids[:4]


@pytest.mark.parametrize("what", [{"min_p": 0.1}, {"repetition_penalty": 1.2}])
def test_what_it_has_not_is_refused(model, what):
    with pytest.raises(ValueError, match="has no repetition_penalty and no min_p"):
        Continuous(model, TOKENIZER, MEMORY)(PROMPTS, Sampling(max_completion_length=4, **what))


def test_completions_that_never_came_are_an_error(model, monkeypatch):
    """transformers logs what goes wrong, and returns the rest."""

    def broken(*_, **__):
        raise ValueError("no such thing")

    sampler = Continuous(model, TOKENIZER, MEMORY)
    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="finished 0 of 3 completions"):
        sampler(PROMPTS, Sampling(max_completion_length=4))
