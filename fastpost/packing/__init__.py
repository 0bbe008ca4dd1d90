"""Sequences -> packs: which rows share one, in which step, on which rank, and how they are laid end to end.

A pack is one flat row of T tokens without padding, a list of row numbers until `pack` lays it out. Everything here is a
function of lengths, seed and epoch: any number of workers and ranks sees the same steps.

    packs = plan(lengths, max_tokens)                      # or, of more rows than memory holds, stream(rows, len, ...)
    for step in steps(packs, packs_per_step, seed, epoch):
        for rows in deal(step, lengths, ranks, width)[rank]:
            packed = pack([examples[i] for i in rows] or placeholder())
"""

from fastpost.packing.examples import Example, Packed, pack, placeholder
from fastpost.packing.plans import Pack, plan, steps
from fastpost.packing.ranks import cost, deal
from fastpost.packing.streams import Cursor, Step, stream

__all__ = ["Cursor", "Example", "Pack", "Packed", "Step"]
__all__ += ["cost", "deal", "pack", "placeholder", "plan", "steps", "stream"]
