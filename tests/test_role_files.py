"""What roles are read from and written to: PEFT's and transformers' own files; and what does not fit is named."""

import json
import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import decoders
import tiny
from fastpost.models import attention
from fastpost.models.roles import Copied, Roles, Shared
from fastpost.models.saving import save_model
from fastpost.models.trunk import hidden_states
from fastpost.packing import Example, pack
from fastpost.shared_prompt import share_prompts
from role_models import PACKED, ROWS, base, four_bits, learnt, lora, ppo, same, write_reward
from rules import assert_close_to_truth


def judged(model):
    """Each sequence alone, by the model's own forward and pooling."""
    with torch.no_grad():
        return torch.cat([model.eval()(torch.tensor([row])).logits[:, 0] for row in ROWS])


def sequence_classifier(path, adapter):
    judge = AutoModelForSequenceClassification.from_pretrained(path / "base", num_labels=1)
    judge.config.pad_token_id = None  # it is a token like any other in these rows
    return PeftModel.from_pretrained(judge, adapter)


def test_a_reward_that_was_trained_elsewhere_says_the_same_here(tmp_path):
    files = write_reward(tmp_path)
    truth = judged(sequence_classifier(tmp_path, files))
    torch.testing.assert_close(Roles.of(base(), policy=lora(), reward=files).reward.at_ends(PACKED), truth)


@pytest.mark.parametrize("adapter", [True, False])
def test_a_reward_of_trls_own_trainer_says_the_same_here(tmp_path, adapter):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    pairs = Dataset.from_list([{"prompt": "ab", "chosen": "cde", "rejected": "xyz"}] * 8)
    options = {"max_steps": 1, "learning_rate": 0.1, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    args = RewardConfig(tmp_path / "run", report_to=[], gradient_checkpointing=False, **options)
    peft = lora(task_type="SEQ_CLS", modules_to_save=["score"]) if adapter else None
    trainer = RewardTrainer(str(tmp_path / "base"), args=args, train_dataset=pairs, peft_config=peft)
    trainer.train()
    trainer.save_model(tmp_path / "reward")
    trainer.model.config.pad_token_id = trainer.model.config.get_text_config().pad_token_id = None
    truth = judged(trainer.model)
    roles = Roles.of(base(), policy=lora(), reward=tmp_path / "reward", tokenizer=tiny.tokenizer())
    torch.testing.assert_close(roles.reward.at_ends(PACKED), truth)


def test_what_is_saved_loads_in_peft_and_transformers(tmp_path):
    roles = ppo(base(), write_reward(tmp_path))
    roles.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["policy", "value"]
    with torch.no_grad():
        values = roles.value.at_ends(PACKED)
        hidden = roles.policy.hidden(PACKED)
    torch.testing.assert_close(judged(sequence_classifier(tmp_path, tmp_path / "saved" / "value")), values)
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "saved/policy"
    )
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(policy, PACKED)[0], hidden)


def test_roles_of_what_was_saved_are_the_roles_that_were(tmp_path):
    files = write_reward(tmp_path)
    roles = ppo(base(), files)
    roles.save(tmp_path / "saved")
    again = Roles.of(
        base(), policy=tmp_path / "saved" / "policy", reward=files, value=str(tmp_path / "saved" / "value")
    )
    for name, role in roles.by_name.items():
        assert torch.equal(again[name].hidden(PACKED), role.hidden(PACKED))
    assert torch.equal(again.value(PACKED), roles.value(PACKED))
    trained, trained_again = roles.trainable(), again.trainable()
    assert trained.keys() == trained_again.keys()
    assert all(same(tensors, trained_again[name]) for name, tensors in trained.items())


