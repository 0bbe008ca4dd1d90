"""Samples are keyed: of the right distribution, and the same ones whatever is sampled beside them."""

from dataclasses import replace
from itertools import chain

import pytest
import torch

pytest.importorskip("transformers")

import rules
import tiny
from fastpost.rollout import Sampling, generate
from fastpost.rollout.keyed import inverse_cdf, uniforms

TOKENIZER = tiny.tokenizer()
PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34], [40, 41], [50, 51, 52, 53]]
SAMPLING = Sampling(max_completion_length=8, seed=3)


def ids_of(completions):
    return [completion.ids for completion in completions]


def next_logits(model, prompt):
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1].double()


# ---- uniforms ----


def test_uniforms_depend_on_seed_key_sample_and_position_alone():
    rows = {of: uniforms(*of, 50) for of in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**40, 0), (0, -1, 0)]}
    assert len({float(u) for row in rows.values() for u in row}) == 50 * len(rows)
    assert torch.equal(uniforms(1, 0, 0, 7), rows[1, 0, 0][:7])
    assert not torch.equal(uniforms(1, 11, 1, 3), uniforms(11, 1, 1, 3))


def test_uniforms_are_uniform():
    """Chi-square of 100 bins, and of pairs of neighbours in 10 x 10, within five sigma; and they are fine-grained."""
    u = torch.stack([uniforms(7, key, sample, 20) for key in range(100) for sample in range(10)])
    assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()
    bins = (u.flatten() * 100).long()
    pairs = (u[:, 1:] * 10).long() * 10 + (u[:, :-1] * 10).long()
    for found in (bins, pairs.flatten()):
        counts = torch.bincount(found, minlength=100)
        expected = counts.sum() / 100
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert 99 - 5 * (2 * 99) ** 0.5 < chi2 < 99 + 5 * (2 * 99) ** 0.5
    assert len(u.unique()) == u.numel() and (u * 2**24 % 1 != 0).any()


# ---- from a uniform to a token ----


@pytest.mark.parametrize("V", [1, 2, 97, 1000])
def test_a_grid_of_uniforms_gives_each_token_its_share(V):
    """n evenly spaced points fall into an interval of length p at most one time more or less than n p."""
    logits = 3 * torch.randn(V, generator=torch.Generator().manual_seed(V))
    n = 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = torch.bincount(inverse_cdf(logits.expand(n, V), u), minlength=V)
    assert ((counts - n * logits.double().softmax(-1)).abs() <= 1).all()


def test_a_token_of_probability_zero_is_never_chosen():
    smallest, largest = 0.0, 1 - 2.0**-53
    logits = torch.full((2, 6), -torch.inf)
    logits[:, [1, 4]] = torch.tensor([1.0, 0.5])
    assert inverse_cdf(logits, torch.tensor([smallest, largest], dtype=torch.float64)).tolist() == [1, 4]
    p = logits[0].double().softmax(-1)
    beside = torch.tensor([p[1] - 1e-12, p[1] + 1e-12])
    assert inverse_cdf(logits, beside).tolist() == [1, 4]


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8}])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_samples_follow_the_policy(temperature, filters):
    """Whatever the model's own config says. Chi-square against exact probabilities, within five sigma."""
    model = tiny.model()
    p = allowed(next_logits(model, PROMPTS[0]) / temperature, **filters)
    model.generation_config.top_k = 1
    model.generation_config.suppress_tokens = [int(p.argmax())]
    n = 4000
    one = Sampling(temperature=temperature, max_completion_length=1, seed=3, **filters)
    found = generate(model, TOKENIZER, PROMPTS[:1], one, num_generations=n, batch_size=n)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=97)
    assert (counts[p == 0] == 0).all()
    of = p > 0
    chi2, freedom = ((counts - n * p)[of] ** 2 / (n * p)[of]).sum(), int(of.sum()) - 1
    # The variance of chi-square is 2 (freedom) and, where few are expected, at most the sum of 1 / (n p) more.
    sigma = (2 * freedom + float((1 / (n * p[of])).sum())) ** 0.5
    assert freedom - 5 * sigma < chi2 < freedom + 5 * sigma
    assert model.generation_config.top_k == 1


