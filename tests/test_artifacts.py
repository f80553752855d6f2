"""Artifacts and their manifests: complete or absent, even after a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from salmon import artifacts
from tests.running import environment

DEAD = 2**22 + 7  # larger than any process id of Linux


KILLED = """
import os, sys, pathlib
import polars as pl
from salmon import artifacts
from tests.running import environment
replace, left = os.replace, [int(sys.argv[2])]
def counting(source, target):
    if not left[0]:
        os.kill(os.getpid(), 9)
    left[0] -= 1
    replace(source, target)
os.replace = counting
manifest = dict.fromkeys(("settings", "inputs", "counts"), 2)
artifacts.write_table(pl.DataFrame({"a": [2]}), pathlib.Path(sys.argv[1]), manifest=manifest)
"""


def manifest(number: int) -> dict[str, int]:
    return dict.fromkeys(("settings", "inputs", "counts"), number)


@pytest.mark.parametrize("renamed", ["0", "1"])
def test_a_table_never_stands_beside_the_manifest_of_another_one(tmp_path: Path, renamed: str) -> None:
    """The process is killed after renaming 0 or 1 of the two files."""
    file = tmp_path / "table.parquet"
    artifacts.write_table(pl.DataFrame({"a": [1]}), file, manifest=manifest(1))
    killed = subprocess.run([sys.executable, "-c", KILLED, file, renamed], env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not file.exists()
    artifacts.write_table(pl.DataFrame({"a": [3]}), file, manifest=manifest(3))
    assert json.loads(artifacts.manifest_path(file).read_text()) == manifest(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.manifest.json", "table.parquet"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(
    ("owner", "left"),
    [
        (f"{DEAD}", False),  # as version 0.1.0 named them
        (f"{os.uname().nodename}-{DEAD}", False),
        (f"{os.uname().nodename}-{os.getppid()}", True),
        (f"another-host-{DEAD}", True),
    ],
)
def test_what_killed_processes_have_left_is_deleted(tmp_path: Path, kind: str, owner: str, left: bool) -> None:
    old = tmp_path / f".table.parquet.{owner}.tmp"
    old.mkdir() if kind == "folder" else old.touch()
    (tmp_path / f".other.parquet.{owner}.tmp").touch()
    artifacts.write_table(pl.DataFrame({"a": [1]}), tmp_path / "table.parquet")
    assert old.exists() == left
    assert (tmp_path / f".other.parquet.{owner}.tmp").exists()
