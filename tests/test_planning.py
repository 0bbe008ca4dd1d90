"""Plans: exact where what is planned is a formula or a shape, and the lives of tensors as a real pass has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import planned as benchmark
from live import most_allocated
from planned_real import state_storages
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING

import tiny
from fastpost.models.lora import lora_config, with_lora
from fastpost.planning.config import PlannedGrpo, PlannedPpo, PlannedReward
from fastpost.planning.fit import by_method
from fastpost.planning.outline import bytes_of
from fastpost.planning.passes import training_pass
from fastpost.planning.plans import surveyed
from fastpost.planning.states import TEMPORARIES, adamw_bytes, adamw_scratch, four_bit_bytes
from fastpost.planning.timeline import recording
from fastpost.trainers.loop import trainable
from fastpost.trainers.optimizers import BITSANDBYTES, adamw
from planned_runs import KINDS, SAMPLED, SMALL, outlined, run, written
from test_workspace import peak

FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "mistral", "qwen3_moe"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not here: a plan reads no memory, and the meta device takes the place of torch's own allocators alone."""
    torch.utils._device._device_constructors.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_model(family: str, tmp_path: Path):
    moe = {"num_experts": 4, "moe_intermediate_size": 16} if family == "qwen3_moe" else {}
    real = tiny.model(family, **SMALL, **moe)
    made = outlined(run(written(tmp_path, family, **moe)))
    assert made.stored() == (bytes_of([*real.parameters(), *real.buffers()]), 0)
    assert made.parameters() == sum(p.numel() for p in real.parameters()) and made.adapters() == 0
    assert [p.shape for p in made.trained()] == [p.shape for p in real.parameters()]


def test_adapters_are_peft_s_own(directory: Path):
    real = with_lora(tiny.model(**SMALL), lora_config(4, lora_target_modules=["q_proj", "lm_head"]))
    made = outlined(run(directory, lora_r=4, lora_target_modules=("q_proj", "lm_head")))
    assert made.adapters() == bytes_of(p for p in real.parameters() if p.requires_grad) > 0
    assert made.stored()[0] == bytes_of([*tiny.model(**SMALL).parameters(), *tiny.model(**SMALL).buffers()])


def test_a_judge_has_a_number_for_a_head(directory: Path):
    from transformers import AutoModelForSequenceClassification

    made = surveyed(run(directory, PlannedReward, max_length=32)).acted.made
    config = CONFIG_MAPPING["llama"](**(tiny.SHAPE | SMALL), num_labels=1)
    real = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    assert made.stored()[0] == bytes_of([*real.parameters(), *real.buffers()])


def test_on_a_gpu_a_frozen_base_is_in_16_bits_and_its_adapters_in_32(directory: Path):
    numbers = sum(p.numel() for p in tiny.model(**SMALL).parameters())
    lora, full = (outlined(run(directory, lora_r=r, device="cuda")) for r in (4, 0))
    assert {p.dtype for p in lora.trained()} == {torch.float32} == {p.dtype for p in full.trained()}
    buffers = bytes_of(tiny.model(**SMALL).buffers())
    assert lora.stored()[0] - buffers == 2 * numbers and full.stored()[0] - buffers == 4 * numbers


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_four_bits_are_bitsandbytes_own(nested: bool):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shapes = [(96, 64), (257, 33), (512, 256)]
    weights = [
        bitsandbytes.nn.Params4bit(torch.randn(s), requires_grad=False, compress_statistics=nested).to("cpu")
        for s in shapes
    ]
    states = [w.quant_state for w in weights]
    each = [x for s in states for x in (s.absmax, s.code, *((s.state2.absmax, s.offset) if nested else ()))]
    shared = [states[0].state2.code] if nested else []
    packed, state = four_bit_bytes([a * b for a, b in shapes], nested=nested)
    assert packed == bytes_of(weights) and state == bytes_of([*each, *shared])


