"""Common to all scripts: command line, log and exit status.

A script is a class of arguments and a `main`. The fields are the command-line options, including whole sections of the
configuration (`--model '{"base": …}'` or `--model.base …`).
"""

import ctypes
import gc
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, TypeVar

import polars as pl
from pydantic import BeforeValidator, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from tqdm import tqdm

from salmon import COLLECTOR, work
from salmon.border import reason
from salmon.errors import UserError, describe_errors

log = logging.getLogger("salmon")
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>

T = TypeVar("T")

# An option that is a list, written as JSON. Pydantic-settings does not decode JSON escapes in lists: a line break in a
# turn marker would become a backslash and an n, and a path with an umlaut a different path.
JSON = BeforeValidator(lambda value: json.loads(value) if isinstance(value, str) else value)
JsonList = Annotated[list[T], NoDecode, JSON]


class Arguments(BaseSettings):
    """Base of a script's arguments. They come only from the command line, never from the environment."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        nested_model_default_partial_update=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Ignore the environment, which may have a variable with an option's name."""
        return (init_settings,)


A = TypeVar("A", bound=Arguments)

UNEXPECTED = "unexpected error; please report it with the lines above and below"
INTERVAL = float(os.environ.get("SALMON_PROGRESS_SECONDS", "15"))
"""Seconds between two lines of progress."""


def run(main: Callable[[A], None], arguments: type[A]) -> None:
    """Parse the command line, run `main`, and end with a status that says whether the artifact is complete.

    Exit status: 0: the artifact is complete; 1: an error, whose last lines say what to do or hold the traceback;
    2: the arguments are wrong.
    """
    gc.freeze()  # imported objects stay: neither a collection nor the end of the process must scan them
    gc.set_threshold(*COLLECTOR)
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    who = f" [rank {rank}]" if world != "1" else ""
    logging.basicConfig(
        level=logging.INFO if rank == "0" else logging.WARNING,
        format=f"%(asctime)s{who} %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries warn about each other at every step
    for chatty in ("httpx", "httpx2", "httpcore2", "filelock", "fsspec", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    _end_with_launcher()
    try:
        parsed = CliApp.run(arguments)
    except ValidationError as error:
        log.error(describe_errors(error, arguments, "the command line"))
        sys.exit(2)
    except (SettingsError, RecursionError) as error:
        log.error("the command line is not valid: %s; sections must be JSON", reason(error))
        sys.exit(2)
    started = time.monotonic()
    try:
        main(parsed)
    except UserError as error:
        log.error("%s", error)
        _exit(1)
    except (OSError, pl.exceptions.PolarsError) as error:
        # For a full disk, polars says "os error" while it writes data, and "transport error" in the footer.
        if not isinstance(error, OSError) and not any(words in str(error) for words in ("os error", "transport error")):
            log.exception(UNEXPECTED)
            _exit(1)
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        log.error("%s%s; check the path, its permissions, and the free disk space", where, reason(error))
        _exit(1)
    except MemoryError:
        log.error("not enough memory; give the job more memory, or lower its batch sizes")
        _exit(1)
    except Exception:
        log.exception(UNEXPECTED)
        _exit(1)
    log.info("done in %.0f s", time.monotonic() - started)
    _exit(0)


def _end_with_launcher() -> None:
    """Have this rank killed together with torchrun: otherwise it would still be running at the next start.

    slurmstepd ends ranks that srun has started. A single process has no launcher: it finishes its work, and any other
    process that is started for the same artifact waits for it (`work.WorkFolder`).
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # the launcher ended before this was set
            os.kill(os.getpid(), signal.SIGKILL)


def _exit(status: int) -> None:
    """End with a status. Several ranks end immediately, without the interpreter's clean-up.

    After an error, pending communication could keep a rank, and therefore the others, from ending. Also, with
    DeepSpeed, a rank failed without a message about once in eighty runs while the interpreter ended, although the
    artifact was complete. Because of its status, Snakemake would delete the work of days.
    """
    work.release_all()
    if "RANK" in os.environ:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)


class Meter:
    """Logs one line every `INTERVAL` seconds: items done of the total, rate, time left.

    Args:
        total: total number of items, including those done before; None if unknown.
        what: name of the items, such as `pairs`.
        done: items that an earlier run finished.
        says_end: whether the last item always gets a line.
    """

    def __init__(self, *, total: int | None, what: str, done: int = 0, says_end: bool = True) -> None:
        self.total, self.what, self.before, self.done, self.says_end = total, what, done, done, says_end
        self.started = self.last = time.monotonic()

    def advance(self, number: int = 1) -> None:
        """Count further finished items."""
        self.done += number
        now = time.monotonic()
        if now - self.last >= INTERVAL or (self.says_end and self.done == self.total):
            line = tqdm.format_meter(
                self.done, self.total, now - self.started, unit=f" {self.what}", initial=self.before, ncols=90
            )
            log.info("%s", line)
            self.last = now


def progress(items: Iterable[T], *, total: int | None, what: str, done: int = 0) -> Iterator[T]:
    """Yield the items, and log progress; arguments as for `Meter`."""
    meter = Meter(total=total, what=what, done=done)
    for item in items:
        yield item
        meter.advance()
