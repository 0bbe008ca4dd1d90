"""LongRoPE (arXiv:2402.13753) turns a sequence beyond its original window by other frequencies than one within it.

transformers picks one set a forward pass, by the longest sequence in it. So the sequences of a pack that lie on both
sides of a window go through the trunk in turns, those of one side together, and each is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpost.models.sharded import fsdp_modules
from fastpost.packing import Packed
from fastpost.packing.subsets import positions_of
from fastpost.shared_prompt import AnyPack
from fastpost.types import Batch


def rotations(config: Any) -> list[dict[str, Any]]:
    """What rotary embeddings are made from: one for all layers, or one a kind of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict)]


def windows(config: Any) -> list[int]:
    """Lengths beyond which sequences turn by other frequencies."""
    return [x["original_max_position_embeddings"] for x in rotations(config) if x.get("rope_type") == "longrope"]


def sides(lm: Any, packed: AnyPack) -> list[list[int]]:
    """The sequences of a pack that one pass can take, for each pass; one list where all are alike."""
    beyond = [window for window in windows(lm.config) if packed.longest > window]
    if not beyond:
        return [[]]
    lengths = (packed.batch.lengths if isinstance(packed, Packed) else packed.position_ids[0, packed.ends] + 1).tolist()
    found: dict[tuple[bool, ...], list[int]] = {}
    for row, length in enumerate(lengths):
        found.setdefault(tuple(length > window for window in beyond), []).append(row)
    if len(found) > 1:
        _check_turns(lm, packed, f"{min(lengths)} to {packed.longest} tokens", min(beyond))
    return list(found.values())


def _check_turns(lm: Any, packed: AnyPack, have: str, window: int) -> None:
    """ValueError where a pack cannot go in turns."""
    said = (
        f"the pack's sequences have {have}, and {type(lm).__name__} turns those of more than {window} by other "
        "frequencies (longrope), all of a pass alike: "
    )
    if not isinstance(packed, Packed):
        raise ValueError(f"{said}set share_prompts to false, or keep a prompt and its completions within {window}")
    if fsdp_modules(lm):  # whose passes are of all processes together, and others may have a pack of one side
        raise ValueError(f"{said}FSDP2 takes max_length {window}; or train with DDP")


def part_of(packed: Packed, rows: Sequence[int]) -> tuple[Packed, Tensor]:
    """These sequences, as the trunk reads them, and where in the pack their tokens lie."""
    batch = packed.batch
    at = positions_of(batch.lengths, rows).to(packed.input_ids.device)
    lengths = batch.lengths[torch.as_tensor(rows)]
    part = Batch(batch.target[at], lengths)
    return Packed(packed.input_ids[:, at], packed.position_ids[:, at], part, int(lengths.max())), at


def laid_back(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:  # (1, T_i, D) each -> (1, T, D)
    """What the passes gave, in the order of the pack."""
    return torch.cat(list(parts), 1).index_select(1, torch.cat(list(places)).argsort())