def allowed(logits, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution by its definition: the filters in this order, each on what the one before left."""
    p, order = logits.softmax(-1).sort(descending=True)
    if top_k:
        p[top_k:] = 0
    p /= p.sum()
    p[p.cumsum(0) - p >= top_p] = 0
    p[p < min_p * p.max()] = 0
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


def test_samples_are_independent_from_token_to_token():
    """Counts of first and second tokens, in four parts each, against the product of what the first ones leave."""
    model = tiny.model()
    two = Sampling(max_completion_length=2, seed=9)
    found = [c.ids for c in generate(model, TOKENIZER, PROMPTS[:1], two, num_generations=3000, batch_size=3000)]
    p = next_logits(model, PROMPTS[0]).softmax(-1)
    first = int(p.argmax())
    q = next_logits(model, [*PROMPTS[0], first]).softmax(-1)
    after = torch.bincount(torch.tensor([ids[1] for ids in found if ids[0] == first]), minlength=97)
    n = after.sum()
    sigma = (2 * 96 + float((1 / (n * q)).sum())) ** 0.5
    assert n > 100 and abs(((after - n * q) ** 2 / (n * q)).sum() - 96) < 5 * sigma


# ---- whatever is beside it ----


@pytest.fixture(scope="module")
def truth():
    """Completions of each prompt, by prompt."""
    found = generate(tiny.model(), TOKENIZER, PROMPTS, SAMPLING, num_generations=3, batch_size=64)
    return [ids_of(found[3 * i : 3 * i + 3]) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_whatever_the_batch(truth, batch_size):
    found = generate(tiny.model(), TOKENIZER, PROMPTS, SAMPLING, num_generations=3, batch_size=batch_size)
    assert ids_of(found) == [*chain(*truth)]
    assert len({tuple(ids) for ids in ids_of(found)}) == 15  # and all of them differ


def test_whatever_the_order(truth):
    order = [3, 0, 4, 2, 1]
    found = generate(tiny.model(), TOKENIZER, [PROMPTS[i] for i in order], SAMPLING, num_generations=3, keys=order)
    assert ids_of(found) == [*chain(*(truth[i] for i in order))]


def test_two_calls_are_one(truth):
    """As two ranks would make them."""
    model, found = tiny.model(), {}
    for part in ([0, 2, 4], [1, 3]):
        mine = generate(model, TOKENIZER, [PROMPTS[i] for i in part], SAMPLING, num_generations=3, keys=part)
        found |= {i: ids_of(mine[3 * n : 3 * n + 3]) for n, i in enumerate(part)}
    assert [found[i] for i in range(5)] == truth


def test_more_samples_and_longer_ones_begin_with_these(truth):
    found = generate(tiny.model(), TOKENIZER, PROMPTS, replace(SAMPLING, max_completion_length=11), num_generations=4)
    for i, group in enumerate(truth):
        assert [c.ids[:8] for c in found[4 * i : 4 * i + 3]] == group


def test_another_key_or_seed_is_another_sample(truth):
    keys = [7, 1, 2, 3, 4]
    found = generate(tiny.model(), TOKENIZER, PROMPTS, SAMPLING, num_generations=3, keys=keys)
    assert ids_of(found[:3]) != truth[0] and ids_of(found[3:]) == [*chain(*truth[1:])]
    other = generate(tiny.model(), TOKENIZER, PROMPTS, replace(SAMPLING, seed=4), num_generations=3)
    assert not {tuple(ids) for ids in ids_of(other)} & {tuple(ids) for group in truth for ids in group}


# ---- the sampler's log-probabilities ----


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.5}, {"temperature": 0.0}])
def test_logp_is_of_each_token_at_the_temperature_and_over_the_whole_vocabulary(how):
    model = tiny.model()
    model.generation_config.eos_token_id = [1, 13, 22, 54]
    found = generate(model, TOKENIZER, PROMPTS, replace(SAMPLING, **how), num_generations=2, batch_size=3)
    assert any(c.finished for c in found) or how
    for i, completion in enumerate(found):
        ids = PROMPTS[i // 2] + completion.ids
        n = len(completion.ids)
        assert len(completion.logp) == n
        said = [
            like(model)(torch.tensor([ids])).logits[0, -n - 1 : -1].div(how.get("temperature", 1) or 1).log_softmax(-1)
            for like in (lambda m: m, lambda m: tiny.model().double())
        ]
        fp32, fp64 = (each.detach()[range(n), completion.ids] for each in said)
        rules.assert_close_to_truth(torch.tensor(completion.logp), fp32, fp64, "logp")
