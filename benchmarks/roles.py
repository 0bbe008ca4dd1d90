"""What PPO's four models hold, on one base and apart: `python benchmarks/roles.py --output FILE.jsonl`.

One line for each arrangement and storage, of a random model of the Llama family:
  one base          the policy's, the value's and the reward's adapters on it; with all of them off it is the reference
  four models       the same adapters, each on a copy of the base of its own; the reference is a bare copy
  four, whole       no adapters: the policy and the value train whole
live_bytes   of all tensors after a step: weights, adapters, AdamW's moments
peak_bytes   that and the most that the next step allocates above it, by the events of torch's allocator; not RSS
A step is every pass of PPO over one pack: reference, reward and value without a gradient, then policy and value with
one, each layer checkpointed. Where the loss of the second step is 0, or it or a bit of what trains differs between the
first two afterwards, no number is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from harness import machine
from live import live_bytes, most_allocated

from fastpost import fused_loss, linear_logprobs, losses
from fastpost.models import attention
from fastpost.models.roles import Roles
from fastpost.packing import Example, Packed, pack


@dataclass(frozen=True)
class Shape:
    hidden: int = 768  # D
    layers: int = 8
    vocab: int = 32_000  # V
    tokens: int = 512  # T
    lora_r: int = 16


ARRANGEMENTS = ("one base", "four models", "four, whole")
STORAGES = ("float32", "nf4")


# ---- the models ----


def write_base(shape: Shape, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=8 * shape.hidden // 3 // 64 * 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_labels=1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


def loaded(directory: Path, storage: str, *, judge: bool = False) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    kind = AutoModelForSequenceClassification if judge else AutoModelForCausalLM
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "score"],
    )
    how = {} if storage == "float32" else {"quantization_config": four_bits}
    model: Any = kind.from_pretrained(directory, dtype=torch.float32, **how)
    for parameter in model.parameters():  # what is read from a file may be mapped, and counted nowhere
        parameter.data = parameter.data.clone()
    model.set_attn_implementation(attention.register())
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def adapter(shape: Shape) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=shape.lora_r, target_modules="all-linear", init_lora_weights=False)


def write_adapters(shape: Shape, base: Path, directory: Path) -> None:
    """The policy's and the value's; the latter is the reward, too."""
    roles = Roles.of(loaded(base, "float32"), policy=adapter(shape), value=adapter(shape))
    scalar = roles.value.scalar
    assert scalar is not None
    torch.nn.init.normal_(scalar.weight, std=shape.hidden**-0.5)  # a new one says 0, and then there is no loss
    roles.save(directory)


def arranged(arrangement: str, storage: str, base: Path, saved: Path) -> Roles:
    """The roles; in all but the last arrangement with the same adapters and heads."""
    from peft import PeftModel

    policy = loaded(base, storage)
    if arrangement == "one base":
        return Roles.of(policy, policy=saved / "policy", reward=saved / "value", value=saved / "value")
    reference, reward, value = (loaded(base, storage, judge=judge) for judge in (False, True, True))
    if arrangement == "four, whole":
        return Roles.of(policy, reference=reference, reward=reward, value=value)
    reward, value = (PeftModel.from_pretrained(x, saved / "value", is_trainable=x is value) for x in (reward, value))
    return Roles.of(policy, policy=saved / "policy", reference=reference, reward=reward, value=value)


# ---- a step ----


def packed(shape: Shape) -> Packed:
    """Four sequences, a quarter of each a prompt."""
    n = shape.tokens // 4
    ids = torch.randint(0, shape.vocab, (4, n), generator=torch.Generator().manual_seed(0)).tolist()
    return pack([Example(row, [i >= n // 4 for i in range(n)]) for row in ids])


def step(roles: Roles, pack: Packed, optimizer: torch.optim.Optimizer) -> float:
    """The losses' sum; gradients are gone afterwards."""
    target = pack.batch.target
    with torch.no_grad():
        ref_logp = linear_logprobs(roles.reference.hidden(pack), roles.reference.head(), target)
        score, old_value = roles.reward.at_ends(pack), roles.value(pack)
    advantage = score.repeat_interleave(pack.batch.lengths) - old_value
    batch = replace(
        pack.batch, advantage=advantage, ref_logp=ref_logp, old_value=old_value, return_=advantage + old_value
    )
    loss = fused_loss(losses.ppo, roles.policy.hidden(pack), roles.policy.head(), batch)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    error = losses.value(roles.value(pack), batch)[target != -100].mean()
    error.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach() + error.detach())


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """Of their bits, in this order: a copy to compare with would be counted as live."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def measured(roles: Roles, shape: Shape) -> dict[str, Any]:
    trained = [p for tensors in roles.trainable().values() for p in tensors]
    pack, optimizer = packed(shape), torch.optim.AdamW(trained, lr=1e-4, foreach=False)
    step(roles, pack, optimizer)
    live, said = live_bytes(), []
    above = most_allocated(lambda: said.append(step(roles, pack, optimizer)))
    counts = {"trained_parameters": sum(p.numel() for p in trained)}
    return {**counts, "live_bytes": live, "peak_bytes": live + above, "loss": said[0], "trained": digest(trained)}


def lines(shape: Shape, storages: Sequence[str]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        base, saved = Path(folder) / "base", Path(folder) / "saved"
        write_base(shape, base)
        write_adapters(shape, base, saved)
        for storage in storages:
            said = set()
            for arrangement in ARRANGEMENTS if storage == "float32" else ARRANGEMENTS[:-1]:
                found = measured(arranged(arrangement, storage, base, saved), shape)
                said |= {(found["loss"], found["trained"])} if arrangement != "four, whole" else set()
                if len(said) > 1 or not found["loss"]:
                    raise SystemExit(f"one base and four models do not compute the same, or nothing at all: {said}")
                yield {"arrangement": arrangement, "storage": storage, **found}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """What docs/roles.md shows of a run."""
    shape = Shape(**lines[0]["setup"]["shape"])
    said = ", ".join(f"{letter} {n}" for letter, n in zip("DLVTr", astuple(shape), strict=True))
    rows = [f"| {said} | trained | held | at most |", "|---|---|---|---|"]
    for line in lines:
        trained, held, most = (line[name] / 1e6 for name in ("trained_parameters", "live_bytes", "peak_bytes"))
        what = f"{line['arrangement']}, {line['storage']}"
        rows.append(f"| {what} | {trained:.1f}M | {held:.0f} MB | {most:.0f} MB |")
    return "\n".join(rows)


def quiet() -> None:
    """transformers reports every head that a file has and a model has not."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description="What PPO's four models hold, on one base and apart.")
    parser.add_argument("--output", type=Path, required=True, help="a file of JSON lines, appended to")
    parser.add_argument("--storage", choices=STORAGES, action="append", help="default: each of them")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = vars(parser.parse_args())
    shape = Shape(**{name: options[name] for name in asdict(Shape())})
    quiet()
    setup = {
        "bench": "roles",
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine(torch.device("cpu"))),
        "shape": asdict(shape),
    }
    options["output"].parent.mkdir(parents=True, exist_ok=True)
    found = [{"setup": setup, **line} for line in lines(shape, options["storage"] or STORAGES)]
    with options["output"].open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in found)
    print(table(found))


if __name__ == "__main__":
    main()
