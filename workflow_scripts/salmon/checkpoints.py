"""Checkpoints of trainers: folders `checkpoint-STEP` in a work folder, which several ranks may write together.

A file in the folder marks it as complete and lists its contents. A folder without it is left from an interruption.
"""

import json
import logging
import os
from pathlib import Path

from salmon import distributed
from salmon.artifacts import flush, hash_path, remove, write_json
from salmon.work import WorkFolder, check_private

log = logging.getLogger(__name__)

WHOLE = "whole"
KEPT = 2


def step_of(checkpoint: Path) -> int:
    """Number of completed steps."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def new(work: WorkFolder, step: int) -> Path:
    """An empty folder for a checkpoint. All ranks call this. A UserError if another process has taken over the work."""
    checkpoint = work.path / f"checkpoint-{step}"
    if distributed.is_main():
        work.check()
        remove(checkpoint)
        checkpoint.mkdir()
    distributed.barrier()
    return checkpoint


def seal(work: WorkFolder, checkpoint: Path) -> None:
    """Mark a checkpoint as complete, and delete all older ones. All ranks call this. Errors as for `new`."""
    if distributed.is_main():
        work.check()
    distributed.barrier()  # all ranks have written their parts
    hashes: dict[str, str] = {}
    if os.environ.get("LOCAL_RANK", "0") == "0":  # on each machine: its memory may hold data that is not on disk yet
        flush(checkpoint)
        hashes = _hashes(checkpoint)
    # A machine may not see yet what another has written.
    parts = distributed.gather(hashes)
    if distributed.is_main():
        write_json(checkpoint / WHOLE, {name: value for part in parts for name, value in part.items()})
        for old in _sorted(work.path)[:-KEPT]:
            remove(old)
    distributed.barrier()


def newest(work: WorkFolder) -> Path | None:
    """The newest undamaged checkpoint. Damaged and incomplete ones are deleted. All ranks call this.

    Raises:
        UserError: if other users may write into the work folder.
    """
    return distributed.broadcast(_newest(work.path) if distributed.is_main() else None)


def _newest(folder: Path) -> Path | None:
    if folder.is_dir():
        check_private(folder)
    for checkpoint in reversed(_sorted(folder)):
        if not (checkpoint / WHOLE).is_file():
            log.info("deleting %s, which is incomplete", checkpoint)
        elif damaged := _damage(checkpoint):
            log.warning("deleting %s, which is damaged: %s differs from what was written", checkpoint, damaged)
        else:
            log.info("resuming after step %d", step_of(checkpoint))
            return checkpoint
        remove(checkpoint)
    return None


def _hashes(checkpoint: Path) -> dict[str, str]:
    """Name -> SHA-256 of each file of a checkpoint."""
    files = (file for file in checkpoint.rglob("*") if file.is_file() and file.name != WHOLE)
    return {str(file.relative_to(checkpoint)): hash_path(file) for file in files}


def _damage(checkpoint: Path) -> str | None:
    """Name of a missing, new or changed file of a sealed checkpoint, if there is one."""
    text = (checkpoint / WHOLE).read_text(encoding="utf-8")
    if not text:  # from version 0.1.0, which wrote nothing more
        return None
    try:
        wanted = json.loads(text)
    except ValueError:
        return WHOLE
    found = _hashes(checkpoint)
    return next((name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)), None)


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=step_of)
