"""Two processes joined by gloo, for tests of what ranks do together."""

from __future__ import annotations

import datetime
import faulthandler
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
HANG_SECONDS = 50.0  # of one process, once it runs
GLOO_TIMEOUT = datetime.timedelta(seconds=20)


def two_processes(
    job: Callable[[int], object],
    folder: Path,
    seconds: float = HANG_SECONDS,
    patience: datetime.timedelta = GLOO_TIMEOUT,
) -> list:
    """job(rank) in two processes joined by gloo. A failure shows its traceback; so does a process that hangs."""
    try:
        mp.start_processes(_process, (job, folder, seconds, patience), nprocs=RANKS, start_method="spawn")
    except mp.ProcessExitedException as error:
        stacks = "\n".join(file.read_text() for file in sorted(folder.glob("*.hung")))
        raise AssertionError(f"{error}\n{stacks}") from error
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _process(
    rank: int, job: Callable[[int], object], folder: Path, seconds: float, patience: datetime.timedelta
) -> None:
    torch.set_num_threads(1)
    with (folder / f"{rank}.hung").open("w") as stack:
        faulthandler.dump_traceback_later(seconds, exit=True, file=stack)
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=patience)
        torch.save(job(rank), folder / f"{rank}.pt")
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
