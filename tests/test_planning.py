"""Plans: exact where what is planned is a formula or a shape, and the lives of tensors as a real pass has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import planned as benchmark
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING

import tiny
from fastpost.cli import main
from fastpost.models.lora import lora_config, with_lora
from fastpost.planning.config import PlannedDpo, PlannedGrpo, PlannedPpo, PlannedReward, PlannedSft
from fastpost.planning.demand import demand_of
from fastpost.planning.fit import by_method, candidates, changes, surveyed
from fastpost.planning.outline import outline
from fastpost.planning.report import table
from fastpost.planning.states import adamw_bytes, four_bit_bytes
from fastpost.planning.timeline import recording
from fastpost.trainers.loop import trainable
from fastpost.trainers.optimizers import BITSANDBYTES, adamw
from test_workspace import peak

SMALL = {"num_hidden_layers": 1}
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "mistral", "qwen3_moe"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tiny"))


def written(path: Path, family: str = "llama", **changes: Any) -> Path:
    """The config of a tiny model, and nothing else."""
    CONFIG_MAPPING[family](**(tiny.SHAPE | SMALL | changes)).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not here: a plan reads no memory, and the meta device takes the place of torch's own allocators alone."""
    torch.utils._device._device_constructors.cache_clear()


@pytest.fixture
def memory_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What writes the tables of the page."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "docs"))
    import memory_table

    return memory_table


def run(directory: Path, kind: type = PlannedSft, **fields: Any) -> Any:
    short = {"max_length": 32} if kind is PlannedSft else {}
    return kind(**({"model": str(directory), "device": "cpu"} | short | fields))


def bytes_of(tensors) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)


# ---- what rests ----


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_model(family: str, tmp_path: Path):
    moe = {"num_experts": 4, "moe_intermediate_size": 16} if family == "qwen3_moe" else {}
    real = tiny.model(family, **SMALL, **moe)
    made = outline(run(written(tmp_path, family, **moe)), "cpu")
    assert made.stored() == (bytes_of([*real.parameters(), *real.buffers()]), 0)
    assert made.parameters() == sum(p.numel() for p in real.parameters()) and made.adapters() == 0
    assert [p.shape for p in made.trained()] == [p.shape for p in real.parameters()]


def test_adapters_are_peft_s_own(directory: Path):
    real = with_lora(tiny.model(**SMALL), lora_config(4, lora_target_modules=["q_proj", "lm_head"]))
    made = outline(run(directory, lora_r=4, lora_target_modules=("q_proj", "lm_head")), "cpu")
    assert made.adapters() == bytes_of(p for p in real.parameters() if p.requires_grad) > 0
    assert made.stored()[0] == bytes_of([*tiny.model(**SMALL).parameters(), *tiny.model(**SMALL).buffers()])


def test_a_judge_has_a_number_for_a_head(directory: Path):
    from transformers import AutoModelForSequenceClassification

    made = surveyed(run(directory, PlannedReward, max_length=32)).made
    config = CONFIG_MAPPING["llama"](**(tiny.SHAPE | SMALL), num_labels=1)
    real = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    assert made.stored()[0] == bytes_of([*real.parameters(), *real.buffers()])


def test_on_a_gpu_a_frozen_base_is_in_16_bits_and_its_adapters_in_32(directory: Path):
    numbers = sum(p.numel() for p in tiny.model(**SMALL).parameters())
    lora, full = (outline(run(directory, lora_r=r, device="cuda"), "cuda") for r in (4, 0))
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
    held = {s.data_ptr(): s.nbytes() for s in benchmark.state_storages(optimizer)}
    assert adamw_bytes(model.parameters(), optim) == sum(held.values())


# ---- lives of tensors ----


def two_layers(x: Tensor, layers: nn.Sequential) -> None:
    layers(x).square().sum().backward()


def test_a_pass_that_is_acted_out_holds_what_a_real_one_holds():
    """To the byte: of a network whose kernels need no scratch."""
    sizes = (64, 256, 32)
    real = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:]))
    x = torch.randn(512, 64)
    most = peak(lambda: two_layers(x, real))
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:]))
        x = torch.randn(512, 64)
        with recording(fake) as recorder:
            recorder.known.add(x.untyped_storage()._cdata)
            two_layers(x, fake)
    assert max(recorder.timeline.live) == most
    assert recorder.gradients == bytes_of(fake.parameters())


