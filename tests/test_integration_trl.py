"""TRL's trainers with and without fastpost's head.

Two runs are the same when they differ by what TRL differs from itself under other chunks of the vocabulary: the losses
of the steps, all that is logged, and the weights at the end may be 10 times that far apart. Where TRL has no chunks,
float64 is the judge.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("peft")

import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head as trls

import tiny
from fastpost.integrations import trl as on_fastpost
from fastpost.integrations import trl_heads
from fastpost.integrations.trl_heads import Asked, add_fused_lm_head, fuse
from problems import schedules_of
from rules import assert_close_to_truth, assert_gradient_close_to_truth

pytestmark = pytest.mark.filterwarnings("ignore")
CHUNKS = (7, 32)  # of a vocabulary of 97; TRL's own is 32768
V = tiny.SHAPE["vocab_size"]
CLOCKS = ("runtime", "per_second", "step_time")


@dataclass(frozen=True)
class Run:
    losses: Tensor  # of every forward and backward, in order
    logs: Tensor  # every number that TRL logged but times, end to end
    weights: Tensor  # all of them, end to end


@dataclass(frozen=True)
class Kind:
    """How a trainer of TRL's is built on a tiny model."""

    trainer: str
    rows: str
    replay: str = ""  # how it wants its completions
    teacher: bool = False

    def classes(self) -> tuple[Any, Any]:
        source = trl
        if self.trainer in ("CPO", "ORPO"):
            source = __import__(f"trl.experimental.{self.trainer.lower()}", fromlist=["_"])
        return getattr(source, f"{self.trainer}Trainer"), getattr(source, f"{self.trainer}Config")