def test_what_is_saved_of_an_adapter_on_head_and_embedding_is_nothing_of_the_base(tmp_path):
    """peft would write both, on its own."""
    targets = {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}
    roles = Roles.of(base(), policy=lora(**targets), value=Copied("policy"))
    learnt(roles.policy.model)
    roles.save(tmp_path / "saved")
    for name, count in (("policy", 8), ("value", 9)):  # two tensors for each of four layers, and a scalar head
        saved = load_file(tmp_path / "saved" / name / "adapter_model.safetensors")
        assert len(saved) == len(roles.trainable()[name]) == count
    again = Roles.of(base(), policy=tmp_path / "saved" / "policy")
    assert torch.equal(again.policy.hidden(PACKED), roles.policy.hidden(PACKED))
    assert torch.equal(again.reference.hidden(PACKED), roles.reference.hidden(PACKED))


def test_a_head_alone_is_saved_as_a_head_alone(tmp_path):
    roles = Roles.of(base(), policy=lora(), value=Shared("policy"))
    torch.nn.init.normal_(roles.value.scalar.weight)
    roles.save(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "value" / "score.safetensors").keys() == {"score.weight"}
    value = Shared("policy", head=tmp_path / "saved" / "value")
    again = Roles.of(base(), policy=tmp_path / "saved" / "policy", value=value)
    assert torch.equal(again.value(PACKED), roles.value(PACKED))


def test_models_trained_whole_are_saved_whole(tmp_path):
    write_reward(tmp_path)
    roles = Roles.of(base(), value=tmp_path / "base")
    torch.nn.init.normal_(roles.value.scalar.weight)
    roles.save(tmp_path / "saved")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "policy")
    assert same(policy.parameters(), roles.policy.model.parameters())
    again = Roles.of(base(), policy=lora(), value=tmp_path / "saved" / "value")
    assert torch.equal(again.value(PACKED), roles.value(PACKED))
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved" / "value")
    judge.config.pad_token_id = None
    torch.testing.assert_close(judged(judge), roles.value.at_ends(PACKED).detach())


def test_an_adapter_that_the_model_has_already_is_the_policys(tmp_path):
    tiny.model().save_pretrained(tmp_path / "tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    roles = Roles.of(get_peft_model(base(), lora()), value=lora())
    assert roles.policy.adapter == "default" and roles.value.adapter == "value"
    assert roles.reference.shares_pass(roles.policy) is False
    roles.save(tmp_path / "saved")
    learned = load_file(tmp_path / "saved" / "policy" / "adapter_model.safetensors")
    assert len(learned) == len(roles.trainable()["policy"]) == 28
    assert Roles.of(tmp_path / "tiny", policy=tmp_path / "saved" / "policy").trainable().keys() == {"policy"}


def test_an_adapter_trained_on_a_base_of_another_name_or_place_is_warned_of(tmp_path):
    files = write_reward(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Roles.of(model, policy=lora(), reward=files)
        (tmp_path / "link").symlink_to(tmp_path / "base")
        Roles.of(AutoModelForCausalLM.from_pretrained(tmp_path / "link"), policy=lora(), reward=files)
    for other in ("tuned", "tuned/base"):
        model.save_pretrained(tmp_path / other)
        message = rf"reward's adapter in .* was trained on {tmp_path}/base, and is used on {tmp_path}/{other}$"
        with pytest.warns(UserWarning, match=message):
            Roles.of(AutoModelForCausalLM.from_pretrained(tmp_path / other), policy=lora(), reward=files)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    for i, (changes, message) in enumerate(
        [
            ({"intermediate_size": 40}, r"proj.lora_[AB].weight has shape .*40.* in the file, and .*48.* would fit"),
            ({"num_hidden_layers": 1}, r"layers.1.*lora_A.* and 13 more are in the model alone"),
            ({"num_hidden_layers": 3}, r"layers.2.*lora_A.* and 13 more are in the file alone"),
        ]
    ):
        files = write_reward(tmp_path / str(i), base(**changes))
        config = json.loads((files / "adapter_config.json").read_text()) | {"target_modules": "all-linear"}
        (files / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"reward's adapter in .*reward does not fit Llama.*: .*{message}"):
            Roles.of(base(), policy=lora(), reward=files)
    files = write_reward(tmp_path / "gpt2", base("gpt2"))
    with pytest.raises(ValueError, match=r"reward was made for a gpt2 \(.*base\), and LlamaForCausalLM .* a llama"):
        Roles.of(base(), policy=lora(), reward=files)


def test_no_file_changes_the_base_that_all_stand_on(tmp_path):
    """peft writes the base's embedding where it is asked to; under the policy's adapter it has another name."""
    files = write_reward(tmp_path, embeddings=True)
    for policy in (lora(), lora(target_modules=["embed_tokens"])):
        Roles.of(base(), policy=policy, reward=files)
        with pytest.raises(ValueError, match=r"reward's .*embed_tokens\.weight of its base has other values here"):
            Roles.of(base(seed=5), policy=policy, reward=files)


def test_a_scalar_head_of_another_width_is_refused(tmp_path):
    wide = write_reward(tmp_path / "wide", base(hidden_size=64))
    three = write_reward(tmp_path / "three", labels=3)
    for files, shape in ((wide, r"\(1, 64\)"), (three, r"\(3, 32\)")):
        with pytest.raises(ValueError, match=rf"score.weight must be \(1, 32\) for hidden states of .*, got {shape}"):
            Roles.of(base(), policy=lora(), reward=files)
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "three" / "base", num_labels=3)
    judge.save_pretrained(tmp_path / "judge")
    for source in (judge, tmp_path / "judge"):
        with pytest.raises(ValueError, match=r"reward has a scalar head of another width: .* got \(3, 32\)"):
            Roles.of(base(), policy=lora(), reward=source)


def test_a_reward_without_a_head_is_refused(tmp_path):
    roles = Roles.of(base(), policy=lora())
    roles.save(tmp_path)
    tiny.model().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"reward's adapter in .* has no scalar head: score.weight \(1, 32\)"):
        Roles.of(base(), policy=lora(), reward=tmp_path / "policy")
    with pytest.raises(ValueError, match=r"reward has no scalar head: score.weight \(1, 32\)"):
        Roles.of(base(), policy=lora(), reward=tmp_path / "base")
    with pytest.raises(ValueError, match=r"reward must have a scalar head, .* LlamaForCausalLM has NoneType"):
        Roles.of(base(), policy=lora(), reward=base())


