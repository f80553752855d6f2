"""Folders of work under way."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from salmon import checkpoints
from salmon.artifacts import WorkFolder
from salmon.errors import UserError
from tests.running import environment


def test_jobs_that_start_and_end_together(tmp_path: Path) -> None:
    """Their work folders stand in one folder, which the last of them deletes, and the next makes again."""

    def work(job: int) -> None:
        for _ in range(300):
            folder = WorkFolder(tmp_path / f"{job}.parquet")
            folder.open("mark")
            assert (folder.path / "fingerprint").read_text() == "mark"
            folder.delete()

    with ThreadPoolExecutor(8) as jobs:
        list(jobs.map(work, range(8)))
    assert not list(tmp_path.iterdir())


def test_a_job_that_runs_twice(tmp_path: Path) -> None:
    """The one that opened the work folder last keeps it; the other writes nothing into it any more."""
    folder = WorkFolder(tmp_path / "policy")
    folder.open("mark")
    first = checkpoints.new(folder.path, 1)
    other = "import pathlib, sys; from salmon.artifacts import *; WorkFolder(pathlib.Path(sys.argv[1])).open('mark')"
    subprocess.run([sys.executable, "-c", other, tmp_path / "policy"], env=environment(), check=True)
    with pytest.raises(UserError, match="taken over by another process"):
        checkpoints.new(folder.path, 2)
    with pytest.raises(UserError, match="taken over by another process"):
        checkpoints.seal(first)
    assert not (folder.path / "checkpoint-2").exists()
    folder.open("mark")
    checkpoints.new(folder.path, 2)


@pytest.mark.parametrize(
    ("file", "kept", "layout", "resumed"),
    [
        ("layout", "ZeRO-2, 8", "ZeRO-2, 8", True),
        ("layout", "ZeRO-2, 8", "ZeRO-2, 4", False),
        ("layout", "ZeRO-2, 8", "", False),
        ("shards", "ZeRO-2, 8", "ZeRO-2, 8", True),  # the name of the file in version 0.1.0
        ("shards", "ZeRO-2, 8", "", False),
        ("shards", "", "", True),
        (None, "", "", True),
        (None, "", "ZeRO-2, 8", False),
    ],
)
def test_checkpoints_of_another_layout_are_refused_and_kept(
    tmp_path: Path, file: str | None, kept: str, layout: str, resumed: bool
) -> None:
    """Also in the work folders of earlier versions, which called the layout's file otherwise or had none."""
    folder = WorkFolder(tmp_path / "policy")
    folder.open("mark", kept)
    (folder.path / "checkpoint-1").mkdir()
    (folder.path / "layout").unlink()
    if file:
        (folder.path / file).write_text(kept)
    if resumed:
        folder.open("mark", layout)
    else:
        with pytest.raises(UserError, match="of another number of GPUs, or of other DeepSpeed settings"):
            folder.open("mark", layout)
    assert (folder.path / "checkpoint-1").is_dir()
    folder.open("another mark", layout)
    assert not (folder.path / "checkpoint-1").exists()
    assert (folder.path / "layout").read_text() == layout