KINDS = {
    "sft": Kind("SFT", "sft"),
    "dpo": Kind("DPO", "dpo"),
    "kto": Kind("KTO", "kto"),
    "grpo": Kind("GRPO", "prompts", replay="pair"),
    "rloo": Kind("RLOO", "prompts", replay="ids"),
    "distillation": Kind("Distillation", "prompts", replay="ids", teacher=True),
    "cpo": Kind("CPO", "dpo"),
    "orpo": Kind("ORPO", "dpo"),
}
SETTINGS: dict[str, Any] = {
    "max_steps": 20,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-6,  # or a gradient that is all rounding makes a step of its own
    "logging_steps": 1,
    "seed": 3,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
SAMPLING = {"num_generations": 4, "max_completion_length": 8}


def data(rows: str) -> Dataset:
    sums = [(f"{a}+{b}=", str(a + b), str(a * b + 7)) for a in range(6) for b in range(4)]
    columns: Callable[..., dict[str, Any]] = {
        "sft": lambda p, y, n: {"prompt": p, "completion": y},
        "dpo": lambda p, y, n: {"prompt": p, "chosen": y, "rejected": n},
        "kto": lambda p, y, n: {"prompt": p, "completion": y, "label": len(y) == 1},
        "prompts": lambda p, y, n: {"prompt": p},
    }[rows]
    return Dataset.from_list([columns(*row) for row in sums])


def replayed(pair: bool) -> Callable[..., Any]:
    """Completions that depend on the number of the call alone, in place of what the model would say."""
    calls = iter(range(1000))

    def generate(self: Any, prompt_ids: list[list[int]], *_: object, **__: object) -> Any:
        draw = torch.Generator().manual_seed(next(calls))
        lengths = torch.randint(1, 8, (len(prompt_ids),), generator=draw).tolist()
        ids = [[*torch.randint(5, V, (n,), generator=draw).tolist(), 1] for n in lengths]
        return (ids, None) if pair else ids

    return generate


def reward(completions: list[str], **_: object) -> list[float]:
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a directory: some trainers load their reference from where the policy came from."""
    path = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(path)
    return path


def trainer_of(
    name: str,
    out: Path,
    saved: Path | Callable[[], Any],
    lora: LoraConfig | None = None,
    evaluates: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    kind = KINDS[name]
    made, configured = kind.classes()
    torch.manual_seed(0)  # for LoRA's A
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype) if isinstance(saved, Path) else saved()
    more: dict[str, Any] = {"train_dataset": data(kind.rows)}
    if evaluates:
        more["eval_dataset"] = data(kind.rows).select(range(6))
        config = {"eval_strategy": "steps", "eval_steps": 2} | config
    if name in ("grpo", "rloo"):
        more["reward_funcs"] = reward
    if kind.replay:
        config = {k: v for k, v in SAMPLING.items() if name != "distillation" or k != "num_generations"} | config
    if kind.teacher:
        more["teacher_model"] = tiny.model(seed=1, hidden_size=48).to(dtype)
    if lora is not None:
        more["peft_config"], config = lora, {"learning_rate": 1e-2, "max_steps": 8} | config
    args = configured(**SETTINGS | {"output_dir": str(out)} | config)
    trainer = made(model=model, args=args, processing_class=tiny.tokenizer(), **more)
    if kind.replay:
        trainer._generate_single_turn = MethodType(replayed(kind.replay == "pair"), trainer)
    return trainer


def train(trainer: Any) -> Run:
    losses: list[Tensor] = []
    inner = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        losses.append((found[0] if isinstance(found, tuple) else found).detach().double())
        return found

    trainer.compute_loss = compute_loss
    trainer.train()
    logs = [v for entry in trainer.state.log_history for k, v in sorted(entry.items()) if counts(trainer, k)]
    weights = torch.cat([w.detach().double().flatten() for w in trainer.model.parameters()])
    return Run(torch.stack(losses), torch.tensor(logs, dtype=torch.float64), weights)


def counts(trainer: Any, name: str) -> bool:
    """Not clocks; not the sign of what may be a tie, logged as rewards/margins; not means over padding, too."""
    other = "logits/" in name and type(trainer).__name__ in ("CPOTrainer", "ORPOTrainer")
    return not other and not any(part in name for part in (*CLOCKS, "rewards/accuracies"))


def calls_of_the_head(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of fastpost's functions, as they are called."""
    called: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: called.append(name) or function(*args, **kwargs)

    for name in ("token_stats", "fused_loss"):
        monkeypatch.setattr(trl_heads, name, counted(name, getattr(trl_heads, name)))
    return called


def runs(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, saved: Any, **changes: Any) -> tuple[Run, ...]:
    """On fastpost, on TRL, and on TRL with other chunks of the vocabulary."""
    called = calls_of_the_head(monkeypatch)
    with on_fastpost.patch():
        ours = train(trainer_of(name, out, saved, **changes))
    assert set(called) == {"fused_loss" if name == "distillation" else "token_stats"}
    called.clear()
    theirs = train(trainer_of(name, out, saved, **changes))
    others = []
    for chunk in CHUNKS:
        monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", chunk)
        monkeypatch.setattr("trl.kernels.chunked_divergence.VOCAB_CHUNK_SIZE", chunk)
        others.append(train(trainer_of(name, out, saved, **changes)))
    assert not called
    return ours, theirs, *others


def assert_same(ours: Run, theirs: Run, *others: Run) -> None:
    for what in ("losses", "logs", "weights"):
        got, want, *again = (getattr(run, what) for run in (ours, theirs, *others))
        error, yardstick = (got - want).norm(), max((want - other).norm() for other in again)
        assert yardstick > 0, f"{what}: TRL under other chunks is the same to the bit, so nothing is measured"
        assert error <= 10 * yardstick, f"{what}: {error:.2e} apart, and TRL from itself {yardstick:.2e}"


# More than one iteration, for with one the ratio is 1 whatever the log-probabilities are.
OFF_POLICY = {"num_iterations": 2}
RUNS = {
    "sft": ("sft", {}),
    "dpo": ("dpo", {}),
    "kto": ("kto", {}),
    "grpo": ("grpo", OFF_POLICY),
    "rloo": ("rloo", OFF_POLICY),
    "distillation": ("distillation", {}),
}


@pytest.mark.parametrize("run", RUNS)
def test_twenty_steps_are_the_same(run, tmp_path, monkeypatch, saved):
    name, changes = RUNS[run]
    assert_same(*runs(name, tmp_path, monkeypatch, saved, **changes))


ATTENTION = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ON_HEAD = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
OPTIONS = {
    "sft accumulating and evaluating": ("sft", {"gradient_accumulation_steps": 3, "evaluates": True}),
    "sft dft": ("sft", {"loss_type": "dft"}),
    "sft padding-free": ("sft", {"padding_free": True, "max_length": None}),
    "sft lora": ("sft", {"lora": ATTENTION}),
    "dpo precomputed, evaluating": ("dpo", {"precompute_ref_log_probs": True, "evaluates": True}),
    "dpo ipo": ("dpo", {"loss_type": ["ipo"]}),
    "dpo aot": ("dpo", {"loss_type": ["aot"]}),
    "dpo weighted": ("dpo", {"use_weighting": True, "gradient_accumulation_steps": 2}),
    "dpo lora": ("dpo", {"lora": ATTENTION}),
    "kto apo": ("kto", {"loss_type": "apo_zero_unpaired", "evaluates": True}),
    "grpo kl and entropy": ("grpo", {"beta": 0.1, "entropy_coef": 0.02, "temperature": 0.7, **OFF_POLICY}),
    "grpo fp32 head": ("grpo", {"beta": 0.1, "cast_lm_head_to_fp32": True, "top_entropy_quantile": 0.5, **OFF_POLICY}),
    "grpo lora, evaluating": ("grpo", {"lora": ATTENTION, "beta": 0.1, "evaluates": True, **OFF_POLICY}),
    "rloo lora": ("rloo", {"lora": ATTENTION, **OFF_POLICY}),
    "distillation forward": ("distillation", {"beta": 0.0, "temperature": 2.0}),
    "distillation mixed": ("distillation", {"beta": 0.3, "gradient_accumulation_steps": 2}),
    "distillation lora": ("distillation", {"lora": ATTENTION, "evaluates": True}),
}


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.3}


