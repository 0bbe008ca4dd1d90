"""Generation: the right tokens in the right order, from the seed alone, with everything put back."""

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from fastpost.rollout import Sampling, generate

TOKENIZER = tiny.tokenizer()
PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34], [40, 41]]


def by_hand(model, prompt, steps, ends=(1,)):
    """Greedy decoding without a cache, a mask or padding."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_is_greedy_whatever_the_batch(batch_size):
    model = tiny.model()
    greedy = Sampling(temperature=0, max_completion_length=6)
    found = generate(model, TOKENIZER, PROMPTS, greedy, num_generations=2, batch_size=batch_size)
    assert [c.ids for c in found] == [by_hand(model, p, 6) for p in PROMPTS for _ in range(2)]


def test_a_completion_ends_with_its_eos():
    model = tiny.model()
    greedy = Sampling(temperature=0, max_completion_length=6)
    before = generate(model, TOKENIZER, PROMPTS[:1], greedy)[0]
    assert not before.finished and len(before.ids) == 6
    model.generation_config.eos_token_id = [1, before.ids[2]]
    cut = generate(model, TOKENIZER, PROMPTS[:1], greedy)[0]
    first = before.ids.index(before.ids[2])
    assert cut.finished and cut.ids == before.ids[: first + 1]


def test_samples_follow_the_policy():
    """At temperature 2 the first token's frequencies are softmax(logits / 2), whatever the model's own config says."""
    model = tiny.model()
    with torch.no_grad():
        p = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 2).softmax(-1)
    model.generation_config.top_k = 1
    model.generation_config.suppress_tokens = [int(p.argmax())]
    draws = 4000
    one = Sampling(temperature=2.0, max_completion_length=1, seed=3)
    found = generate(model, TOKENIZER, PROMPTS[:1], one, num_generations=draws, batch_size=draws)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=97)
    chi2 = ((counts - draws * p) ** 2 / (draws * p)).sum()
    assert 96 - 5 * (2 * 96) ** 0.5 < chi2 < 96 + 5 * (2 * 96) ** 0.5  # 96 degrees of freedom, five sigma
    assert model.generation_config.top_k == 1


def test_top_k_top_p_and_min_p_cut_the_tail():
    model = tiny.model()
    with torch.no_grad():
        p = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    order = p.sort(descending=True)
    within = {
        "top_k": (2, set(order.indices[:2].tolist())),
        "top_p": (0.5, set(order.indices[: int((order.values.cumsum(0) < 0.5).sum()) + 1].tolist())),
        "min_p": (0.3, set((p >= 0.3 * p.max()).nonzero().flatten().tolist())),
    }
    for name, (value, allowed) in within.items():
        sampling = Sampling(max_completion_length=1, **{name: value})
        found = generate(model, TOKENIZER, PROMPTS[:1], sampling, num_generations=300, batch_size=300)
        assert {c.ids[0] for c in found} == allowed, name


def test_the_seed_decides_and_the_global_state_stays():
    model = tiny.model().train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    runs = [generate(model, TOKENIZER, PROMPTS, Sampling(seed=s, max_completion_length=4)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_checkpointing_and_adapters_do_not_change_what_is_generated():
    from peft import LoraConfig, get_peft_model

    greedy = Sampling(temperature=0, max_completion_length=4)
    truth = generate(tiny.model(), TOKENIZER, PROMPTS, greedy)
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert generate(model, TOKENIZER, PROMPTS, greedy) == truth  # an untrained adapter adds zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert generate(model, TOKENIZER, PROMPTS, greedy) != truth
    assert model.training


def test_progress_counts_completions():
    done = []
    sampling = Sampling(temperature=0, max_completion_length=1)
    generate(tiny.model(), TOKENIZER, PROMPTS, sampling, num_generations=2, batch_size=3, progress=done.append)
    assert done == [3, 3, 2]


def test_bad_input_is_named():
    model = tiny.model()
    with pytest.raises(ValueError, match=r"prompt_ids\[1\] is empty"):
        generate(model, TOKENIZER, [[1], []], Sampling())
    with pytest.raises(
        ValueError, match=r"a prompt of 2 tokens and max_completion_length 127 are more than the .* 128"
    ):
        generate(model, TOKENIZER, [[1, 2]], Sampling(max_completion_length=127))
    with pytest.raises(ValueError, match="num_generations must be at least 1, got 0"):
        generate(model, TOKENIZER, [[1]], Sampling(max_completion_length=2), num_generations=0)
    for name, value in {"temperature": -1, "top_p": 0.0, "top_k": -1, "min_p": 2.0, "max_completion_length": 0}.items():
        with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
            Sampling(**{name: value})
    assert generate(model, TOKENIZER, [], Sampling(max_completion_length=2)) == []
