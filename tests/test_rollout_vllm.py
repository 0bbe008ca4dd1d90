"""What vLLM is told, in which order, and what is read from its answers. A double stands in for it, which has weights of
its own, forgets them when it sleeps, and samples by `generate`; vLLM itself is in none of these tests."""

import sys
from collections import namedtuple
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from fastpost.rollout import Sampling, engine, generate
from fastpost.rollout.backends import Backend, sampler_for
from fastpost.rollout.continuous import Continuous
from fastpost.rollout.sampler import Generate
from fastpost.rollout.server import Server, _check_mode
from fastpost.rollout.vllm import colocated

TOKENIZER = tiny.tokenizer()
PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34]]
SAMPLING = Sampling(max_completion_length=6, seed=3)
Params = namedtuple("Params", engine.settings(SAMPLING, 1, engine.Ends(frozenset())))
Adapter = namedtuple("Adapter", ["name", "number", "path"])
Logprob = namedtuple("Logprob", ["logprob", "rank"])


def sampled(model, prompt_ids, params):
    """As an engine would, from what it was told alone."""
    sampling = Sampling(
        params["temperature"],
        params["top_p"],
        params["top_k"],
        params["min_p"],
        params["max_tokens"],
        stop=tuple(params["stop"]),
        repetition_penalty=params["repetition_penalty"],
    )
    assert params["logprobs"] == 0 and params["include_stop_str_in_output"] and not params["skip_special_tokens"]
    assert params["stop_token_ids"] == [1]
    return generate(model, TOKENIZER, prompt_ids, sampling, num_generations=params["n"])


class Double:
    """vllm.LLM."""

    def __init__(self, **told):
        self.told, self.calls, self.asleep = told, [], set()
        self.model = tiny.model(seed=told["model"])
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        )

    def load_weights(self, weights):
        assert "weights" not in self.asleep
        self.calls.append("load")
        with torch.no_grad():
            own = dict(self.model.named_parameters())
            for name, weight in weights:
                own.pop(name).copy_(weight)
        assert not own

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}
        with torch.no_grad():
            for parameter in self.model.parameters() if level == 2 else ():
                parameter.zero_()

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")
        self.asleep -= set(tags)

    def generate(self, prompts, params, lora_request, use_tqdm):
        from peft import PeftModel

        assert not self.asleep and not use_tqdm
        self.calls.append("generate" if lora_request is None else f"generate {lora_request.name}")
        model = self.model
        if lora_request is not None:
            model = PeftModel.from_pretrained(tiny.model(seed=self.told["model"]), lora_request.path)
        found = sampled(model, [prompt["prompt_token_ids"] for prompt in prompts], params._asdict())
        outputs = [SimpleNamespace(token_ids=c.ids, logprobs=self.steps(c)) for c in found]
        return [SimpleNamespace(outputs=outputs[i : i + params.n]) for i in range(0, len(outputs), params.n)]

    def steps(self, completion):
        return [{token: Logprob(logp, 1)} for token, logp in zip(completion.ids, completion.logp, strict=True)]


@pytest.fixture
def vllm(monkeypatch):
    modules = {"vllm": {"LLM": Double, "SamplingParams": Params}, "vllm.lora.request": {"LoRARequest": Adapter}}
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        module = ModuleType(name)
        vars(module).update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that they are put back
        monkeypatch.delenv(name)