@pytest.mark.parametrize("optim", ["adamw_torch", *BITSANDBYTES])
def test_moments_are_the_optimizer_s_own(optim: str, directory: Path):
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 4), nn.Linear(300, 37))
    optimizer = adamw(trainable(model), run(directory, optim=optim))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = {s.data_ptr(): s.nbytes() for s in state_storages(optimizer)}
    assert adamw_bytes(model.parameters(), optim) == sum(held.values())


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit", "adamw_8bit"])
def test_what_an_optimizer_needs_besides_is_so_many_times_a_parameter(optim: str, directory: Path):
    """By the count in whole tensors: a step's scalars, and 8-bit scales, are no 256th of one."""
    pytest.importorskip("bitsandbytes")
    layer = nn.Linear(512, 512, bias=False)
    optimizer = adamw(trainable(layer), run(directory, optim=optim))
    most = 0
    for _ in range(2):  # the first makes the state
        layer.weight.grad = torch.randn_like(layer.weight)
        most = peak(optimizer.step)
    size = bytes_of([layer.weight])
    assert round(most / size) == round(adamw_scratch([layer.weight], optim, "cpu") / size) in TEMPORARIES.values()


def test_what_no_loss_reaches_has_no_gradient(tmp_path: Path):
    """A vision tower beside a model of words; and the words of a value, which has a number for a head."""
    text = tiny.SHAPE | SMALL | {"head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING["gemma3"](
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    config.save_pretrained(tmp_path)
    made = outlined(run(tmp_path))
    tower = made.lm.model.vision_tower
    assert not {*made.trained()} & {*tower.parameters()} and made.parameters() > sum(p.numel() for p in made.trained())


def test_a_value_has_no_moments_of_words(directory: Path):
    one = surveyed(run(directory, PlannedPpo, **SAMPLED))
    made = one.acted.made
    policy, value = (adamw_bytes(made.trained(words=words), "adamw_torch") for words in (True, False))
    assert one.resting["optimizer"] == policy + value and policy - value == 2 * made.head_bytes() + 4


def two_layers(x: Tensor, layers: nn.Sequential) -> None:
    layers(x).square().sum().backward()


class Tied(nn.Module):
    """An embedding that is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.embedding(ids).tanh(), self.embedding.weight)


class FanOut(nn.Module):
    """What goes in goes two ways, as around a layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.inside = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        x = x + self.inside(x).tanh()
        return x + self.inside(x).tanh()


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 32))


def numbers() -> Tensor:
    return torch.randn(512, 64)


def words() -> Tensor:
    return torch.randint(0, 512, (64,))


@pytest.mark.parametrize("accumulates", [False, True], ids=["first", "accumulating"])
@pytest.mark.parametrize(
    ("network", "inputs"), [(sequential, numbers), (Tied, words), (FanOut, numbers)], ids=["layers", "tied", "fan-out"]
)
def test_a_pass_that_is_acted_out_holds_what_a_real_one_holds(network: Any, inputs: Any, accumulates: bool):
    """To the byte: of networks whose kernels need no scratch."""
    real, x = network(), inputs()
    if accumulates:
        two_layers(x, real)
    most = peak(lambda: two_layers(x, real))
    with FakeTensorMode():
        fake, x = network(), inputs()
        with recording(fake) as recorder:
            recorder.known.add(x.untyped_storage()._cdata)
            two_layers(x, fake)
    held, timeline = bytes_of(fake.parameters()), recorder.timeline
    assert recorder.gradients == held
    assert (max(timeline.after_another(held).live) - held if accumulates else max(timeline.live)) == most


def test_gradients_of_another_microbatch_are_there_all_the_time(directory: Path):
    """As a pass that is acted out beside them has it."""
    made = outlined(run(directory))
    first = training_pass(made, 2, 32, schedule="eager")
    assert min(first.gradients) == 0
    with made.mode:
        for parameter in made.trained():
            parameter.grad = torch.empty_like(parameter)
    second = training_pass(made, 2, 32, schedule="eager")
    assert first.after_another(bytes_of(made.trained())).greediest() == second.greediest()


def test_checkpointing_offloading_and_tiles_each_hold_less(tmp_path: Path):
    directory = written(tmp_path, num_hidden_layers=3)
    shape = {"device": "cuda", "per_device_train_batch_size": 2048}
    kept, checkpointed, offloaded, tiled = (
        surveyed(run(directory, **shape, **fields)).moments[0].parts["activations"]
        for fields in ({"gradient_checkpointing": False}, {}, {"activation_offloading": True}, {"tiled_mlp": 1024})
    )
    assert kept > checkpointed > max(offloaded, tiled)