def experts() -> Any:
    model = tiny.model("mixtral", **EXPERTS)
    model.set_experts_implementation("eager")  # the default takes no float64
    return model


def soft_capped() -> Any:
    return tiny.model("gemma2", head_dim=8, final_logit_softcapping=5.0)


@pytest.mark.parametrize("name", ["sft", "grpo"])
@pytest.mark.parametrize("make", [experts, soft_capped])
def test_other_families(name, make, tmp_path, monkeypatch):
    changes = OFF_POLICY if name == "grpo" else {}
    assert_same(*runs(name, tmp_path, monkeypatch, make, max_steps=6, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("run", OPTIONS)
def test_options_change_nothing(run, tmp_path, monkeypatch, saved):
    name, changes = OPTIONS[run]
    assert_same(*runs(name, tmp_path, monkeypatch, saved, **{"max_steps": 6} | changes))


WITHOUT_CHUNKS = {
    "cpo": ("cpo", None, {"evaluates": True}),
    "cpo simpo": ("cpo", None, {"loss_type": "simpo", "cpo_alpha": 0.0, "gradient_accumulation_steps": 2}),
    "cpo lora": ("cpo", None, {"lora": ATTENTION}),
    "cpo lora on the head": ("cpo", None, {"lora": ON_HEAD}),
    "orpo lora on the head": ("orpo", None, {"lora": ON_HEAD}),
    "orpo": ("orpo", None, {"evaluates": True}),
    "orpo experts": ("orpo", experts, {}),
}


@pytest.mark.parametrize("run", WITHOUT_CHUNKS)
def test_cpo_and_orpo_are_as_exact_as_trl(run, tmp_path, monkeypatch, saved):
    name, make, changes = WITHOUT_CHUNKS[run]

    def trained(dtype: torch.dtype = torch.float32) -> Run:
        model = saved if make is None else lambda: make().to(dtype)
        return train(trainer_of(name, tmp_path, model, dtype=dtype, **{"max_steps": 6} | changes))

    called = calls_of_the_head(monkeypatch)
    with on_fastpost.patch():
        ours = trained()
    assert set(called) == {"token_stats"}
    called.clear()
    theirs, truth = trained(), trained(torch.float64)
    assert not called
    assert_close_to_truth(ours.losses, theirs.losses, truth.losses, "losses")
    assert_close_to_truth(ours.logs, theirs.logs, truth.logs, "logs")
    assert_gradient_close_to_truth(ours.weights, theirs.weights, truth.weights, "weights")


# One forward, field by field.

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.2},
    "phi": {},  # a bias
}


