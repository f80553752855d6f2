"""What every script shares: its command line, its log and its exit status.

A script is a class of arguments and a `main`: the fields are the options of the command line, whole sections
of the configuration among them (`--model '{"base": …}'` or `--model.base …`).
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

# An option that is a list, written as JSON. Pydantic-settings' own reading of lists keeps JSON's escapes as they
# stand: a line break in a turn marker would become a backslash and an n, a path with an umlaut another path.
JSON = BeforeValidator(lambda value: json.loads(value) if isinstance(value, str) else value)
JsonList = Annotated[list[T], NoDecode, JSON]


class Arguments(BaseSettings):
    """Base of a script's arguments; they come from the command line only, never from the environment."""

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
        """Leave out the environment, where a variable named like an option could stand."""
        return (init_settings,)


A = TypeVar("A", bound=Arguments)

UNEXPECTED = "unexpected error; please report it with the lines above and below"
INTERVAL = float(os.environ.get("SALMON_PROGRESS_SECONDS", "15"))
"""Seconds between two lines of progress."""


def run(main: Callable[[A], None], arguments: type[A]) -> None:
    """Parse the command line, run `main`, and end with a status that says whether the artifact is whole.

    Exit status: 0 the artifact is whole; 1 an error, whose last lines say what to do or hold the traceback;
    2 the arguments are wrong.
    """
    gc.freeze()  # what is imported stays: neither a collection nor the end of the process has to walk it
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
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries about each other, at every step
    for chatty in ("httpx", "httpx2", "httpcore2", "filelock", "fsspec", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    _end_with_launcher()
    try:
        parsed = CliApp.run(arguments)
    except ValidationError as error:
        log.error(describe_errors(error, arguments, "the command line"))
        sys.exit(2)
    except (SettingsError, RecursionError) as error:
        log.error("the command line is not valid: %s; a section is given as JSON", reason(error))
        sys.exit(2)
    started = time.monotonic()
    try:
        main(parsed)
    except UserError as error:
        log.error("%s", error)
        _exit(1)
    except (OSError, pl.exceptions.PolarsError) as error:
        if not isinstance(error, OSError) and "os error" not in str(error):  # as polars says it
            log.exception(UNEXPECTED)
            _exit(1)
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        log.error("%s%s; check the path, who may use it, and the room on the disk", where, reason(error))
        _exit(1)
    except MemoryError:
        log.error("not enough memory; give the job more, or lower its batch sizes")
        _exit(1)
    except Exception:
        log.exception(UNEXPECTED)
        _exit(1)
    log.info("done in %.0f s", time.monotonic() - started)
    _exit(0)


def _end_with_launcher() -> None:
    """Let this rank be killed when torchrun is, which could not end it any more: a new start would meet it at work.

    Ranks that srun has started are ended by slurmstepd. A single process belongs to nobody: it works to its end, and
    whoever is started on the same artifact waits for it (`work.WorkFolder`).
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it ended before this was set
            os.kill(os.getpid(), signal.SIGKILL)


def _exit(status: int) -> None:
    """End with a status; several ranks end at once, without what the interpreter would do for them.

    After an error the communication that is under way might keep a rank from ending, and so the others. And under
    DeepSpeed, once in some eighty runs, a rank failed without a message while the interpreter ended, the artifact being
    whole; its status would make Snakemake delete the work of days.
    """
    work.release_all()
    if "RANK" in os.environ:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)


class Meter:
    """Logs one line every `INTERVAL` seconds: how many of how many, rate, time left.

    Args:
        total: number of items in all, those done before included; None where nobody knows.
        what: names the items, as in `pairs`.
        done: items an earlier run finished.
        says_end: whether the last item has a line of its own, whenever it comes.
    """

    def __init__(self, *, total: int | None, what: str, done: int = 0, says_end: bool = True) -> None:
        self.total, self.what, self.before, self.done, self.says_end = total, what, done, done, says_end
        self.started = self.last = time.monotonic()

    def advance(self, number: int = 1) -> None:
        """So many more items are done."""
        self.done += number
        now = time.monotonic()
        if now - self.last >= INTERVAL or (self.says_end and self.done == self.total):
            line = tqdm.format_meter(
                self.done, self.total, now - self.started, unit=f" {self.what}", initial=self.before, ncols=90
            )
            log.info("%s", line)
            self.last = now


def progress(items: Iterable[T], *, total: int | None, what: str, done: int = 0) -> Iterator[T]:
    """Pass items on, and log how many there were; arguments as for `Meter`."""
    meter = Meter(total=total, what=what, done=done)
    for item in items:
        yield item
        meter.advance()
