"""Run scripts, alone or on several ranks, kill them, and write their inputs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl

from salmon.artifacts import write_table
from salmon.tables import Table
from salmon.work import WorkFolder
from tests import forks
from tests.forks import PATIENCE

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "workflow_scripts"


def environment() -> dict[str, str]:
    """The environment of a process that imports what the tests import."""
    return os.environ | {"PYTHONPATH": f"{SCRIPTS}{os.pathsep}{ROOT}"}


def launch(ranks: int, *line: Any, real: bool = False) -> subprocess.CompletedProcess[str]:
    """Start a script and its arguments on ranks that share two threads, as the rules do.

    Args:
        ranks: their number.
        line: the script and its arguments.
        real: processes of their own, with different seeds for the hashes of strings.
    """
    words = ["bash", SCRIPTS / "launch.sh", "1", str(ranks), "2", *line]
    known = environment() | ({} if real else forks.jobs())
    return subprocess.run(words, env=known, capture_output=True, text=True, check=False, timeout=PATIENCE)


def command(script: ModuleType, arguments: dict[str, Any]) -> list[str]:
    """The command line of a script with these arguments."""
    flags = []
    for name, value in script.Arguments(**arguments).model_dump(mode="json").items():
        flags += [
            f"--{name.replace('_', '-')}",
            json.dumps(value) if value is None or isinstance(value, dict) else str(value),
        ]
    return [sys.executable, str(script.__file__), *flags]


def kill_at_first_part(arguments: list[str], output: Path) -> int:
    """Start a script, kill it as soon as it has kept something, and count the parts it left behind."""
    folder = WorkFolder(output).path
    done = forks.run(arguments, until=lambda: any(folder.glob("part-*.parquet")))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    return len(list(folder.glob("part-*.parquet")))


def failing(arguments: list[Any], **more: Any) -> str:
    """Run a script that must end with an error; return its message."""
    done = forks.run(arguments, env=environment(), **more)
    assert done.returncode == 1, done.stderr
    return done.stderr


def on_a_full_disk(arguments: list[Any], size: int, **more: Any) -> str:
    """The same, but it cannot write a file of more than `size` bytes."""
    return failing(arguments, limits={"FSIZE": size}, **more)


def write_rows(path: Path, table: Table, rows: list[dict[str, Any]], counts: dict[str, int]) -> Path:
    """Write an artifact with these rows, and a manifest with these counts."""
    manifest = {"settings": {}, "inputs": {}, "counts": counts}
    write_table(pl.DataFrame(rows, schema=table.schema), path, table, manifest)
    return path


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """One dictionary laid over another, key by key."""
    found = dict(base)
    for name, value in changes.items():
        old = found.get(name)
        found[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found
