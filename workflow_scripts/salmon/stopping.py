"""Stopping on request: SLURM sends SIGTERM before a job's time is up or its nodes go to another job.

A trainer then writes a checkpoint after the current step, and ends with an error. Started again, it resumes from there.
Sampling and judging keep every finished batch and need no warning.
"""

import logging
import signal
import threading
from types import FrameType

import torch

from salmon import distributed
from salmon.errors import UserError

log = logging.getLogger(__name__)

_requested = threading.Event()


class Stopped(UserError):
    """The work is not finished, but is kept up to this step."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"stopped by SIGTERM after step {step}; a checkpoint is written: start again to resume from it"
        )


def listen() -> None:
    """From now on, treat SIGTERM as a request; `stop_requested` reports it."""
    _requested.clear()
    signal.signal(signal.SIGTERM, _ask)


def stop_requested(device: torch.device) -> bool:
    """Whether any rank was asked to stop. All ranks call this, and all get the same answer."""
    return distributed.sum_over_ranks(torch.tensor(float(_requested.is_set()), device=device)).item() > 0


def _ask(_: int, __: FrameType | None) -> None:
    if not _requested.is_set():
        log.warning("SIGTERM: stopping after this step, with a checkpoint")
    _requested.set()
