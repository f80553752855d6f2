"""Work folders: what a long job needs to resume, and which process may go on with it.

A work folder stands beside its artifact, in `.work/`, and is not declared to Snakemake, which deletes the declared
outputs of a failed job. One process at a time owns it, by a lease: a file that its owner touches every few seconds, and
that another process may take over once it has seen it unchanged for `LEASE` seconds, or at once where the owner was a
process of the same machine that has ended. Unlike `flock` this needs no lock manager: many file systems of clusters
(Lustre, BeeGFS, as usually mounted) have locks on each node by itself.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl
from filelock import SoftFileLease, Timeout

from salmon.artifacts import atomic, discard, manifest_path, remove, write_json
from salmon.errors import UserError

log = logging.getLogger(__name__)

LEASE = 90.0  # more than file systems of clusters keep a file's time in their caches
TURN = 20.0  # seconds that a process waits for a lease before it tells the other ranks
KEEP_FINISHED = "SALMON_KEEP_FINISHED"
"""Environment variable that Snakemake's jobs have: a finished artifact is kept in the work folder until Snakemake has
ended (`sweep`), since Snakemake deletes it where the job's process, or another one on the same results, fails."""

_SIGNS = {"fingerprint", "layout", "owner"}
# Of this process, by work folder. A process does not wait for itself.
_leases: dict[Path, SoftFileLease] = {}


class WorkFolder:
    """The work folder of an artifact.

    It belongs to one fingerprint of settings and inputs: opened with another one, it is emptied, so that a changed
    configuration never continues a stale run.
    """

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact
        self.path = artifact.parent / ".work" / artifact.name
        self.finished = self.path / "finished"
        self.fingerprint = ""

    def open(self, fingerprint: str, layout: str = "", *, alone: bool = False) -> bool:
        """Wait until no other process owns the folder, then create it, or keep what is of the same fingerprint.

        All ranks call this.

        Args:
            fingerprint: of the settings and inputs.
            layout: what else has to be the same for checkpoints to be read (DeepSpeed's sharding, the number of ranks).
            alone: there are no other ranks, and no torch.

        Returns:
            Whether the artifact is finished: by the process waited for, or by one that ended before it could tell.

        Raises:
            UserError: where there are checkpoints of the same settings and inputs, but of another layout: days of work,
                which are not to be deleted because a cluster's file has changed. Or where somebody else could have
                written into the folder.
        """
        self.fingerprint = fingerprint
        if alone:
            return self._open(layout, self._take_alone())
        from salmon import distributed  # needs torch, which data rules and the Snakefile do without

        waited = self._take()
        return bool(distributed.broadcast(distributed.is_main() and self._open(layout, waited)))

    def _open(self, layout: str, waited: bool) -> bool:
        """The main rank's part of `open`."""
        if waited and self._is_made() and not self.finished.is_dir():
            self.delete()
            return True
        if not self._resumes(layout) or not self.finished.is_dir():
            return False
        if not self._is_made():  # else somebody may be reading it
            self._publish()
        self._close()
        return True

    def _take(self) -> bool:
        """Become the owner; returns whether another process was waited for. All ranks call this."""
        from salmon import distributed

        waited = False
        # In turns, because ranks do not wait for one another for hours.
        while not distributed.broadcast(distributed.is_main() and self._acquire(seconds=TURN if waited else 0)):
            if not waited and distributed.is_main():
                self._say_that_it_waits()
            waited = True
        return waited

    def _take_alone(self) -> bool:
        """The same of a process without other ranks."""
        waited = False
        while not self._acquire(seconds=TURN if waited else 0):
            if not waited:
                self._say_that_it_waits()
            waited = True
        return waited

    def _say_that_it_waits(self) -> None:
        owner = self._owner()
        log.warning("%s is being made by another process (%s): waiting for its end", self.artifact, owner)

    def _acquire(self, seconds: float) -> bool:
        """Try to get the lease. The main rank calls this."""
        for attempt in range(100):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lease = _leases.get(self.path) or SoftFileLease(
                self.path.with_name(f"{self.path.name}.lock"), lease_duration=LEASE, thread_local=False
            )
            if lease.is_locked and lease.compromise is None:
                return True
            try:
                lease.release(force=True)
                lease.acquire(timeout=seconds, poll_interval=0.5)
            except Timeout:
                return False
            except FileNotFoundError:  # another job has just deleted `.work/`, which was empty
                if attempt == 99:  # nobody deletes it so often
                    raise
                continue
            _leases[self.path] = lease
            break
        return True

    def _resumes(self, layout: str) -> bool:
        """Whether the folder holds work of the same fingerprint; else it is made anew."""
        fingerprint_file, layout_file = self.path / "fingerprint", self.path / "layout"
        if fingerprint_file.is_file():
            check_private(self.path)
        same = fingerprint_file.is_file() and fingerprint_file.read_text() == self.fingerprint
        if same and not any(self.path.glob("checkpoint-*")):
            layout_file.write_text(layout)
        elif same and self._layout() != layout:
            raise UserError(
                f"the checkpoints in {self.path} are of another number of GPUs, or of other DeepSpeed settings, "
                "than this run's, which cannot read them: go back to those, or delete the folder to start anew"
            )
        elif not same:
            if self.path.exists():
                log.info("%s belongs to other settings or inputs: starting anew", self.path)
            discard(self.path)
            self.path.mkdir(mode=0o700)
            layout_file.write_text(layout)
        (self.path / "owner").write_text(_me())
        if same:
            log.info("continuing from %s", self.path)
        else:
            with atomic(fingerprint_file) as temporary:
                temporary.write_text(self.fingerprint)
        return same

    def _layout(self) -> str:
        """The layout that the folder was opened with; version 0.1.0 called the file `shards`, and before had none."""
        files = (self.path / "layout", self.path / "shards")
        return next((file.read_text() for file in files if file.is_file()), "")

    def _owner(self) -> str:
        """Who opened the folder last, as far as can be read."""
        with suppress(OSError):
            return (self.path / "owner").read_text()
        return "which has not said more"

    def check(self) -> None:
        """Raise a UserError if another process has become the owner. The main rank calls this before it writes.

        That happens to a process that could not touch its lease for a while: it was stopped, or its file system was.
        """
        lease = _leases.get(self.path)
        if lease is None or lease.compromise or self._owner() != _me():
            raise UserError(
                f"{self.path} was taken over by another process ({self._owner()}), which continues the work, or was "
                "deleted; this process ends"
            )

    def write_part(self, table: pl.DataFrame) -> None:
        """Keep a finished batch of rows; parts are whole or absent, and any rank may write them."""
        first_row = hashlib.sha256(table.row(0).__repr__().encode()).hexdigest()[:16]
        # There may be thousands of parts: the folder is not listed for each.
        with atomic(self.path / f"part-{first_row}.parquet", tidy=False) as temporary:
            table.write_parquet(temporary, compression="zstd")

    def read_parts(self, schema: Mapping[str, Any]) -> pl.DataFrame:
        """All rows kept so far, in no particular order. A damaged part is deleted, and its rows count as not done."""
        parts = [pl.DataFrame(schema=dict(schema))]
        for file in sorted(self.path.glob("part-*.parquet")):
            try:
                parts.append(pl.read_parquet(file, schema=dict(schema)))
            except (pl.exceptions.PolarsError, OSError) as error:
                log.warning("deleting %s, which is damaged (%s)", file, type(error).__name__)
                remove(file)
        return pl.concat(parts)

    @contextmanager
    def finish(self, manifest: Mapping[str, Any]) -> Iterator[Path]:
        """A path to write the artifact to, which it becomes, with its manifest, when the block ends without an error.

        Then the rest of the folder is deleted, and the lease released. The main rank calls this.
        """
        self.check()
        with atomic(self.finished) as folder:
            folder.mkdir()
            made = folder / self.artifact.name
            yield made
            write_json(manifest_path(made), {**manifest, "fingerprint": self.fingerprint})
        self._publish()
        self._close()

    def _publish(self) -> None:
        """Put the finished artifact in its place."""
        self.check()
        # The artifact comes last: where it is, all is there.
        for made in sorted(self.finished.iterdir(), key=lambda path: path.name == self.artifact.name):
            with atomic(self.artifact.with_name(made.name)) as temporary:
                _link(made, temporary)

    def _close(self) -> None:
        """Delete what is not needed any more, once the artifact is in its place, and release the lease."""
        if KEEP_FINISHED in os.environ:
            for path in self.path.iterdir():
                if path.name not in ("finished", "fingerprint", "owner"):
                    remove(path)
            self.release()
        else:
            self.delete()

    def _is_made(self) -> bool:
        """Whether the artifact is in its place, made with these settings and inputs."""
        if not self.artifact.exists():
            return False
        with suppress(OSError, ValueError):
            manifest = json.loads(manifest_path(self.artifact).read_text(encoding="utf-8"))
            return bool(manifest.get("fingerprint") == self.fingerprint)
        return False

    def delete(self) -> None:
        """Delete the folder, whole or not at all, and release the lease."""
        discard(self.path)
        self.release()

    def release(self) -> None:
        """Let other processes own the folder, which is deleted where nothing has been kept in it yet."""
        if lease := _leases.pop(self.path, None):
            if not lease.compromise and self.path.is_dir() and {file.name for file in self.path.iterdir()} <= _SIGNS:
                discard(self.path)
            lease.release(force=True)
        with suppress(OSError):  # work folders of other jobs are in it, or another job has deleted it
            self.path.parent.rmdir()