def test_another_vocabulary_is_refused(tmp_path):
    model, tokenizer = base(), tiny.tokenizer()
    with pytest.raises(ValueError, match="teacher has a vocabulary of 101 and the policy one of 97"):
        Roles.of(model, policy=lora(), teacher=base(vocab_size=101))
    for path, words in (("policy", tokenizer), ("other", reversed_words()), ("more", tiny.tokenizer())):
        save_model(tiny.model(vocab_size=98), words, tmp_path / path)
    more = tiny.tokenizer()
    more.add_tokens(["<more>"])
    more.save_pretrained(tmp_path / "more")
    adapter = write_reward(tmp_path, tiny.model(vocab_size=98))
    reversed_words().save_pretrained(adapter)
    tiny.model("gpt2", vocab_size=98).save_pretrained(tmp_path / "legacy")  # with vocab.json and merges.txt alone
    (tmp_path / "legacy" / "vocab.json").write_text(json.dumps(reversed_words().get_vocab()))
    (tmp_path / "legacy" / "merges.txt").write_text("#version: 0.2\n")
    for role, path in (("value", "other"), ("teacher", "other"), ("reference", "legacy"), ("reward", "reward")):
        message = rf"{role}'s tokenizer in .*{path} has another vocabulary than the policy's: "
        for given in ({"model": base(vocab_size=98), "tokenizer": tokenizer}, {"model": tmp_path / "policy"}):
            with pytest.raises(ValueError, match=message):
                Roles.of(policy=lora(), **{role: tmp_path / path}, **given)
    Roles.of(tmp_path / "policy", policy=lora(), teacher=tmp_path / "more")
    with pytest.raises(ValueError, match="'<more>' is missing in the one and 97 in the other"):
        Roles.of(tmp_path / "more", policy=lora(), teacher=tmp_path / "policy")