def changed(model):
    """As a step of training leaves it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_adapter(rank=4, **more):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **more)
    return get_peft_model(tiny.model(), config)


def of_this_model(model, completions, n=2):
    """Whether they are what the double samples with these weights."""
    expected = sampled(model, PROMPTS, engine.settings(SAMPLING, n, engine.Ends(frozenset([1]))))
    assert [c.ids for c in completions] == [c.ids for c in expected]
    for ours, theirs in zip(completions, expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours.logp), torch.tensor(theirs.logp))
        assert ours.finished == theirs.finished
    return True


# ---- colocated ----


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("sleeps", [False, True])
def test_whole_models_are_sampled_with_the_weights_of_each_step(sleeps):
    model = tiny.model(seed=0)
    sampler = colocated(model, TOKENIZER, 7, sleeps=sleeps)  # type: ignore[arg-type]  # the double's name is a seed
    for _ in range(3):
        sampler.update(changed(model))
        assert of_this_model(model, sampler(PROMPTS, SAMPLING, 2))
    step = ["load", "reset", "generate"]
    awake = ["wake weights", "load", "reset", "wake kv_cache", "generate", "sleep 2"]
    assert sampler.llm.calls == (["sleep 2", *awake * 3] if sleeps else step * 3)
    assert not sampler.reproducible


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("sleeps", [False, True])
def test_a_second_rollout_needs_no_update(sleeps):
    model = changed(tiny.model(seed=0))
    sampler = colocated(model, TOKENIZER, 7, sleeps=sleeps)  # type: ignore[arg-type]
    for _ in range(2):
        assert of_this_model(model, sampler(PROMPTS, SAMPLING, 2))
    assert sampler.llm.calls.count("load") == (2 if sleeps else 1)  # sleep has dropped them


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("sleeps", [False, True])
@pytest.mark.parametrize("name", ["default", "policy"])
def test_of_an_adapter_that_alone_is_sent(sleeps, name):
    model = with_adapter()
    if name != "default":
        model.add_adapter(name, model.peft_config["default"])
        model.set_adapter(name)
    sampler = colocated(model, TOKENIZER, 0, sleeps=sleeps)  # type: ignore[arg-type]
    for _ in range(2):
        sampler.update(changed(model))
        assert of_this_model(model, sampler(PROMPTS, SAMPLING, 2))
    assert sampler.llm.told["enable_lora"] and sampler.llm.told["max_lora_rank"] == 8
    steps = [["reset", f"generate adapter-{n}"] for n in (1, 2)]
    awake = [["wake weights", "reset", "wake kv_cache", f"generate adapter-{n}", "sleep 1"] for n in (1, 2)]
    assert sampler.llm.calls == (["sleep 1", *awake[0], *awake[1]] if sleeps else [*steps[0], *steps[1]])


@pytest.mark.usefixtures("vllm")
def test_what_the_engine_is_told():
    sampler = colocated(tiny.model(), TOKENIZER, 0, memory=0.4, max_model_length=64, seed=5)  # type: ignore[arg-type]
    assert sampler.llm.told == {
        "model": 0,
        "gpu_memory_utilization": 0.4,
        "max_model_len": 64,
        "enable_sleep_mode": False,
        "logprobs_mode": "processed_logprobs",
        "seed": 5,
        "distributed_executor_backend": "external_launcher",
    }


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"repetition_penalty": 1.5}])
def test_of_what_a_filter_left_there_is_no_logp(how):
    """vLLM's are of the filtered distribution, and no trainer's are."""
    sampling = Sampling(max_completion_length=4, **how)
    found = colocated(tiny.model(), TOKENIZER, 0)(PROMPTS, sampling)  # type: ignore[arg-type]
    assert all(len(c.ids) == 4 and c.logp == [] for c in found)


@pytest.mark.usefixtures("vllm")
def test_a_stop_string_ends_a_completion():
    greedy = Sampling(temperature=0, max_completion_length=8)
    free = generate(tiny.model(), TOKENIZER, PROMPTS[:1], greedy)[0]
    stop = str(TOKENIZER.decode(free.ids[2:4]))
    sampler = colocated(tiny.model(), TOKENIZER, 0)  # type: ignore[arg-type]
    found = sampler(PROMPTS[:1], Sampling(temperature=0, max_completion_length=8, stop=(stop,)))[0]
    assert found.finished and found.ids == free.ids[:4]


# ---- adapters that vLLM has no place for ----


def test_adapters_that_are_more_than_lora_are_refused():
    with pytest.raises(ValueError, match="plain LoRA, got LORA and use_dora"):
        engine.adapter_of(with_adapter(use_dora=True))
    with pytest.raises(ValueError, match="plain LoRA, got LORA and modules_to_save"):
        engine.adapter_of(with_adapter(modules_to_save=["lm_head"]))
    assert [engine.room_for(rank) for rank in (1, 2, 8, 17, 512)] == [1, 8, 8, 32, 512]
    with pytest.raises(ValueError, match="lora_r must be at most 512 for vLLM, got 513"):
        engine.room_for(513)


# ---- a server ----


class Client:
    """trl's VLLMClient, and the server behind it."""

    def __init__(self, info=None):
        self.base_url, self.model, self.calls, self.info = "http://there", "base", [], info or {}
        self.weights, self.adapters = tiny.model(seed=7), {}

    def get_server_info(self):
        return self.info

    def update_named_params(self, announced, weights):
        self.calls.append("update")
        with torch.no_grad():
            for (name, dtype, shape), (sent, weight) in zip(announced, weights, strict=True):
                own = self.weights.get_parameter(name)
                assert (name, dtype, shape) == (sent, "float32", list(weight.shape))
                own.copy_(weight)

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def post(self, address, body):
        from peft import PeftModel

        self.calls.append(f"{address} {body['lora_name']}")
        if address.endswith("unload_lora_adapter"):
            del self.adapters[body["lora_name"]]
        else:
            self.adapters[body["lora_name"]] = PeftModel.from_pretrained(tiny.model(), body["lora_path"])

    def generate(self, prompts, *, generation_kwargs, **told):
        self.calls.append(f"generate {self.model}")
        model = self.weights if self.model == "base" else self.adapters[self.model]
        found = sampled(model, prompts, {**told, **generation_kwargs})
        return {
            "completion_ids": [c.ids for c in found],
            "logprobs": [[[logp] for logp in c.logp] for c in found],
        }