def test_experts_are_counted_in_any_dtype_and_by_the_tokens_they_take(tmp_path: Path):
    moe = {"num_experts": 4, "moe_intermediate_size": 16}
    directory = written(tmp_path, "qwen3_moe", **moe, num_experts_per_tok=2)
    twice = written(tmp_path / "more", "qwen3_moe", **moe, num_experts_per_tok=4)
    for fields in ({}, {"lora_r": 4}, {"device": "cuda"}):
        one, two = (surveyed(run(path, **fields)).moments[0].parts["activations"] for path in (directory, twice))
        assert two > one > 0


@pytest.mark.parametrize(("kind", "fields"), KINDS.values(), ids=KINDS)
def test_parts_add_up_and_methods_hold_ever_less(kind: type, fields: dict[str, Any], directory: Path):
    resting = []
    for config in by_method(run(directory, kind, **fields)).values():
        survey = surveyed(replace(config, device="cuda"))
        assert survey.peak.total == max(sum(m.parts.values()) for m in survey.moments) == survey.peak_bytes
        assert all(size > 0 for m in survey.moments for size in m.parts.values())
        resting.append(survey.rests)
    assert resting == sorted(resting, reverse=True)


def test_ppo_on_one_base_saves_three_of_four_models(directory: Path):
    one, four = (
        surveyed(run(directory, PlannedPpo, roles=roles, lora_r=4, **SAMPLED)) for roles in ("one base", "separate")
    )
    made = one.acted.made
    own, judge = one.resting["weights"], one.resting["weights"] - made.head_bytes()
    assert four.resting["other models"] == own + 2 * judge and "other models" not in one.resting
    assert one.resting["adapters"] == 3 * made.adapters() and four.resting["adapters"] == 2 * made.adapters()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_is_the_one_that_generation_leaves(family: str, tmp_path: Path):
    """By every layer's own window."""
    from transformers import DynamicCache

    changes = {"sliding_window": 8, "num_hidden_layers": 6} if family == "gemma3_text" else {}
    real = tiny.model(family, **(SMALL | changes))
    config = run(written(tmp_path, family, **changes), PlannedGrpo, **SAMPLED, generation_batch_size=3)
    cache = DynamicCache(config=real.config)
    with torch.no_grad():
        for _ in range(32):
            real.model(input_ids=torch.zeros(3, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    of_windows = sum(2 * bytes_of([layer.keys[:, :, :1]]) for layer in cache.layers if layer.is_sliding)
    (_, decoding, *_) = surveyed(config).moments
    assert decoding.name == "rollout: completions"
    assert decoding.parts["KV cache"] == held - of_windows, "but for the token that a window is about to lose"


def test_decoding_copies_a_layer_s_cache(directory: Path):
    """What one token takes beside its cache, as the allocator has it: the copy is the most of it."""
    from transformers import DynamicCache

    n, length, real = 64, 1000, tiny.model(**SMALL)
    cache, drawn = DynamicCache(config=real.config), torch.zeros(n, 1, dtype=torch.int64)

    def one_token() -> None:
        """Beside a cache that is made here, too, for the allocator to see it go."""
        cache.update(drawn[:, None, :, None], drawn[:, None, :, None], 0)
        (layer,) = cache.layers
        layer.keys, layer.values = (torch.zeros(n, 2, length - 1, 8) for _ in range(2))
        real.model(input_ids=drawn, past_key_values=cache, use_cache=True)

    with torch.no_grad():
        most = most_allocated(one_token)
    of_a_layer = bytes_of([cache.layers[0].keys])
    survey = surveyed(run(directory, PlannedGrpo, **SAMPLED))
    live = survey.acted.decoding(n, length).greediest().live
    assert abs(live - most) <= 0.1 * of_a_layer and most > 2.9 * of_a_layer


def test_an_engine_has_the_cache_in_the_trainer_s_place(directory: Path):
    own, engine = (surveyed(run(directory, PlannedGrpo, **SAMPLED, rollout_engine=engine)) for engine in (False, True))
    assert [m.name for m in own.moments][:2] == ["rollout: prompts", "rollout: completions"]
    assert [m.name for m in own.moments][2:] == [m.name for m in engine.moments]
    assert engine.rests == own.rests + 2 * own.acted.made.parameters()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft, full, long", "grpo, LoRA"])
def test_a_plan_is_within_a_tenth_of_a_real_step(name: str, tmp_path: Path):
    found = benchmark.line(benchmark.RUNS[name], tmp_path)
    assert found["measured"]["peak"] >= 500e6
    assert abs(found["error"]["peak"]) <= benchmark.TOTAL
    assert abs(found["error"]["largest part"]) <= benchmark.LARGEST