@pytest.mark.parametrize(
    "fields", [{}, {"lora_r": 4}, {"lora_r": 4, "load_in_4bit": True}], ids=["full", "LoRA", "QLoRA"]
)
@pytest.mark.parametrize("checkpointed", [True, False], ids=["checkpointed", "kept"])
def test_two_passes_tell_of_a_third(directory: Path, fields: dict[str, Any], checkpointed: bool):
    config = run(directory, device="cuda", gradient_checkpointing=checkpointed, **fields)
    known = surveyed(replace(config, per_device_train_batch_size=2))
    asked = surveyed(replace(config, per_device_train_batch_size=10))
    assert known.training.most(10 * 32) == asked.training.most(10 * 32)
    assert known.training.most(2 * 32).live < asked.training.most(10 * 32).live


def test_checkpointing_offloading_and_tiles_each_hold_less(tmp_path: Path):
    directory = written(tmp_path, num_hidden_layers=3)
    kept, checkpointed, offloaded, tiled = (
        surveyed(run(directory, device="cuda", max_tokens_per_batch=1 << 16, **fields))
        .peak(1 << 16)
        .parts["activations"]
        for fields in (
            {"gradient_checkpointing": False},
            {},
            {"activation_offloading": True},
            {"tiled_mlp": 1024},
        )
    )
    assert kept > checkpointed > max(offloaded, tiled)


def test_gradients_of_another_microbatch_are_there_all_the_time(directory: Path):
    one, two = (surveyed(run(directory, gradient_accumulation_steps=n)) for n in (1, 2))
    assert min(two.training.once.gradients) == one.trained_bytes == two.trained_bytes
    assert min(one.training.once.gradients) == 0


# ---- plans ----


KINDS: list[tuple[type, dict[str, Any]]] = [
    (PlannedSft, {}),
    (PlannedDpo, {"max_length": 32}),
    (PlannedReward, {"max_length": 32}),
    (PlannedGrpo, {"beta": 0.1, "max_prompt_length": 8, "max_completion_length": 24}),
    (PlannedPpo, {"max_prompt_length": 8, "max_completion_length": 24}),
]