def test_a_server_gets_whole_models():
    model, client = tiny.model(), Client()
    sampler = Server(client, model, TOKENIZER)
    for _ in range(2):
        sampler.update(changed(model))
        assert of_this_model(model, sampler(PROMPTS, SAMPLING, 2))
    sampler(PROMPTS, SAMPLING)
    assert client.calls == ["update", "reset", "generate base"] * 2 + ["generate base"]


def test_a_server_gets_adapters():
    model, client = with_adapter(), Client()
    sampler = Server(client, model, TOKENIZER, post=client.post)
    for _ in range(2):
        sampler.update(changed(model))
        assert of_this_model(model, sampler(PROMPTS, SAMPLING, 2))
    load, unload = "http://there/v1/load_lora_adapter", "http://there/v1/unload_lora_adapter"
    assert client.calls == [
        *(f"{load} adapter-1", "reset", "generate adapter-1"),
        *(f"{load} adapter-2", f"{unload} adapter-1", "reset", "generate adapter-2"),
    ]


def test_a_server_with_other_log_probabilities_is_refused():
    _check_mode(Client({"model_config": {"logprobs_mode": "processed_logprobs"}}))
    with pytest.raises(ValueError, match=r"reports raw_logprobs.* --logprobs-mode processed_logprobs"):
        _check_mode(Client({"model_config": {"logprobs_mode": "raw_logprobs"}}))


# ---- which one ----


def test_the_backend_chooses():
    model, said = tiny.model(), []
    choose = {None: Generate, False: Generate, True: Continuous}
    for wanted, kind in choose.items():
        backend = Backend(use_transformers_continuous_batching=wanted)
        assert isinstance(sampler_for(backend, model, TOKENIZER, "", SAMPLING, said.append), kind)
    assert Backend(vllm_server_host="there", vllm_server_port=1).url == "http://there:1"
    assert Backend(vllm_server_base_url="https://x/y").url == "https://x/y"


@pytest.mark.usefixtures("vllm")
def test_vllm_is_built_from_the_backend():
    backend = Backend(use_vllm=True, vllm_enable_sleep_mode=True, vllm_gpu_memory_utilization=0.2)
    sampler = sampler_for(backend, tiny.model(), TOKENIZER, 0, SAMPLING, print)  # type: ignore[arg-type]
    assert sampler.llm.told["gpu_memory_utilization"] == 0.2 and sampler.llm.told["seed"] == 3  # type: ignore
    assert sampler.llm.calls == ["sleep 2"]  # type: ignore


def test_what_is_not_installed_or_not_known_is_named():
    with pytest.raises(ValueError, match="vllm_mode must be 'colocate' or 'server', got 'both'"):
        Backend(vllm_mode="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"vllm_gpu_memory_utilization must be above 0 and at most 1, got 0"):
        Backend(vllm_gpu_memory_utilization=0)
    with pytest.raises(ValueError, match="exclude each other"):
        Backend(use_vllm=True, use_transformers_continuous_batching=True)
    if find_spec("vllm") is None:
        for mode in ("colocate", "server"):
            with pytest.raises(ValueError, match="pip install"):
                sampler_for(Backend(True, mode), tiny.model(), TOKENIZER, "", SAMPLING, print)