def release_all() -> None:
    """Release every work folder of this process, which ends."""
    for path in list(_leases):
        with suppress(OSError):
            WorkFolder(path.parent.parent / path.name).release()


def sweep(results: Path) -> None:
    """Delete work folders that hold no more than a finished artifact that is in its place."""
    for finished in results.rglob(".work/*/finished"):
        work = WorkFolder(finished.parent.parent.parent / finished.parent.name)
        with suppress(OSError):
            work.fingerprint = (work.path / "fingerprint").read_text()
            if work._acquire(0):
                if work._is_made():
                    work.delete()
                work.release()


def check_private(folder: Path) -> None:
    """Refuse a work folder into which somebody else could have written: DeepSpeed's checkpoints can run code.

    Raises:
        UserError: naming what is not ours.
    """
    closed = stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0  # then nobody else reaches what is in it
    for path in (folder, *folder.rglob("*")):
        info = path.lstat()
        if info.st_uid != os.geteuid() or stat.S_ISLNK(info.st_mode) or (not closed and info.st_mode & 0o022):
            raise UserError(
                f"{path} belongs to, or can be written by, another user, who could have put code into it: make sure "
                f"of what it is, and delete {folder} to start anew, or make all of it yours (chown, chmod -R go-w)"
            )
    folder.chmod(0o700)


def _me() -> str:
    """A name for this process."""
    return f"process {os.getpid()} on {socket.gethostname()}, SLURM job {os.environ.get('SLURM_JOB_ID', 'none')}"


def _link(made: Path, new: Path) -> None:
    """The same file or folder under a second name, without its bytes where the file system can, and as new as now."""

    def link(source: str | Path, target: str | Path) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        os.utime(target)  # else Snakemake would take it for older than its inputs

    if made.is_dir():
        shutil.copytree(made, new, copy_function=link)
    else:
        link(made, new)
