"""TRL's trainers with and without fastpost's head.

Two runs are the same when they differ by what TRL differs from itself under another chunk of the vocabulary: the losses
of the steps, what is logged, and the weights at the end may be 10 times that far apart. Where TRL has no chunks, float64
is the judge.
"""

from __future__ import annotations

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

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput  # noqa: E402
from trl.trainer.utils import add_fused_lm_head as trls  # noqa: E402

import tiny  # noqa: E402
from fastpost.integrations import trl as on_fastpost  # noqa: E402
from rules import assert_close_to_truth, assert_gradient_close_to_truth  # noqa: E402

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
        monkeypatch.setattr(on_fastpost, name, counted(name, getattr(on_fastpost, name)))
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
    return tiny.model("mixtral", **EXPERTS)


def soft_capped() -> Any:
    return tiny.model("gemma2", head_dim=8, final_logit_softcapping=5.0)


@pytest.mark.parametrize("name", ["sft", "grpo"])
@pytest.mark.parametrize("make", [experts, soft_capped])
def test_other_families(name, make, tmp_path, monkeypatch):
    changes = OFF_POLICY if name == "grpo" else {}
    assert_same(*runs(name, tmp_path, monkeypatch, make, max_steps=6, **changes))


@pytest.mark.parametrize("run", OPTIONS)
def test_options_change_nothing(run, tmp_path, monkeypatch, saved):
    name, changes = OPTIONS[run]
    assert_same(*runs(name, tmp_path, monkeypatch, saved, **{"max_steps": 6} | changes))


WITHOUT_CHUNKS = {
    "cpo": ("cpo", {"evaluates": True}),
    "cpo simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "gradient_accumulation_steps": 2}),
    "cpo lora": ("cpo", {"lora": ATTENTION}),
    "orpo": ("orpo", {"evaluates": True}),
    "orpo experts": ("orpo", {"make": experts}),
}


@pytest.mark.parametrize("run", WITHOUT_CHUNKS)
def test_cpo_and_orpo_are_as_exact_as_trl(run, tmp_path, monkeypatch, saved):
    name, changes = WITHOUT_CHUNKS[run]
    make = changes.pop("make", None)

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