def reversed_words():
    """The tokens of `tiny.tokenizer` under other numbers."""
    words = tiny.tokenizer()
    state = json.loads(words.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    first = len(tiny.SPECIAL)
    state["model"]["vocab"] = {t: i if i < first else len(vocabulary) - 1 + first - i for t, i in vocabulary.items()}
    words._tokenizer = Tokenizer.from_str(json.dumps(state))
    return words


def test_a_judge_with_soft_caps_attends_as_any_other(tmp_path):
    """By itself transformers has Gemma 2 attend by eager, for which a pack is a padded batch."""
    model = decoders.model("gemma2", torch.float32)
    model.config.num_labels = 1
    judge = AutoModelForSequenceClassification.from_config(model.config).eval()
    judge.save_pretrained(tmp_path / "judge")
    roles = Roles.of(model, policy=lora(), reward=tmp_path / "judge", value=tmp_path / "judge")
    for role in (roles.reward, roles.value):
        assert role.model.config._attn_implementation == attention.NAME
    twice = pack([Example([5, 6, 7, last], [False, False, False, True]) for last in (8, 9)])
    both = [roles.reward.at_ends(packed) for packed in (twice, share_prompts(twice, 2))]
    assert_close_to_truth(both[1], both[0], judge.double().score(hidden_states(judge, twice)[0, [3, 7]])[:, 0])


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_a_model_whose_packs_leak_is_refused_by_name(family):
    """Of one's own, and loaded by transformers alone: by its own mask packed sequences see each other."""
    for model, given in ((tiny.model(family), {}), (base(), {"teacher": tiny.model(family)})):
        with pytest.raises(ValueError, match=rf"(?i){family}ForCausalLM lets packed sequences see each other"):
            Roles.of(model, policy=lora(), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "nowhere"}, "policy 'nowhere' is no directory"),
        ({"policy": "empty"}, "has neither adapter_config.json nor config.json"),
        ({"policy": "half"}, r"policy's adapter in .* has no adapter_model.safetensors"),
        (
            {"policy": Copied("reward")},
            r"policy must be an adapter of the model, or None .* got Copied\(role='reward'\)",
        ),
        ({"policy": lora(init_lora_weights="pissa")}, "'pissa', which changes the base that all roles stand on"),
        ({"policy": lora(bias="all")}, "bias='all', which trains the base that all roles stand on"),
        ({"policy": lora(layer_replication=[(0, 2), (1, 2)])}, "layer_replication, which makes another model"),
        ({"policy": lora(), "reward": lora()}, "reward is not trained, so a new adapter would say nothing"),
        ({"policy": lora(), "reward": Shared("policy")}, "only the value can share"),
        ({"policy": lora(), "value": Copied("reward")}, "to be copied from 'reward', and there are policy"),
        ({"value": lora()}, "value would stand on a base that the policy trains whole"),
        ({"value": Copied("policy")}, "value cannot be copied from policy: only one of them has a scalar head"),
        (
            {"policy": lora(target_modules=["q_porj"])},
            "policy's adapter does not fit LlamaForCausalLM .*: Target modules",
        ),
    ],
)
def test_what_no_role_can_be_made_of_is_refused(given, message, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        Roles.of(base(), **given)


def test_the_policys_own_model_cannot_be_a_separate_one_and_a_frozen_model_cannot_be_trained():
    model = base()
    with pytest.raises(ValueError, match="reference is the policy's own model, and one of the two trains"):
        Roles.of(model, policy=lora(), reference=model)
    model.config.num_labels = 1
    judge = AutoModelForSequenceClassification.from_config(model.config)
    with pytest.raises(ValueError, match="value is the reward's own model, and one of the two trains"):
        Roles.of(base(), policy=lora(), reward=judge, value=judge)
    with pytest.raises(ValueError, match="default's adapter has init_lora_weights='pissa'"):
        Roles.of(get_peft_model(base(), lora(init_lora_weights="pissa")))
    with pytest.raises(ValueError, match="nothing of the policy requires a gradient"):
        Roles.of(base().requires_grad_(False))
    roles = Roles.of(base())
    with pytest.raises(ValueError, match=r"there is no role 'reference': there are policy"):
        _ = roles.reference
    with pytest.raises(ValueError, match=r"'polciy': there are policy \(did you mean 'policy'\?\)"):
        roles.using("polciy")
    with pytest.raises(ValueError, match="policy has no scalar head"):
        roles.policy(PACKED)
    with pytest.raises(ValueError, match="value has a scalar head"):
        Roles.of(base(), policy=lora(), value=Shared("policy")).value.head()
    model = base()
    Roles.of(model, policy=lora())
    for place in ({"teacher": model}, {"reference": model}):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM .* has adapters already, of roles"):
            Roles.of(base(), policy=lora(), **place)


def test_tokens_that_train_do_so_in_every_adapter_of_a_base_or_in_none(tmp_path):
    files, tokens = write_reward(tmp_path), lora(trainable_token_indices=[3, 5])
    for policy, other, name in (
        (tokens, {"reward": files}, "policy"),
        (tokens, {"value": lora()}, "policy"),
        (lora(), {"value": tokens}, "value"),
    ):
        with pytest.raises(ValueError, match=rf"does not fit .*: {name} has trainable_token_indices: all adapters on"):
            Roles.of(base(), policy=policy, **other)
    roles = Roles.of(base(), policy=tokens, value=Copied("policy"))
    learnt(roles.policy.model)
    roles.save(tmp_path / "saved")
    again = Roles.of(base(), policy=tmp_path / "saved" / "policy", value=tmp_path / "saved" / "value")
    for name, role in roles.by_name.items():
        assert torch.equal(again[name].hidden(PACKED), role.hidden(PACKED))


def test_roles_that_were_made_before_are_never_made_over(tmp_path):
    model = base()
    roles = ppo(model, write_reward(tmp_path))
    before = [tensor.clone() for tensors in roles.trainable().values() for tensor in tensors]
    for source in (lora(), None):
        with pytest.raises(ValueError, match=r"has adapters already, .* pass .* roles\.policy\.model, or load"):
            Roles.of(model, policy=source)
    for given in ({"policy": lora()}, {"value": Copied("policy")}):
        with pytest.raises(ValueError, match=r"there is an adapter '(policy|value)' on it, which this one"):
            Roles.of(roles.policy.model, **given)
    assert same(before, [tensor for tensors in roles.trainable().values() for tensor in tensors])
    again = Roles.of(roles.policy.model)
    assert same(again.trainable()["policy"], roles.trainable()["policy"])


@pytest.mark.parametrize("wrong", [{"reward": "typo"}, {"value": Shared("policy", head="typo")}], ids=str)
def test_a_base_is_as_it_was_after_a_typo(wrong):
    model = base()
    with pytest.raises(ValueError, match=r"'typo' is no directory"):
        Roles.of(model, policy=lora(), **wrong)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(Roles.of(model, policy=lora()).trainable()["policy"]) == 28


def test_a_quantised_model_is_not_trained_whole(tmp_path):
    """Of a value that is one its scalar head alone would learn, without a word."""
    pytest.importorskip("bitsandbytes")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["score"])
    tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, quantization_config=four)
    judge.save_pretrained(tmp_path / "judge")
    wide = base(hidden_size=64, intermediate_size=128)
    with pytest.raises(ValueError, match=r"policy would train its model whole, which bitsandbytes has quantised"):
        Roles.of(four_bits(tmp_path))
    for given in ({"value": judge}, {"value": tmp_path / "judge"}, {"reward": judge, "value": Copied("reward")}):
        with pytest.raises(ValueError, match=r"value would train its model whole, .*: pass LoraConfig"):
            Roles.of(wide, policy=None, **given)
    adapted = get_peft_model(judge, lora(task_type="SEQ_CLS"))
    assert len(Roles.of(wide, policy=lora(), value=adapted).trainable()["value"]) == 2 * 14 + 1
    assert Roles.of(base(), policy=lora(), reward=tmp_path / "judge").reward.parameters() == []
