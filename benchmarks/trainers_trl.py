"""A run of `benchmarks/trainers.py` by TRL: its trainer, whose methods are timed from outside.

rollout    `_generate`
reward     `_calculate_rewards`
reference  passes without gradient: those of the reference, and in RLOO that of the policy which sampled
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from trainers_task import SAMPLED, Job
from trainers_trace import Ready, Step, Watch

SHUFFLES = ("sft", "grpo", "rloo")  # have a field for that; rows come in the order of the steps already


def ready(job: Job, threads: int) -> Ready:
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        trainer = trainer_of(job)

    def train() -> Sequence[Step]:
        watch, losses = Watch(), []
        watch_parts(trainer, watch, losses)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trainer.train()
        trainer.save_model(job.out)
        lines = [line for line in trainer.state.log_history if "loss" in line]
        each = zip(watch.between(), watch.parts, losses, lines, strict=False)
        return [_step(job, *one) for one in each]

    return Ready(train)


def trainer_of(job: Job) -> Any:
    import trl
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer

    disable_progress_bars()
    name = job.method.upper()
    own: dict[str, Any] = {"shuffle_dataset": False} if job.method in SHUFFLES else {}
    args = getattr(trl, f"{name}Config")(
        output_dir=f"{job.out}.trl",
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **own,
        **job.fields,
    )
    return getattr(trl, f"{name}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(job.laid_out),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        **({"reward_funcs": job.reward} if job.reward is not None else {}),
    )


def watch_parts(trainer: Any, watch: Watch, losses: list[float]) -> None:
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.restart()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.end()

    trainer.add_callback(Ends())
    step = trainer.training_step

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.training_step = noted
    if hasattr(trainer, "_generate"):
        watch.around(trainer, "_generate", "rollout")
        watch.around(trainer, "_calculate_rewards", "reward")
        without = lambda: not torch.is_grad_enabled()  # noqa: E731
        watch.around(trainer, "_get_per_token_logps_and_entropies", "reference", without)
    elif getattr(trainer, "ref_model", None) is not None:
        watch.around(trainer.ref_model, "forward", "reference")


def _step(job: Job, seconds: tuple[float, float], parts: dict[str, float], loss: float, line: dict[str, float]) -> Step:
    each = job.fields["per_device_train_batch_size"]
    tokens = line["completions/mean_length"] * each if job.method in SAMPLED else 0.0
    return Step(*seconds, parts, loss, tokens)
