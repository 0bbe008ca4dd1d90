"""What a run is told: one flat frozen dataclass a verb. Names and, where sensible, defaults are TRL's.

A field's metadata are its group, its one line of help with the unit, and its domain; `fastpost.cli` makes flags, YAML
keys and `--help` from them. A config that exists has been checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastpost.models.adapters import is_adapter
from fastpost.trainers.options import REQUIRED, option, read_fields

MODEL, DATA, ROLLOUT = "Model", "Data", "Rollouts and rewards"
LOSS, STEPS, RUN, PLAN = "Loss", "Optimisation", "Run", "Plan"
GROUPS = (PLAN, MODEL, DATA, ROLLOUT, LOSS, STEPS, RUN)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every training verb is told."""

    model: str = option(
        REQUIRED, MODEL, "directory (or hub name) of a Hugging Face causal LM and its tokenizer; or of an adapter"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", MODEL, "of the weights; auto: bfloat16 for a frozen base on a GPU, float32 else"
    )
    bf16: bool | None = option(None, MODEL, "compute in bfloat16 (autocast); default: on a GPU that can")
    attn_implementation: str | None = option(None, MODEL, "a name that transformers knows; default: packed attention")
    trust_remote_code: bool = option(False, MODEL, "run code that comes with the model")
    gradient_checkpointing: bool = option(True, MODEL, "recompute activations in the backward pass to save memory")
    activation_offloading: bool = option(
        False, MODEL, "what gradient checkpointing keeps waits in host memory; wants a GPU"
    )
    tiled_mlp: int = option(0, MODEL, "tokens that an MLP takes at a time, to save memory; 0: all", least=0)
    use_liger_kernel: bool = option(False, MODEL, "liger-kernel's norms, rotary embedding and MLP; wants a GPU")
    load_in_4bit: bool = option(False, MODEL, "quantise the frozen base (QLoRA); wants an adapter")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", MODEL, "normal floats or plain ones")
    use_bnb_nested_quant: bool = option(True, MODEL, "quantise the scales of the 4-bit weights, too")
    bnb_4bit_quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] = option(
        "uint8", MODEL, "what the packed bytes pass for; FSDP wants the dtype of the other weights"
    )
    lora_r: int = option(0, MODEL, "rank of new LoRA adapters; 0: none, a model without adapters trains whole", least=0)
    lora_alpha: int = option(32, MODEL, "adapters are scaled by lora_alpha / lora_r", above=0)
    lora_dropout: float = option(0.0, MODEL, "probability, on the adapters' input", least=0, most=0.99)
    lora_target_modules: tuple[str, ...] = option(
        ("all-linear",), MODEL, "names of the layers that get adapters; all-linear leaves out the head, lm_head"
    )
    lora_modules_to_save: tuple[str, ...] = option((), MODEL, "names of layers that train whole beside the adapters")
    use_rslora: bool = option(False, MODEL, "scale adapters by lora_alpha / sqrt(lora_r)")
    use_dora: bool = option(False, MODEL, "adapters with a length of each output (DoRA); not on lm_head")
    init_lora_weights: Literal["default", "gaussian", "orthogonal"] = option("default", MODEL, "of new adapters")

    dataset: str = option(REQUIRED, DATA, ".jsonl, .json or .parquet file, or a directory saved by datasets")
    eval_dataset: str | None = option(None, DATA, "the same, held out; evaluated every eval_steps and at the end")

    router_aux_loss_coef: float | None = option(
        None,
        LOSS,
        "weight of a mixture of experts' load-balancing loss; default: as the model's config has it, even where its "
        "output_router_logits is off",
        least=0,
    )

    optim: Literal["adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = option(
        "adamw_torch", STEPS, "AdamW; in 8 bits or paged to the host: bitsandbytes'"
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
    save_total_limit: int | None = option(None, RUN, "checkpoints to keep, the newest; default: all", above=0)
    resume_from_checkpoint: str | None = option(
        None, RUN, "a checkpoint directory, or 'latest' of output_dir; later ones in output_dir are renamed"
    )

    def __post_init__(self) -> None:
        read_fields(self)
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


@dataclass(frozen=True, kw_only=True)
class Sft(Training):
    """Supervised fine-tuning on text, messages, or prompt + completion."""

    max_length: int | None = option(1024, DATA, "tokens; longer rows are cut at the end", above=1)
    completion_only_loss: bool | None = option(
        None, DATA, "leave the prompt out of the loss; default: where rows have prompt and completion"
    )
    assistant_only_loss: bool = option(False, DATA, "of conversations only what the assistant says")


@dataclass(frozen=True, kw_only=True)
class Grpo(Training):
    """Group-relative policy optimisation on rewards that a function computes. arXiv:2402.03300"""

    learning_rate: float = option(1e-6, STEPS, "peak of the schedule", least=0)
    share_prompts: bool | None = option(
        None, STEPS, "completions in one microbatch have their common prompt once; default: on a CPU, if attention can"
    )

    max_prompt_length: int | None = option(None, DATA, "tokens; rows with a longer prompt are left out", above=0)

    reward: tuple[str, ...] = option(REQUIRED, ROLLOUT, "built-in names or file.py:function; repeatable")
    reward_weights: tuple[float, ...] | None = option(None, ROLLOUT, "one for each reward; default: 1")
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", ROLLOUT, "whose standard deviation divides the advantages"
    )
    num_generations: int = option(8, ROLLOUT, "completions of a prompt, a group", least=2)
    max_completion_length: int = option(512, ROLLOUT, "tokens, the end-of-sequence token included", above=0)
    mask_truncated_completions: bool = option(False, ROLLOUT, "leave completions that did not end out of the loss")
    temperature: float = option(1.0, ROLLOUT, "of sampling, and of the policy that is trained", above=0)
    top_p: float = option(1.0, ROLLOUT, "sample from the smallest set of this probability", above=0, most=1)
    top_k: int = option(0, ROLLOUT, "sample from this many tokens; 0: from all", least=0)
    min_p: float | None = option(None, ROLLOUT, "drop tokens below this share of the likeliest", least=0, most=1)
    generation_batch_size: int = option(256, ROLLOUT, "completions decoded together", above=0)

    beta: float = option(0.0, LOSS, "weight of the KL (k3) to the model as it was; 0: no reference at all", least=0)
    epsilon: float = option(0.2, LOSS, "ratios are clipped below 1 - epsilon (GSPO's paper: 3e-4)", least=0, most=1)
    epsilon_high: float | None = option(None, LOSS, "and above 1 + epsilon_high; default: epsilon", least=0)
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", LOSS, "of the ratios: token is GRPO's, sequence GSPO's"
    )
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = option(
        "dapo", LOSS, "what a step averages over: its tokens; within then over completions; max_completion_length each"
    )
    num_iterations: int = option(
        1, LOSS, "optimizer steps on the same rollouts; files are written between rollouts", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self)
        if not self.reward:
            raise ValueError("reward must name at least one function: a built-in name or file.py:function")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights must hold one number for each of the {len(self.reward)} rewards, "
                f"got {len(self.reward_weights)}"
            )
        if self.max_steps > 0 and self.max_steps % self.num_iterations:
            raise ValueError(
                f"max_steps must be a multiple of num_iterations {self.num_iterations}, so that the last rollouts are "
                f"used up: got {self.max_steps}, try {self.max_steps + -self.max_steps % self.num_iterations}"
            )


@dataclass(frozen=True, kw_only=True)
class Merge:
    """An adapter into its base: a model like any other, for those who load no adapters."""

    model: str = option(REQUIRED, MODEL, "directory of a PEFT adapter, which names its base")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", MODEL, "of the merged weights")
    load_in_4bit: bool = option(
        False, MODEL, "round the base to 4 bits first, as the adapter saw it in QLoRA; the result is not quantised"
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", MODEL, "normal floats or plain ones")
    use_bnb_nested_quant: bool = option(True, MODEL, "with quantised scales")
    trust_remote_code: bool = option(False, MODEL, "run code that comes with the model")
    output_dir: str = option(REQUIRED, RUN, "receives the merged model and its tokenizer")

    def __post_init__(self) -> None:
        read_fields(self)
        if not is_adapter(self.model):
            raise ValueError(f"model {self.model!r} is no directory of a PEFT adapter: it has no adapter_config.json")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """From nothing to a model that learned, on a CPU: SFT on a few worked sums, then GRPO on answers alone."""

    output_dir: str | None = option(None, RUN, "an empty or new directory for all files; default: a new one in runs/")
    seed: int = option(0, RUN, "of task, model and training", least=0)
    control: bool = option(True, RUN, "also spend GRPO's time on more SFT, to compare; not with --no-control")

    def __post_init__(self) -> None:
        read_fields(self)


def check_groups(config: Grpo) -> None:
    """A step must hold whole groups, and several microbatches must not each hold a part of one."""
    rows, group = config.rows_per_step, config.num_generations
    if rows % group:
        below, above = rows - rows % group, rows + -rows % group
        sizes = " or ".join(str(size) for size in (below, above) if size)
        divisors = [d for d in range(2, rows + 1) if rows % d == 0]
        fits = f"; or num_generations {', '.join(map(str, divisors))}" if divisors else ""
        raise ValueError(
            f"per_device_train_batch_size {config.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} = {rows} completions a step must be a multiple of num_generations "
            f"{group}: make it {sizes}{fits}"
        )