@pytest.mark.parametrize(("kind", "fields"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_parts_add_up_and_methods_hold_ever_less(kind: type, fields: dict[str, Any], directory: Path):
    resting = []
    for config in by_method(run(directory, kind, **fields)).values():
        survey = surveyed(replace(config, device="cuda"))
        moments = list(survey.moments(survey.demand.tokens))
        assert survey.peak(survey.demand.tokens).total == max(sum(m.parts.values()) for m in moments)
        assert all(size > 0 for m in moments for size in m.parts.values())
        resting.append(sum(survey.resting.values()))
    assert resting == sorted(resting, reverse=True)


def test_ppo_on_one_base_saves_three_of_four_models(directory: Path):
    shape = {"max_prompt_length": 8, "max_completion_length": 24, "lora_r": 4}
    one, four = (surveyed(run(directory, PlannedPpo, roles=roles, **shape)) for roles in ("one base", "separate"))
    own, judge = one.resting["weights"], one.resting["weights"] - one.made.head_bytes()
    assert four.resting["other models"] == own + 2 * judge and "other models" not in one.resting
    assert one.resting["adapters"] == 3 * one.made.adapters() and four.resting["adapters"] == 2 * one.made.adapters()


def test_a_cache_is_two_vectors_a_head_and_layer(directory: Path):
    survey = surveyed(run(directory, PlannedGrpo, max_prompt_length=8, max_completion_length=24, device="cpu"))
    shape = tiny.SHAPE | SMALL
    width = shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]
    assert survey.cached == 2 * 4 * width * shape["num_hidden_layers"]
    (_, decoding, *_) = survey.moments(survey.demand.tokens)
    assert decoding.parts["KV cache"] == survey.cached * 8 * 32


def test_the_largest_microbatch_fits_and_one_more_does_not(directory: Path):
    survey = surveyed(run(directory, device="cuda"))
    capacity = survey.peak(5000).total
    most = survey.largest(capacity)
    assert survey.peak(most).total <= capacity < survey.peak(most + 64).total
    assert survey.largest(1000) == 0


def test_changes_are_in_order_of_what_they_save_and_do_save_it(directory: Path):
    config = run(directory, PlannedGrpo, beta=0.1, gradient_checkpointing=False, max_prompt_length=8)
    survey = surveyed(config)
    found = changes(config, survey)
    assert [c.saves for c in found] == sorted((c.saves for c in found), reverse=True) and len(found) > 2
    (first,) = [
        x for x in candidates(config) if " ".join(f"--{k} {str(v).lower()}" for k, v in x.items()) == found[0].what
    ]
    after = surveyed(replace(config, **first))
    assert survey.peak(survey.demand.tokens).total - after.peak(after.demand.tokens).total == found[0].saves


def test_a_cap_on_tokens_is_the_microbatch(directory: Path):
    demand = demand_of(run(directory, max_tokens_per_batch=100))
    assert (demand.rows, demand.length) == (3, 32)


# ---- the command ----


def test_a_table_and_the_same_as_json(directory: Path, capsys: pytest.CaptureFixture):
    words = ["plan", "sft", "--model", str(directory / "config.json"), "--max_length", "32", "--lora_r", "4"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "LoRA" and list(found["methods"]) == ["full", "LoRA", "QLoRA"]
    for method in found["methods"].values():
        assert method["peak_bytes"] == sum(method["parts"].values()) and all(method["fits"].values())
        assert set(method["largest_microbatch_tokens"]) == {"24", "40", "80", "141", "180"}
        assert max(method["largest_context_tokens"].values()) <= tiny.SHAPE["max_position_embeddings"]
    text = table(found)
    assert "LoRA *" in text and "tokens in 24 GB" in text and "this run does not fit" not in text


def test_what_does_not_fit_is_told_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = written(tmp_path, vocab_size=250_000, hidden_size=4096)
    assert main(["plan", "sft", "--model", str(path), "--gpu", "24", "--max_length", "128"]) == 0
    text = capsys.readouterr().out
    assert "this run does not fit" in text and "--lora_r 16" in text and "--optim adamw_8bit" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sft", "--model", "{d}/none.json"], "is neither a directory nor a config.json"),
        (["sft", "--model", "{d}", "--gpu", "0"], "gpu must be above 0, got 0"),
        (["stf", "--model", "{d}"], "unknown verb 'plan stf' (did you mean 'plan sft'?)"),
        (["ppo", "--model", "{d}", "--roles", "two"], "roles must be one of one base, separate, got 'two'"),
    ],
)
def test_bad_words_are_named(words: list[str], said: str, directory: Path, capsys: pytest.CaptureFixture):
    assert main(["plan", *(word.format(d=directory) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_a_family_that_cannot_be_acted_out_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = written(tmp_path, "mixtral", num_local_experts=4)
    assert main(["plan", "sft", "--model", str(path), "--device", "cpu", "--max_length", "32"]) == 2
    assert "MixtralForCausalLM cannot be planned" in capsys.readouterr().err


def test_the_page_has_the_committed_measurements(memory_table: Any):
    """And none of them is too far from its plan."""
    lines = [json.loads(line) for line in memory_table.RESULTS.read_text().splitlines()]
    assert f"<!-- table:planned -->\n{memory_table.measured()}\n<!-- /table -->" in memory_table.PAGE.read_text()
    assert [line["run"] for line in lines] == [name for name, *_ in benchmark.RUNS]
    for line in lines:
        assert line["measured"]["peak"] >= 500e6
        assert abs(line["error"]["peak"]) <= benchmark.TOTAL
        assert abs(line["error"]["largest part"]) <= benchmark.LARGEST


def test_the_page_has_the_gpus_of_the_plans(tmp_path: Path, memory_table: Any):
    what, kind, fields = memory_table.RUNS[-1]
    row = memory_table.row("8B", what, kind, fields, memory_table.write_config("8B", tmp_path))
    assert row in memory_table.PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft, full", "grpo, LoRA"])
def test_a_plan_is_within_a_tenth_of_a_real_step(name: str, tmp_path: Path):
    found = benchmark.line(name, benchmark.Shape(), tmp_path)
    assert found["measured"]["peak"] >= 500e6
    assert abs(found["error"]["peak"]) <= benchmark.TOTAL
    assert abs(found["error"]["largest part"]) <= benchmark.LARGEST