def inputs(width: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(5, V, (3, width))
    labels = ids.clone()
    labels[0, :4], labels[1, -3:] = -100, -100
    return {"input_ids": ids, "labels": labels}


def from_logits(model: Any, ids: Tensor, labels: Tensor, temperature: float) -> dict[str, Tensor]:
    logits = model(input_ids=ids).logits[:, :-1] / temperature
    logp, scored = logits.log_softmax(-1), labels[:, 1:] != -100
    found = {
        "log_probs": logp.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == labels[:, 1:],
    }
    return {name: torch.where(scored, x, 0) for name, x in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_exact(family):
    model, given = tiny.model(family, **FAMILIES[family]), inputs()
    truth = from_logits(model.double(), given["input_ids"], given["labels"], 0.7)
    plain = from_logits(model.float(), given["input_ids"], given["labels"], 0.7)
    add_fused_lm_head(model, 0.7, outputs=FIELDS)
    out = model(**given, fused_lm_head=True)
    for name in FIELDS:
        assert_close_to_truth(out[name], plain[name], truth[name].double(), name)
    scored = given["labels"][:, 1:] != -100
    assert torch.equal(out.label_mask, scored)
    torch.testing.assert_close(out.loss, -out.log_probs.sum() / scored.sum())
    torch.testing.assert_close(model(**given, fused_lm_head=True, num_items_in_batch=7).loss, -out.log_probs.sum() / 7)
    assert out.log_probs.requires_grad and not out.mean_logits.requires_grad


def entropy_of(model: Any, given: dict[str, Tensor]) -> Tensor:
    return model(**given, fused_lm_head=True).entropy


def slope_of_the_entropy(model: Any, given: dict[str, Tensor]) -> Tensor:
    from_logits(model, given["input_ids"], given["labels"], 1.0)["entropy"].sum().backward()
    return model.model.layers[0].mlp.up_proj.weight.grad


@pytest.mark.parametrize("frozen", [False, True])
def test_an_entropy_is_looked_at_or_differentiated_as_was_asked(frozen):
    model, given = tiny.model(), inputs()
    model.lm_head.requires_grad_(not frozen)
    add_fused_lm_head(model, outputs=FIELDS)
    out = model(**given, fused_lm_head=True)
    assert schedules_of(out.log_probs) == {"FrozenLogp" if frozen else "LazyStats"}
    with pytest.raises(RuntimeError, match="this entropy is for looking at"):
        out.entropy.sum().backward()
    fuse(model, Asked(outputs=FIELDS, differentiable_entropy=True))
    weight = model.model.layers[0].mlp.up_proj.weight
    (got,) = torch.autograd.grad(entropy_of(model, given).sum(), weight)
    same, truth = (slope_of_the_entropy(tiny.model().to(dtype), given) for dtype in (torch.float32, torch.float64))
    assert_gradient_close_to_truth(got, same, truth)


def test_a_head_cast_to_fp32_is_multiplied_in_fp32_under_autocast_too():
    model, given = tiny.model().bfloat16(), inputs()
    model.lm_head.float().weight.data.normal_(0, 0.2)  # not what bfloat16 can hold
    add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = model(**given, fused_lm_head=True).log_probs
        hidden = model.model(given["input_ids"]).last_hidden_state[:, :-1]
    target, scored = given["labels"][:, 1:, None].clamp(min=0), given["labels"][:, 1:] != -100
    same, truth = (
        (hidden.to(dtype) @ model.lm_head.weight.to(dtype).T).log_softmax(-1).gather(-1, target)[..., 0] * scored
        for dtype in (torch.float32, torch.float64)
    )
    assert_close_to_truth(got, same, truth)


def test_labels_that_are_shifted_already_are_scored_where_they_stand():
    model, given = tiny.model(), inputs()
    add_fused_lm_head(model)
    out = model(**given, fused_lm_head=True)
    shifted = torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
    same = model(input_ids=given["input_ids"], shift_labels=shifted, fused_lm_head=True)
    assert same.log_probs.shape == (3, 12) and out.log_probs.shape == (3, 11)
    assert torch.equal(same.log_probs[:, :-1], out.log_probs)
    assert torch.equal(same.log_probs[:, -1], torch.zeros(3))


def test_nothing_to_score_is_a_zero_with_a_gradient_of_zero():
    model, given = tiny.model(), inputs()
    add_fused_lm_head(model, outputs=FIELDS)
    out = model(input_ids=given["input_ids"], labels=torch.full_like(given["labels"], -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0
    assert all(w.grad is not None and not w.grad.any() for w in model.parameters())


def test_without_the_flag_the_forward_is_the_models_own():
    model, given = tiny.model(), inputs()
    before = model(**given)
    add_fused_lm_head(model)
    after = model(**given)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    ids = given["input_ids"]
    assert torch.equal(model.generate(ids, max_new_tokens=3), tiny.model().generate(ids, max_new_tokens=3))


def test_a_copy_of_a_fused_model_is_a_model_of_its_own():
    model, given = tiny.model(), inputs()
    add_fused_lm_head(model)
    copied = copy.deepcopy(model)
    copied.lm_head.weight.data.zero_()
    torch.testing.assert_close(copied(**given, fused_lm_head=True).loss, torch.tensor(V).log())
    assert not copied(**given).logits.any() and model(**given).logits.any()


def test_the_loss_of_the_routers_is_trls():
    ours, theirs, given = experts(), experts(), inputs()
    add_fused_lm_head(ours)
    trls(theirs)
    got, want = (model(**given, fused_lm_head=True) for model in (ours, theirs))
    assert torch.equal(got.aux_loss, want.aux_loss) and got.aux_loss > 0
    torch.testing.assert_close(got.loss, -got.log_probs.sum() / got.label_mask.sum() + 0.3 * want.aux_loss)
    assert ours(**given, fused_lm_head=True, output_router_logits=False).aux_loss is None


# The patch itself.


def everything() -> dict[tuple[str, str], Any]:
    """Every attribute of every module of TRL's that is loaded, and of its trainers."""
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "trl"}
    found = {}
    for name, module in loaded.items():
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {(f"{name}.{attribute}", key): x for key, x in vars(value).items()}
    return found


def changed(before: dict[tuple[str, str], Any]) -> set[str]:
    after = everything()
    return {".".join(key) for key in before if after.get(key) is not before[key]}


PATCHED = {
    *(f"trl.trainer.{name}_trainer.add_fused_lm_head" for name in ("sft", "dpo", "kto", "grpo", "rloo")),
    *(f"trl.trainer.{name}_trainer.BaseTunerLayer" for name in ("sft", "dpo", "kto", "grpo", "rloo", "distillation")),
    "trl.trainer.distillation_trainer.DistillationTrainer.__init__",
    "trl.trainer.grpo_trainer.GRPOTrainer.__init__",
    "trl.experimental.cpo.cpo_trainer.CPOTrainer.__init__",
    "trl.experimental.orpo.orpo_trainer.ORPOTrainer.__init__",
}


@pytest.fixture
def before() -> dict[tuple[str, str], Any]:
    on_fastpost.patch().restore()  # every module it touches is loaded
    return everything()


def test_a_patch_is_taken_back_to_the_last_attribute(before):
    handle = on_fastpost.patch()
    assert changed(before) == PATCHED
    handle.restore()
    assert changed(before) == set()
    with pytest.raises(RuntimeError, match="from inside"), on_fastpost.patch():
        assert changed(before) == PATCHED
        raise RuntimeError("from inside")
    assert changed(before) == set()


def test_a_second_patch_changes_nothing_and_takes_nothing_back(before):
    with on_fastpost.patch():
        first = everything()
        with on_fastpost.patch() as inner:
            assert inner.changes == () and changed(first) == set()
        assert changed(before) == PATCHED
    assert changed(before) == set()


def test_what_somebody_else_put_there_since_stays(before, monkeypatch):
    handle, theirs = on_fastpost.patch(), lambda *_, **__: None
    trl.trainer.sft_trainer.add_fused_lm_head = theirs
    handle.restore()
    handle.restore()
    assert changed(before) == {"trl.trainer.sft_trainer.add_fused_lm_head"}
    assert trl.trainer.sft_trainer.add_fused_lm_head is theirs
    trl.trainer.sft_trainer.add_fused_lm_head = trls
    assert changed(before) == set()


def test_another_version_is_refused_untouched(before, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ValueError, match=r"knows how trl 1\.16\.0 .* this is trl 1\.17\.0: install trl==1\.16\.0"):
        on_fastpost.patch()
    monkeypatch.undo()
    assert changed(before) == set()


@pytest.mark.parametrize("path", sorted(on_fastpost.RELIES_ON))
def test_a_trl_without_what_is_relied_on_is_refused_untouched(path, before, monkeypatch):
    monkeypatch.delattr(path)
    here = everything()
    with pytest.raises(ValueError, match=f"has no {path}, which fastpost relies on"):
        on_fastpost.patch()
    assert changed(here) == set()


def test_a_trl_with_another_signature_is_refused_untouched(before, monkeypatch):
    monkeypatch.setattr("trl.trainer.rloo_trainer.add_fused_lm_head", lambda model, heat=1.0: None)
    here = everything()
    with pytest.raises(
        ValueError, match=r"another trl\.trainer\.rloo_trainer\.add_fused_lm_head .* takes model, heat,"
    ):
        on_fastpost.patch()
    assert changed(here) == set()


def forwards(trainer: Any) -> str:
    """The module whose forward the trainer's model has."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    return model.forward.__func__.__globals__["__name__"]


OURS = trl_heads.__name__


def test_what_counts_is_where_a_trainer_is_built(tmp_path, monkeypatch, saved):
    called, short = calls_of_the_head(monkeypatch), {"max_steps": 1}
    earlier = [trainer_of(name, tmp_path, saved, **short) for name in ("sft", "cpo", "distillation")]
    with on_fastpost.patch():
        inside = [trainer_of(name, tmp_path, saved, **short) for name in ("sft", "cpo", "distillation")]
        for trainer in earlier:
            trainer.train()
        assert called == []
    for trainer, function in zip(inside, ("token_stats", "token_stats", "fused_loss"), strict=True):
        called.clear()
        trainer.train()
        assert called == [function]
    assert forwards(trainer_of("sft", tmp_path, saved)) == "trl.trainer.utils"


def test_a_subclass_keeps_a_method_of_its_own(tmp_path, monkeypatch, saved):
    made, configured = KINDS["orpo"].classes()

    class Mine(made):
        def concatenated_forward(self, model: Any, batch: Any) -> Any:
            return super().concatenated_forward(model, batch)

    called = calls_of_the_head(monkeypatch)
    args = configured(**SETTINGS | {"output_dir": str(tmp_path), "max_steps": 1})
    with on_fastpost.patch():
        trainer = Mine(model=tiny.model(), args=args, processing_class=tiny.tokenizer(), train_dataset=data("dpo"))
        trainer.train()
    assert called == []


def test_the_mean_logits_of_cpo_are_of_what_is_scored(tmp_path, saved):
    with on_fastpost.patch():
        trainer = trainer_of("cpo", tmp_path, saved)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = trainer.concatenated_inputs(batch, padding_value=0)["concatenated_labels"]
    own = type(trainer).concatenated_forward
    with torch.no_grad():
        got, want = trainer.concatenated_forward(trainer.model, batch), own(trainer, trainer.model, batch)
        truth = own(trainer, trainer.model.double(), batch)
    for mine, same, exact, rows in zip(got[2:4], want[2:4], truth[2:4], labels.chunk(2), strict=True):
        scored = rows[:, 1:] != -100
        assert len(mine) == scored.sum()
        assert_close_to_truth(mine, *(x[:, :-1][scored].mean(-1) for x in (same, exact)), "logits")


def test_distillation_leaves_out_what_a_tool_said(tmp_path, saved):
    with on_fastpost.patch():
        trainer = trainer_of("distillation", tmp_path, saved, beta=0.5)
    ids, tools = torch.randint(5, V, (3, 9)), torch.rand(3, 5) < 0.5
    batch = {"prompt_ids": ids[:, :4], "completion_ids": ids[:, 4:], "tool_mask": tools.long()}
    batch |= {f"{part}_mask": torch.ones_like(batch[f"{part}_ids"]) for part in ("prompt", "completion")}
    got = trainer._compute_loss(trainer.model, batch, None)
    want = type(trainer)._compute_loss(trainer, trainer.model, batch, None)
    assert got[2] == want[2] == tools.sum() < tools.numel()
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach())


def test_mixed_precision_trains_and_is_unwrapped_without_loss(tmp_path, saved):
    with on_fastpost.patch():
        trainer = trainer_of("sft", tmp_path, saved, bf16=True, max_steps=8, learning_rate=1e-2)
    run = train(trainer)
    assert run.losses[-1] < run.losses[0]
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    assert forwards(trainer) == OURS and model(**inputs(), fused_lm_head=True).log_probs.shape == (3, 11)


# An adapter on the head, which TRL refuses.


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "grpo", "rloo", "distillation"])
def test_without_the_patch_an_adapter_on_the_head_is_refused_as_ever(name, tmp_path, saved):
    on_fastpost.patch().restore()
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer_of(name, tmp_path, saved, lora=ON_HEAD)


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_on_the_head_is_trained(name, tmp_path, saved):
    options = {"beta": 0.1} if name in ("grpo", "rloo") else {}  # a reference: the model without its adapters
    with on_fastpost.patch():
        trainer = trainer_of(name, tmp_path, saved, lora=ON_HEAD, max_steps=12, **options)
    lora = trainer.model.get_output_embeddings()
    before = {part: getattr(lora, part)["default"].weight.detach().clone() for part in ("lora_A", "lora_B")}
    frozen = lora.base_layer.weight.detach().clone()
    run = train(trainer)
    assert all(not torch.equal(getattr(lora, part)["default"].weight, before[part]) for part in before)
    assert torch.equal(lora.base_layer.weight, frozen)
    if name not in ("grpo", "rloo"):  # whose losses are advantages that sum to nothing
        assert run.losses[-4:].mean() < run.losses[:4].mean()


def first_step(trainer: Any, loss_of: Callable[[Any, Any], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the first batch, and its gradient in each adapter."""
    loss = loss_of(trainer, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    return loss.detach(), {n: w.grad for n, w in trainer.model.named_parameters() if w.requires_grad}


def of_the_trainer(trainer: Any, batch: Any) -> Tensor:
    return trainer.compute_loss(trainer.model, batch)


def of_logits(trainer: Any, batch: Any) -> Tensor:
    """By PEFT's own forward, without a fused head."""
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@torch.no_grad()
def merged(trainer: Any) -> Tensor:
    """By the weights W + s B A, with no adapter left."""
    trainer.model.double()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model = trainer.model.merge_and_unload()
    return of_logits(trainer, batch)


def test_the_first_step_with_an_adapter_on_the_head_is_that_of_merged_weights(tmp_path, saved):
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with on_fastpost.patch():
        trainers = [trainer_of("sft", tmp_path, saved, lora=lora) for _ in range(4)]
    trainers[2].model.double()
    loss, gradients = first_step(trainers[0], of_the_trainer)
    same, same_gradients = first_step(trainers[1], of_logits)
    truth, true_gradients = first_step(trainers[2], of_logits)
    assert_close_to_truth(loss, same, merged(trainers[3]), "loss of merged weights")
    assert_close_to_truth(loss, same, truth, "loss")
    assert sum("lm_head" in name for name in gradients) == 2
    for name in gradients:
        assert_gradient_close_to_truth(gradients[name], same_gradients[name], true_gradients[name], name)


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_that_head_of_refuses_is_refused_at_once(name, tmp_path, saved):
    dora = LoraConfig(r=4, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    with on_fastpost.patch(), pytest.raises(ValueError, match="the head carries"):
        trainer_of(name, tmp_path, saved, lora=dora)


def test_an_fp32_head_and_an_adapter_on_it_are_refused(tmp_path, saved):
    with on_fastpost.patch(), pytest.raises(ValueError, match="cast_lm_head_to_fp32=True would take the adapter off"):
        trainer_of("grpo", tmp_path, saved, lora=ON_HEAD, cast_lm_head_to_fp32=True)
