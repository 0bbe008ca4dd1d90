"""What every training verb is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastpost.models.adapters import is_adapter
from fastpost.trainers.config.groups import DATA, LOSS, MODEL, RUN, STEPS
from fastpost.trainers.config.loaded import Loaded
from fastpost.trainers.options import REQUIRED, option, read_fields


@dataclass(frozen=True, kw_only=True)
class Training(Loaded):
    """What every training verb is told."""

    gradient_checkpointing: bool = option(True, MODEL, "recompute activations in the backward pass to save memory")
    activation_offloading: bool = option(
        False, MODEL, "what gradient checkpointing keeps waits in host memory; wants a GPU"
    )
    tiled_mlp: int = option(0, MODEL, "tokens that an MLP takes at a time, to save memory; 0: all", least=0)
    use_liger_kernel: bool = option(False, MODEL, "liger-kernel's norms, rotary embedding and MLP; wants a GPU")
    load_in_4bit: bool = option(False, MODEL, "quantise the frozen base (QLoRA); wants an adapter")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", MODEL, "normal floats or plain ones")
    use_bnb_nested_quant: bool = option(True, MODEL, "quantise the scales of the 4-bit weights, too (TRL: false)")
    bnb_4bit_quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] = option(
        "uint8", MODEL, "what the packed bytes pass for; FSDP wants the dtype of the other weights"
    )
    lora_r: int = option(0, MODEL, "rank of new LoRA adapters; 0: none, a model without adapters trains whole", least=0)
    lora_alpha: int = option(32, MODEL, "adapters are scaled by lora_alpha / lora_r", above=0)
    lora_dropout: float = option(0.0, MODEL, "probability, on the adapters' input (TRL: 0.05)", least=0, most=0.99)
    lora_target_modules: tuple[str, ...] = option(
        ("all-linear",),
        MODEL,
        "names of the layers that get adapters; all-linear leaves out the head, lm_head (TRL: peft's choice)",
    )
    lora_modules_to_save: tuple[str, ...] = option((), MODEL, "names of layers that train whole beside the adapters")
    use_rslora: bool = option(False, MODEL, "scale adapters by lora_alpha / sqrt(lora_r)")
    use_dora: bool = option(False, MODEL, "adapters with a length of each output (DoRA); not on lm_head")
    init_lora_weights: Literal["default", "gaussian", "orthogonal"] = option("default", MODEL, "of new adapters")

    dataset: str = option("", DATA, ".jsonl, .json or .parquet file, or a directory saved by datasets", needed=True)
    eval_dataset: str | None = option(None, DATA, "the same, held out; evaluated every eval_steps and at the end")

    router_aux_loss_coef: float | None = option(
        None,
        LOSS,
        "weight of a mixture of experts' load-balancing loss; default: as the model's config has it, even where its "
        "output_router_logits is off",
        least=0,
    )

    optim: Literal["adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = option(
        "adamw_torch",
        STEPS,
        "AdamW; in 8 bits or paged to the host: bitsandbytes' (TRL: adamw_torch_fused)",
    )
    learning_rate: float = option(2e-5, STEPS, "peak of the schedule", least=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option(
        "linear", STEPS, "to 0 at the last step, or constant; each after warmup"
    )
    warmup_steps: float = option(0.0, STEPS, "optimizer steps; below 1: a share of all of them", least=0)
    weight_decay: float = option(0.0, STEPS, "decoupled (AdamW); norms and biases are spared", least=0)
    adam_beta1: float = option(0.9, STEPS, "decay of the first moment, per step", least=0, most=0.999999)
    adam_beta2: float = option(0.999, STEPS, "decay of the second moment, per step", least=0, most=0.999999)
    adam_epsilon: float = option(1e-8, STEPS, "added to the root of the second moment", above=0)
    max_grad_norm: float = option(1.0, STEPS, "clip the gradient to this norm; 0: never", least=0)
    per_device_train_batch_size: int = option(8, STEPS, "rows of a microbatch", above=0)
    gradient_accumulation_steps: int = option(1, STEPS, "microbatches of an optimizer step", above=0)
    max_tokens_per_batch: int | None = option(
        None, STEPS, "tokens of a packed microbatch; given, the rows of a step are repacked to fill it", above=0
    )
    num_train_epochs: float = option(3.0, STEPS, "passes over the dataset, where max_steps is not given", above=0)
    max_steps: int = option(-1, STEPS, "optimizer steps; -1: by num_train_epochs", least=-1)

    output_dir: str = option(REQUIRED, RUN, "receives model, metrics.jsonl, metrics.png and checkpoint-N/")
    seed: int = option(42, RUN, "of everything random", least=0)
    logging_steps: int = option(
        10, RUN, "optimizer steps that a line of metrics.jsonl averages; an evaluation ends one early", above=0
    )
    eval_steps: int = option(0, RUN, "optimizer steps between evaluations; 0: at the end only", least=0)
    save_steps: int = option(500, RUN, "optimizer steps between checkpoints; 0: none", least=0)
    save_total_limit: int | None = option(
        None, RUN, "checkpoints to keep, the newest, and the best beside them; default: all", above=0
    )
    metric_for_best_model: str | None = option(
        None, RUN, "an eval_ metric: where it is best so far a checkpoint is written, and kept"
    )
    greater_is_better: bool | None = option(None, RUN, "of that metric; default: unless its name ends in loss")
    report_to: tuple[str, ...] = option(
        ("none",),
        RUN,
        "trackers by accelerate's names, tensorboard, wandb, trackio, ...; all: those installed",
    )
    project: str = option("fastpost", RUN, "of the trackers that have projects")
    run_name: str | None = option(None, RUN, "in the trackers; default: the last name of output_dir")
    push_to_hub: bool = option(False, RUN, "upload the model, with a card, when the run is over")
    hub_model_id: str | None = option(None, RUN, "owner/name there; default: the last name of output_dir")
    hub_private_repo: bool | None = option(None, RUN, "default: as the account has it")
    resume_from_checkpoint: str | None = option(
        None,
        RUN,
        "a checkpoint directory, or 'latest': the newest sound one of output_dir, from the beginning where there is "
        "none; later ones in output_dir are renamed",
    )

    def __post_init__(self) -> None:
        read_fields(self)
        if self.metric_for_best_model is not None and not self.eval_steps:
            raise ValueError("metric_for_best_model is of an evaluation: give eval_dataset and eval_steps as well")
        if self.load_in_4bit and not self.trains_adapter:
            raise ValueError("load_in_4bit freezes the base model, so nothing would train: give lora_r as well, 16 say")
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError("activation_offloading moves what gradient_checkpointing keeps: switch that on as well")
        if self.dtype == "float16" and not self.trains_adapter:
            raise ValueError(
                "dtype float16 cannot hold Adam's updates of all weights: use float32 or bfloat16, or lora_r"
            )
        if self.max_steps == 0:
            raise ValueError("max_steps must be positive, or -1 to go by num_train_epochs, got 0")

    @property
    def trains_adapter(self) -> bool:
        """Whether the weights of the model itself stay: it gets an adapter, or has one."""
        return self.lora_r > 0 or is_adapter(self.model)

    @property
    def rows_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps
