"""A step as TRL's own trainers take it: their data sets, collators and `training_step`, on rows of our making.

A token's text is its number, so the trainers tokenise the very rows that fastpost packs. What GRPO would sample is put
in place of what it samples, once: padding, rewards and advantages are TRL's, and before the clock starts.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import step
import torch
from step import EOS, FIRST_WORD, PAD, Row, Shape, Trainee
from torch import Tensor

Inputs = dict[str, Any]


def tokenizer(vocab: int) -> Any:
    """A word is the number of its token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": PAD, "<eos>": EOS} | {str(i): i for i in range(FIRST_WORD, vocab)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def text(ids: Sequence[int]) -> str:
    return " ".join("<eos>" if i == EOS else str(i) for i in ids)


def dataset(method: str, rows: Sequence[Row]) -> Any:
    """In the columns of TRL's data sets."""
    from datasets import Dataset

    asked = [text(row.prompt) + " " for row in rows]
    said = [text(row.completion) for row in rows]
    columns: dict[str, dict[str, Sequence[object]]] = {
        "sft": {"prompt": asked, "completion": said},
        "dpo": {"prompt": asked[::2], "chosen": said[::2], "rejected": said[1::2]},
        "grpo": {"prompt": asked, "given": [row.reward for row in rows]},
    }
    return Dataset.from_dict(columns[method])


def reward(given: list[float], **_: object) -> list[float]:
    return given


def config(method: str, shape: Shape, batch: int, packing: bool, folder: str) -> Any:
    """TRL's defaults, but for what all contestants have alike and for checkpointing, which none has."""
    import trl

    own: dict[str, dict[str, Any]] = {
        "sft": {"max_length": shape.max_tokens, "packing": packing},  # by best fit, largest first
        "dpo": {"max_length": None, "beta": step.BETA},
        "grpo": {"max_completion_length": shape.longest + 1, "num_generations": shape.group},
    }
    each = batch // 2 if method == "dpo" else batch  # it counts pairs
    return getattr(trl, f"{method.upper()}Config")(
        output_dir=folder,
        per_device_train_batch_size=each,
        gradient_accumulation_steps=shape.rows // batch,
        bf16=shape.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        **own[method],
    )


def trainer_of(method: str, rows: Sequence[Row], shape: Shape, args: Any) -> Any:
    import trl

    own: dict[str, dict[str, Any]] = {
        "sft": {},
        "dpo": {"ref_model": step.model(shape, "sdpa", reference=True)} if method == "dpo" else {},
        "grpo": {"reward_funcs": reward},
    }
    return getattr(trl, f"{method.upper()}Trainer")(
        model=step.model(shape, "sdpa"),
        args=args,
        train_dataset=dataset(method, rows),
        processing_class=tokenizer(shape.vocab),
        **own[method],
    )


def collated(trainer: Any, each: int) -> Iterable[Inputs]:
    """The microbatches of a step."""
    rows = trainer.train_dataset
    for i in range(0, len(rows), each):
        yield trainer.data_collator([rows[j] for j in range(i, min(i + each, len(rows)))])


def replayed(trainer: Any, rows: Sequence[Row], group: int) -> list[Inputs]:
    """The microbatches of a step whose completions are given. From here on the trainer takes a batch as it is."""
    trainer._generate_single_turn = lambda *_, **__: ([row.completion for row in rows], None)
    trainer.model.train()
    trainer._prepare_inputs([trainer.train_dataset[i] for i in range(len(rows))])
    trainer._prepare_inputs = lambda inputs: inputs
    return trainer._buffered_inputs


def width(inputs: Inputs) -> int:
    names = ("input_ids",) if "input_ids" in inputs else ("prompt_ids", "completion_ids")
    return sum(inputs[name].numel() for name in names)


def accumulate(
    trainer: Any, model: Any, batches: Callable[[], Iterable[Inputs]], tokens: Tensor | None
) -> Tensor:  # (number of microbatches,)
    return torch.stack([trainer.training_step(model, dict(inputs), tokens) for inputs in batches()])


def made(method: str, shape: Shape, *, batch: int | None = None, packing: bool = False, fused: bool = False) -> Trainee:
    """`batch`: rows of a microbatch; `packing`: TRL's own, a pack a microbatch; `fused`: on fastpost's head."""
    from fastpost.integrations.trl import patch

    rows, size = step.given(method, shape), batch or shape.batch
    with tempfile.TemporaryDirectory() as folder, patch() if fused else contextlib.nullcontext():
        trainer = trainer_of(method, rows, shape, config(method, shape, size, packing, folder))
    if method == "grpo":
        given = replayed(trainer, rows, shape.group)
        batches: Callable[[], Iterable[Inputs]] = lambda: given  # noqa: E731
    else:
        each = 1 if packing else trainer.args.per_device_train_batch_size
        batches = partial(collated, trainer, each)
    widths = [width(inputs) for inputs in batches()]
    trainer.current_gradient_accumulation_steps = len(widths)
    model = trainer.accelerator.prepare_model(trainer.model)
    tokens = torch.tensor(step.completion_tokens(rows)) if method == "sft" else None
    return Trainee(model, partial(accumulate, trainer, model, batches, tokens), sum(widths), step.adamw(model))
