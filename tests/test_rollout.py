"""Generation: the right tokens in the right order, from the seed alone, with everything put back."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from fastpost.rollout import Sampling, generate

TOKENIZER = tiny.tokenizer()
PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34], [40, 41]]


def ids_of(completions):
    return [completion.ids for completion in completions]


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
    assert ids_of(found) == [by_hand(model, p, 6) for p in PROMPTS for _ in range(2)]


def test_a_completion_ends_with_its_eos():
    model = tiny.model()
    greedy = Sampling(temperature=0, max_completion_length=6)
    before = generate(model, TOKENIZER, PROMPTS[:1], greedy)[0]
    assert not before.finished and len(before.ids) == 6
    model.generation_config.eos_token_id = [1, before.ids[2]]
    cut = generate(model, TOKENIZER, PROMPTS[:1], greedy)[0]
    first = before.ids.index(before.ids[2])
    assert cut.finished and cut.ids == before.ids[: first + 1]


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
    truth = ids_of(generate(tiny.model(), TOKENIZER, PROMPTS, greedy))
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert ids_of(generate(model, TOKENIZER, PROMPTS, greedy)) == truth  # an untrained adapter adds zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert ids_of(generate(model, TOKENIZER, PROMPTS, greedy)) != truth
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
    with pytest.raises(ValueError, match=r"prompt_ids\[1\] has 128 tokens, which leaves no room .* 128 positions"):
        generate(model, TOKENIZER, [[1], [2] * 128], Sampling(max_completion_length=2))
    with pytest.raises(ValueError, match=r"top_k must be at most the 97 tokens .* got 98"):
        generate(model, TOKENIZER, [[1]], Sampling(max_completion_length=2, top_k=98))
    with pytest.raises(ValueError, match="keys must be one a prompt: got 1 for 2"):
        generate(model, TOKENIZER, [[1], [2]], Sampling(max_completion_length=2), keys=[5])
    with pytest.raises(ValueError, match="keys must differ, got 5 twice"):
        generate(model, TOKENIZER, [[1], [2]], Sampling(max_completion_length=2), keys=[5, 5])
    assert generate(model, TOKENIZER, [], Sampling(max_completion_length=2)) == []


BAD = [
    ("repetition_penalty", 0),
    ("temperature", -1),
    ("top_k", -1),
    ("top_p", 0.0),
    ("min_p", 2.0),
    ("max_completion_length", 0),
    ("stop", ("",)),
    ("stop", "end"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {re.escape(repr(value))}"):
        Sampling(**{name: value})


def test_logits_that_are_not_finite_are_reported():
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits are not finite at token 0 of completion 0"):
            generate(model, TOKENIZER, PROMPTS, Sampling(temperature=temperature, max_completion_length=2))


def text_of(ids) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(length):
    model, sampling = tiny.model(), Sampling(max_completion_length=12)
    free = generate(model, TOKENIZER, PROMPTS, sampling, num_generations=2)
    stop = text_of(free[3].ids[2 : 2 + length])
    found = generate(model, TOKENIZER, PROMPTS, replace(sampling, stop=(stop, "~never~")), num_generations=2)
    for before, after in zip(free, found, strict=True):
        at = text_of(before.ids).find(stop)
        assert after.finished == (before.finished or at >= 0)
        # One token a character; a special one has more, and none is in these.
        assert after.ids == (before.ids if at < 0 else before.ids[: at + length])
        assert len(after.logp) == len(after.ids)
    assert len(found[3].ids) <= 2 + length and found[3].finished


def test_generation_itself_stops_at_a_stop_string():
    """And is not only cut: after the last row's stop no step is taken."""
    model, calls = tiny.model(), []
    greedy = Sampling(temperature=0, max_completion_length=30)
    third = generate(model, TOKENIZER, PROMPTS[:1], greedy)[0].ids[2]
    model.register_forward_hook(lambda *_: calls.append(1))
    found = generate(model, TOKENIZER, PROMPTS[:1], replace(greedy, stop=(text_of([third]),)))[0]
    assert len(found.ids) == len(calls) <= 3


def test_a_stop_string_in_the_prompt_stops_nothing():
    """Nor does one that begins there."""
    model, greedy = tiny.model(), Sampling(temperature=0, max_completion_length=4)
    free = generate(model, TOKENIZER, PROMPTS, greedy)
    across = text_of([PROMPTS[0][-1], free[0].ids[0]])
    assert ids_of(generate(model, TOKENIZER, PROMPTS, replace(greedy, stop=(across,)))) == ids_of(free)


def test_the_repetition_penalty_is_on_what_was_said_and_not_on_the_padding():
    """The padding is what the shortest prompt would say, so that a penalty on it would be seen."""
    model, penalty = tiny.model(), 1.7
    sampling = Sampling(temperature=0, max_completion_length=6, repetition_penalty=penalty)
    alone = [generate(model, TOKENIZER, [prompt], sampling)[0].ids for prompt in PROMPTS]
    padding = SimpleNamespace(eos_token_id=1, pad_token_id=alone[1][0])
    found = generate(model, padding, PROMPTS, sampling)
    assert ids_of(found) == alone
    for prompt, said in zip(PROMPTS, alone, strict=True):
        ids = list(prompt)
        for token in said:
            logits = model(torch.tensor([ids])).logits[0, -1].detach()
            seen = torch.tensor(sorted(set(ids)))
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            assert token == int(logits.argmax())
            ids.append(token)
