"""Checkpoints of trainers: folders `checkpoint-STEP` in a work folder, which several ranks may write together.

A file in the folder says that all have; without it the folder is what an interruption left.
"""

import logging
import os
from pathlib import Path

from salmon import distributed
from salmon.artifacts import check_owner, flush, remove

log = logging.getLogger(__name__)

WHOLE = "whole"
KEPT = 2


def step_of(checkpoint: Path) -> int:
    """Number of steps that were done."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def new(folder: Path, step: int) -> Path:
    """An empty folder for a checkpoint. All ranks call this. A UserError if another job has taken the work over."""
    checkpoint = folder / f"checkpoint-{step}"
    if distributed.is_main():
        check_owner(folder)
        remove(checkpoint)
        checkpoint.mkdir()
    distributed.barrier()
    return checkpoint


def seal(checkpoint: Path) -> None:
    """Say that a checkpoint is whole, and delete all but the newest. All ranks call this. Errors as for `new`."""
    if distributed.is_main():
        check_owner(checkpoint.parent)
    distributed.barrier()  # all have written their part
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of each machine, whose memory may hold what is not on the disk yet
        flush(checkpoint)
    distributed.barrier()
    if distributed.is_main():
        (checkpoint / WHOLE).touch()
        for old in _sorted(checkpoint.parent)[:-KEPT]:
            remove(old)
    distributed.barrier()


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; what an interruption left incomplete is deleted. All ranks call this."""
    return distributed.broadcast(_newest(folder) if distributed.is_main() else None)


def _newest(folder: Path) -> Path | None:
    for checkpoint in _sorted(folder):
        if not (checkpoint / WHOLE).is_file():
            log.info("deleting %s, which is incomplete", checkpoint)
            remove(checkpoint)
    whole = _sorted(folder)
    if not whole:
        return None
    log.info("resuming after step %d", step_of(whole[-1]))
    return whole[-1]


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=step_of)
