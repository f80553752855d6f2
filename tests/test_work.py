"""Work folders: they have one owner, nothing is lost, and nothing is read that another user has put there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import psutil
import pytest

from salmon import checkpoints, work
from salmon.artifacts import manifest_path
from salmon.errors import UserError
from salmon.work import WorkFolder
from tests.running import PATIENCE, SCRIPTS, environment

NOBODY = 65534


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    work.release_all()


def make(folder: WorkFolder, text: str = "made") -> None:
    with folder.finish({"settings": {}}) as path:
        path.mkdir()
        (path / "weights").write_text(text)


def another(program: str, artifact: Path) -> "subprocess.Popen[str]":
    """Another process, with the artifact's work folder as `folder`."""
    before = "import sys, time, pathlib\nfrom salmon import checkpoints\nfrom salmon.work import WorkFolder\n"
    before += f"folder = WorkFolder(pathlib.Path({str(artifact)!r}))\n"
    return subprocess.Popen(
        [sys.executable, "-c", before + program],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_jobs_that_start_and_end_together(tmp_path: Path) -> None:
    """Their work folders are in one folder, which the last of the jobs deletes and the next makes again."""

    def job(number: int) -> None:
        for _ in range(100):
            folder = WorkFolder(tmp_path / f"{number}.parquet")
            folder.open("mark")
            assert (folder.path / "fingerprint").read_text() == "mark"
            folder.delete()

    with ThreadPoolExecutor(8) as jobs:
        list(jobs.map(job, range(8)))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Path.mkdir` finds the folder, which is gone when `mkdir` checks that it is a folder: one job in ten thousand."""
    found = Path.is_dir
    gone = iter([False])
    monkeypatch.setattr(Path, "is_dir", lambda path: found(path) and next(gone, True))
    folder = WorkFolder(tmp_path / "policy")
    folder.path.parent.mkdir()
    folder.open("mark")
    assert next(gone, None) is None
    assert (folder.path / "fingerprint").read_text() == "mark"
    folder.delete()


def test_a_second_process_waits_and_finds_the_artifact_made(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "policy")
    assert not folder.open("mark")
    second = another("print(folder.open('mark'))", folder.artifact)
    assert second.stdout is not None
    said = second.stdout.readline()
    assert "is being made by another process" in said
    assert f"process {os.getpid()} on" in said
    make(folder)
    assert second.communicate()[0] == "True\n"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_second_process_goes_on_where_the_first_was_killed(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "policy")
    first = another(
        "folder.open('mark'); (folder.path / 'part').touch(); print('open', flush=True); time.sleep(60)",
        folder.artifact,
    )
    assert first.stdout is not None
    first.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.wait()
    started = time.monotonic()
    assert not folder.open("mark")
    assert time.monotonic() - started < 10  # on the same machine: not the whole lease
    assert (folder.path / "part").exists()


def test_a_process_that_was_stopped_for_long_writes_nothing_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it wakes up, its lease has ended and another process has taken over."""
    folder = WorkFolder(tmp_path / "policy")
    program = (
        "from salmon import work; work.LEASE = 1.5\n"
        "folder.open('mark'); first = checkpoints.new(folder, 1); print('open', flush=True); sys.stdin.readline()\n"
        "for write in (lambda: checkpoints.new(folder, 2), lambda: checkpoints.seal(folder, first), folder.check):\n"
        "    try: write()\n"
        "    except Exception as error: print(error)\n"
    )
    stopped = another(program, folder.artifact)
    assert stopped.stdout is not None
    stopped.stdout.readline()
    stopped.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(work, "LEASE", 1.5)
    # The lease of a live process on this machine ends only when the process no longer touches it.
    assert not folder.open("mark")
    stopped.send_signal(signal.SIGCONT)
    said, _ = stopped.communicate("\n")
    assert said.count("taken over by another process") == 3
    assert not (folder.path / "checkpoint-2").exists()
    folder.check()


@pytest.mark.parametrize("deleted", ["artifact", "nothing"])
def test_what_snakemake_deletes_after_it_was_finished_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: str
) -> None:
    """A job that is killed after its last line, or another one on the same results that fails."""
    monkeypatch.setenv(work.KEEP_FINISHED, "1")
    artifact = tmp_path / "policy"
    folder = WorkFolder(artifact)
    folder.open("mark")
    (folder.path / "part-1.parquet").touch()
    make(folder)
    assert not (folder.path / "part-1.parquet").exists()
    if deleted == "artifact":
        (artifact / "weights").unlink()
        manifest_path(artifact).unlink()
        artifact.rmdir()
    assert WorkFolder(artifact).open("mark")
    assert (artifact / "weights").read_text() == "made"
    work.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    # What is deleted now is built again.
    assert not WorkFolder(artifact).open("mark")


def test_an_artifact_made_again_by_hand_replaces_the_one_that_is_there(tmp_path: Path) -> None:
    """Both have the same settings and inputs, but the old one may be damaged."""
    for text in ("damaged", "made"):
        folder = WorkFolder(tmp_path / "policy")
        assert not folder.open("mark")
        make(folder, text)
    assert (folder.artifact / "weights").read_text() == "made"


def test_what_was_finished_with_other_settings_is_not_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(work.KEEP_FINISHED, "1")
    folder = WorkFolder(tmp_path / "policy")
    folder.open("mark")
    make(folder)
    assert not WorkFolder(tmp_path / "policy").open("another mark")
    assert not folder.finished.exists()


def test_an_artifact_that_is_not_in_its_place_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(work.KEEP_FINISHED, "1")
    folder = WorkFolder(tmp_path / "policy")
    folder.open("mark")
    make(folder)
    folder.artifact.rename(tmp_path / "elsewhere")
    work.sweep(tmp_path)
    assert WorkFolder(tmp_path / "policy").open("mark")


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
    """Also in the work folders of earlier versions, which named the layout's file differently or had none."""
    folder = WorkFolder(tmp_path / "policy")
    folder.open("mark", kept)
    (folder.path / "checkpoint-1").mkdir()
    (folder.path / "layout").unlink()
    if file:
        (folder.path / file).write_text(kept)
    if resumed:
        folder.open("mark", layout)
    else:
        with pytest.raises(UserError, match="from another number of GPUs or other DeepSpeed settings"):
            folder.open("mark", layout)
    assert (folder.path / "checkpoint-1").is_dir()
    folder.open("another mark", layout)
    assert not (folder.path / "checkpoint-1").exists()
    assert (folder.path / "layout").read_text() == layout


def sealed(folder: WorkFolder, steps: int) -> None:
    """Write and seal a checkpoint after each step."""
    folder.open("mark")
    for step in range(1, steps + 1):
        checkpoint = checkpoints.new(folder, step)
        (checkpoint / "states").mkdir()
        (checkpoint / "states" / "optimizer").write_bytes(bytes(range(256)))
        checkpoints.seal(folder, checkpoint)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "new", "unreadable list"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = WorkFolder(tmp_path / "policy")
    sealed(folder, 3)
    newest = folder.path / "checkpoint-3"
    file = newest / "states" / "optimizer"
    if damage == "flipped":
        file.write_bytes(bytes([1, *range(1, 256)]))
    elif damage == "cut":
        file.write_bytes(bytes(range(100)))
    elif damage == "missing":
        file.unlink()
    elif damage == "new":
        (newest / "states" / "more").touch()
    else:
        (newest / checkpoints.WHOLE).write_text("{")
    assert checkpoints.newest(folder) == folder.path / "checkpoint-2"
    assert "which is damaged" in caplog.text
    assert not newest.exists()


def test_a_damaged_part_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = WorkFolder(tmp_path / "table.parquet")
    folder.open("mark")
    for row in ("a", "b"):
        folder.write_part(pl.DataFrame({"prompt_id": [row]}))
    part = min(folder.path.glob("part-*"))
    part.write_bytes(part.read_bytes()[:-9])
    kept = folder.read_parts({"prompt_id": pl.String})
    assert len(kept) == 1
    assert f"deleting {part}, which is damaged" in caplog.text
    assert not part.exists()


def test_a_checkpoint_of_version_0_1_0_is_read(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "policy")
    sealed(folder, 1)
    (folder.path / "checkpoint-1" / checkpoints.WHOLE).write_text("")
    assert checkpoints.newest(folder) == folder.path / "checkpoint-1"


@pytest.mark.parametrize("foreign", ["folder", "file", "link", "writable"])
def test_work_that_somebody_else_could_have_written_is_not_read(tmp_path: Path, foreign: str) -> None:
    """DeepSpeed's checkpoints are pickles."""
    folder = WorkFolder(tmp_path / "policy")
    sealed(folder, 1)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    file = folder.path / "checkpoint-1" / "states" / "optimizer"
    if foreign == "folder":
        os.chown(folder.path, NOBODY, NOBODY)
    elif foreign == "file":
        os.chown(file, NOBODY, NOBODY)
    elif foreign == "link":
        file.rename(tmp_path / "optimizer")
        file.symlink_to(tmp_path / "optimizer")
    else:
        folder.path.chmod(0o755)
        file.chmod(0o666)
    for attempt in (lambda: folder.open("mark"), lambda: checkpoints.newest(folder)):
        with pytest.raises(UserError, match="another user, who could have put code into it"):
            attempt()


SLEEPER = """
import os, pathlib, sys, time
from salmon import script
class Arguments(script.Arguments):
    folder: pathlib.Path
def main(arguments):
    (arguments.folder / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)
script.run(main, Arguments)
"""


def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    """Even if it is killed and can no longer end anything."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    line = ["bash", SCRIPTS / "launch.sh", "1", "2", "2", tmp_path / "sleeper.py", "--folder", tmp_path]
    launcher = subprocess.Popen(line, env=environment(), stderr=subprocess.DEVNULL)  # which becomes torchrun
    until = time.monotonic() + PATIENCE
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()) and time.monotonic() < until:
        time.sleep(0.05)
    ranks = [psutil.Process(int((tmp_path / rank).read_text())) for rank in "01"]
    assert {rank.ppid() for rank in ranks} == {launcher.pid}
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
