"""Roles on one base are what separate models are, bit for bit; and any of them may be a model of its own."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

import fastpost as fp
import tiny
from decoders import Doubles
from fastpost.models.roles import Copied, Roles, Shared
from fastpost.models.trunk import hidden_states
from fastpost.packing import Example, pack
from fastpost.rollout import Sampling, generate
from fastpost.shared_prompt import share_prompts
from role_models import ENDS, PACKED, ROWS, base, checkpointed, four_bits, learnt, lora, ppo, same, write_reward
from rules import assert_close_to_truth


def alone(model, role):
    """The role as a model of its own: this copy of the base, the same adapter and no other, and the same head."""
    if role.adapter is not None:
        config = copy.deepcopy(role.model.peft_config[role.adapter])
        config.inference_mode = not role.trained
        model = PeftModel(model, config)
        state = get_peft_model_state_dict(role.model, adapter_name=role.adapter)
        assert not set_peft_model_state_dict(model, state).unexpected_keys
    return model.train(role.trained), copy.deepcopy(role.scalar)


def step_of_roles(roles):
    """The numbers of a step of PPO, and one backward pass through policy and value, when no role is switched on."""
    torch.manual_seed(1)
    with torch.no_grad():
        hidden = roles.reference.hidden(PACKED)
        reference_logp = fp.linear_logprobs(hidden, roles.reference.head(), PACKED.batch.target)
    score = roles.reward.at_ends(PACKED)
    stats = fp.token_stats(
        roles.policy.hidden(PACKED), roles.policy.head(), PACKED.batch.target, outputs=("logp", "entropy")
    )
    values = roles.value(PACKED)
    return [reference_logp, score, stats.logp, stats.entropy, values]


def step_of_models(models):
    """The same, each model by its own plain call."""
    torch.manual_seed(1)
    with torch.no_grad():
        model = models["reference"][0]
        hidden = hidden_states(model, PACKED)[0]
        reference_logp = fp.linear_logprobs(hidden, fp.Head.of(model), PACKED.batch.target)
        model, scalar = models["reward"]
        score = scalar(hidden_states(model, PACKED)[0][ENDS].float())[:, 0]
    model = models["policy"][0]
    hidden = hidden_states(model, PACKED)[0]
    stats = fp.token_stats(hidden, fp.Head.of(model), PACKED.batch.target, outputs=("logp", "entropy"))
    model, scalar = models["value"]
    values = scalar(hidden_states(model, PACKED)[0].float())[:, 0]
    return [reference_logp, score, stats.logp, stats.entropy, values]


def backward(numbers):
    _, _, logp, entropy, values = numbers
    (logp.exp().sum() + entropy.sum() + values.square().sum()).backward()


def gradients(model, scalar, adapter):
    """By name, of an adapter and of a head."""
    named = [(name.replace(f".{adapter}", ""), p) for name, p in model.named_parameters() if f".{adapter}" in name]
    named += [] if scalar is None else list(scalar.named_parameters("score"))
    return {name: p.grad for name, p in named if p.requires_grad}


def assert_same_step(roles, models):
    """The numbers of one step, and the gradients of all that trains."""
    ours, theirs = step_of_roles(roles), step_of_models(models)
    assert same(ours, theirs)
    assert not torch.equal(ours[0], ours[2]), "an adapter that adds nothing proves nothing"
    backward(ours)
    backward(theirs)
    for name, tensors in roles.trainable().items():
        mine = gradients(roles.policy.model, roles[name].scalar, name)
        truth = gradients(*models[name], "default")
        assert mine.keys() == truth.keys() and len(mine) == len(tensors)
        assert all(torch.equal(g, truth[key]) for key, g in mine.items())
        assert all(g.norm() > 0 for g in mine.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen3", {"head_dim": 8})])
def test_four_roles_on_one_base_are_four_models_bit_for_bit(family, changes, dropout, checkpointing, tmp_path):
    model = base(family, **changes)
    files = write_reward(tmp_path, model, dropout=dropout)
    if checkpointing:
        checkpointed(model)
    untouched = copy.deepcopy(model)
    roles = ppo(model, files, dropout)
    models = {name: alone(copy.deepcopy(untouched), role) for name, role in roles.by_name.items()}
    assert_same_step(roles, models)


@pytest.mark.parametrize(
    ("family", "changes", "adapter"),
    [
        ("gpt2", {}, {"fan_in_fan_out": True}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 4}, {"use_dora": True}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 4, "experts_implementation": "eager"}, {}),
    ],
)
def test_so_they_are_with_other_layers_and_other_adapters(family, changes, adapter, tmp_path):
    """Transposed layers; lengths beside directions; experts that are one parameter."""
    model = base(family, **changes)
    files = write_reward(tmp_path, model)
    untouched = copy.deepcopy(checkpointed(model))
    roles = Roles.of(model, policy=lora(**adapter), reward=files, value=Copied("reward"))
    learnt(roles.policy.model)
    assert_same_step(roles, {name: alone(copy.deepcopy(untouched), role) for name, role in roles.by_name.items()})


def test_a_value_on_the_policys_adapter_shares_its_pass():
    model = base()
    roles = Roles.of(model, policy=lora(), value=Shared("policy"))
    learnt(roles.policy.model)
    torch.nn.init.normal_(roles.value.scalar.weight)
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    assert roles.value.shares_pass(roles.policy) and not roles.value.shares_pass(roles.reference)
    hidden = roles.policy.hidden(PACKED)
    stats = fp.token_stats(hidden, roles.policy.head(), PACKED.batch.target, outputs=("logp", "entropy"))
    values = roles.value.scores(hidden)
    (stats.logp.sum() + stats.entropy.sum() + values.square().sum()).backward()
    assert len(passes) == 1
    assert torch.equal(values, roles.value(PACKED))
    trained = roles.trainable()
    assert [p is roles.value.scalar.weight for p in trained["value"]] == [True]
    assert all(p.grad.norm() > 0 for tensors in trained.values() for p in tensors)


def test_an_optimizer_over_the_trainable_tensors_holds_all_that_requires_a_gradient(tmp_path):
    roles = ppo(base(), write_reward(tmp_path))
    optimizer = torch.optim.AdamW([p for tensors in roles.trainable().values() for p in tensors], 0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    scalars = [role.scalar.weight for role in roles.by_name.values() if role.scalar is not None]
    named = dict(roles.policy.model.named_parameters()) | {f"score.{i}": p for i, p in enumerate(scalars)}
    wanted = {name for name, p in named.items() if id(p) in held}
    assert wanted == {name for name, p in named.items() if p.requires_grad}
    assert wanted == {n for n in named if "lora_" in n and ".reward." not in n} | {
        f"score.{i}" for i, p in enumerate(scalars) if p is roles.value.scalar.weight
    }
    before = {name: p.clone() for name, p in named.items()}
    for _ in range(2):
        backward(step_of_roles(roles))
        optimizer.step()
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == held
        assert wanted == {name for name, p in named.items() if p.requires_grad}
    moved = {name for name, p in named.items() if not torch.equal(p, before[name])}
    assert moved == wanted


def test_a_role_that_is_not_trained_is_a_constant_and_drops_nothing(tmp_path):
    roles = ppo(base(attention_dropout=0.5), write_reward(tmp_path, dropout=0.5), dropout=0.5)
    assert roles.policy.model.training
    for role in (roles.reference, roles.reward):
        first, second = role.hidden(PACKED), role.hidden(PACKED)
        assert torch.equal(first, second) and not first.requires_grad
    assert not torch.equal(roles.policy.hidden(PACKED), roles.policy.hidden(PACKED))


def test_a_reference_is_the_base_even_where_the_policy_trains_the_head_whole():
    model = base()
    truth = fp.linear_logprobs(hidden_states(model, PACKED)[0], fp.Head.of(model), PACKED.batch.target)
    roles = Roles.of(model, policy=lora(modules_to_save=["lm_head"]))
    with torch.no_grad():
        for p in roles.trainable()["policy"]:
            p += 0.1
    logp = fp.linear_logprobs(roles.reference.hidden(PACKED), roles.reference.head(), PACKED.batch.target)
    assert torch.equal(logp, truth)
    assert roles.policy.head().weight is not roles.reference.head().weight


def test_generation_is_in_the_role_that_is_used():
    model = base()
    alone = copy.deepcopy(model)
    roles = Roles.of(model, policy=lora())
    learnt(roles.policy.model)

    def drawn(lm):  # of equal logits logsumexp may differ in the last bit, by where a tensor lies
        found = generate(lm, tiny.tokenizer(), [[5, 6, 7]] * 4, Sampling(max_completion_length=8))
        return [completion.ids for completion in found]

    with roles.using("reference"):
        assert drawn(roles.reference.model) == drawn(alone)
    assert drawn(roles.policy.model) != drawn(alone)


def test_a_policy_that_is_the_model_itself_with_models_of_their_own_beside_it(tmp_path):
    files = write_reward(tmp_path)
    judge = AutoModelForSequenceClassification.from_pretrained(files.parent / "base", num_labels=1)
    learnt(judge).save_pretrained(tmp_path / "judge")
    model = base()
    roles = Roles.of(model, reference=Copied("policy"), reward=tmp_path / "judge", value=Copied("reward"))
    truth = judge.score(judge.model(PACKED.input_ids[:, :7]).last_hidden_state)[0, -1]
    assert torch.allclose(roles.reward.at_ends(PACKED)[0], truth[0])
    numbers = step_of_roles(roles)
    backward(numbers)
    trained = roles.trainable()
    assert {id(p) for p in trained["policy"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in trained["value"]} == {id(p) for p in roles.value.model.parameters()}
    assert all(p.grad.norm() > 0 for tensors in trained.values() for p in tensors)
    for role in (roles.reference, roles.reward):
        assert not any(p.requires_grad for p in role.model.parameters())


def test_a_model_of_its_own_may_have_an_adapter(tmp_path):
    write_reward(tmp_path)
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    critic = get_peft_model(critic, lora(task_type="SEQ_CLS"))
    roles = Roles.of(base(), policy=lora(), value=critic)
    wanted = [p for p in critic.parameters() if p.requires_grad]
    assert {id(p) for p in roles.trainable()["value"]} == {id(p) for p in wanted}
    roles.value(PACKED).sum().backward()
    assert critic.get_base_model().score.modules_to_save["default"].weight.grad.norm() > 0


def test_a_teacher_may_be_an_adapter_or_another_model(tmp_path):
    model = base()
    sft = Roles.of(copy.deepcopy(model), policy=lora())
    learnt(sft.policy.model)
    sft.save(tmp_path / "sft")
    wide = base(hidden_size=64)
    truth = hidden_states(wide.eval(), PACKED)[0]
    roles = Roles.of(
        model, policy=tmp_path / "sft" / "policy", reference=tmp_path / "sft" / "policy", teacher=wide.train()
    )
    assert torch.equal(roles.teacher.hidden(PACKED), truth)
    assert torch.equal(roles.reference.hidden(PACKED), sft.policy.hidden(PACKED))
    hidden = roles.policy.hidden(PACKED)
    teacher = roles.teacher.hidden(PACKED), roles.teacher.head()
    stats = fp.token_stats(hidden, roles.policy.head(), PACKED.batch.target, outputs=("forward_kl",), reference=teacher)
    assert (stats.forward_kl[PACKED.batch.kept] > 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_bits_hold_one_base_for_all(tmp_path, checkpointing):
    pytest.importorskip("bitsandbytes")
    files = write_reward(tmp_path, base(hidden_size=64, intermediate_size=128))

    def load():
        model = four_bits(tmp_path / "base")
        return checkpointed(model) if checkpointing else model

    roles = ppo(load(), files)
    models = {name: alone(load(), role) for name, role in roles.by_name.items()}
    assert_same_step(roles, models)


def test_four_bits_that_nobody_prepared_keep_their_gradient(tmp_path):
    """bitsandbytes repacks a weight on a CPU when it is first used in eval mode, here by the reference."""
    pytest.importorskip("bitsandbytes")
    base(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    found = []
    for prepared in (True, False):
        torch.manual_seed(0)
        roles = Roles.of(four_bits(tmp_path, prepared), policy=lora())
        learnt(roles.policy.model)
        roles.reference.hidden(PACKED)
        roles.policy.hidden(PACKED).float().square().sum().backward()
        found.append([p.grad for p in roles.trainable()["policy"]])
    assert same(*found) and all(gradient.norm() > 0 for gradient in found[0])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_role_reads_a_shared_prompt_as_it_reads_a_repeated_one(family, tmp_path):
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    model = base(family, **(changes if family == "qwen3_moe" else {}))
    roles = ppo(model, write_reward(tmp_path, model))
    rows = [[*ROWS[0], *rest] for rest in (ROWS[3], [12], ROWS[0])]
    plain = pack([Example(row, [i >= 7 for i in range(len(row))]) for row in rows])
    shared = share_prompts(plain, 3)

    def numbers(packed, rows):
        hidden = {name: role.hidden(packed)[rows] for name, role in roles.by_name.items()}
        found = hidden | {"values": roles.value(packed)[rows], "ends": roles.reward.at_ends(packed)}
        if family == "qwen3_moe":
            same_hidden, found["router loss"] = roles.policy.hidden_and_router_loss(packed)
            assert torch.equal(same_hidden[rows], hidden["policy"]) and found["router loss"].requires_grad
            constant = roles.reference.hidden_and_router_loss(packed)[1]
            assert not constant.requires_grad and not torch.equal(constant, found["router loss"])
        return found

    ours, theirs = numbers(shared, slice(None)), numbers(plain, plain.batch.kept)
    model.double()
    with Doubles():
        truth = numbers(plain, plain.batch.kept)
    for name in truth:
        assert_close_to_truth(ours[name], theirs[name], truth[name], name)


def test_scores_are_fp32_under_autocast_and_wide_in_a_wide_model():
    roles = Roles.of(base(), policy=lora(), value=Shared("policy"))
    torch.nn.init.normal_(roles.value.scalar.weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = roles.value.hidden(PACKED)
        scores = roles.value.scores(hidden)
    assert torch.equal(scores, roles.value.scalar(hidden.float())[:, 0])
    assert roles.value.scores(hidden.double()).dtype == torch.float64
