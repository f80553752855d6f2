"""Work folders: the state that a long job needs to resume, and the lease of the process that owns it.

A work folder is next to its artifact, in `.work/`. It is not declared to Snakemake, which deletes the declared outputs
of a failed job. One process at a time owns it, by a lease: a file that its owner touches every few seconds. Another
process may take it over when the file has not changed for `LEASE` seconds, or immediately if the owner was a process of
the same machine that has ended. Unlike `flock` this needs no lock manager: many cluster file systems (Lustre, BeeGFS,
as usually mounted) lock files on each node separately.
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

LEASE = 90.0  # longer than cluster file systems cache a file's time
TURN = 20.0  # seconds that a process waits for a lease before it informs the other ranks
KEEP_FINISHED = "SALMON_KEEP_FINISHED"
"""Environment variable of Snakemake's jobs. If it is set, a finished artifact also stays in the work folder until
Snakemake has ended (`sweep`), because Snakemake deletes it if its job, or another job on the same results, fails."""

_SIGNS = {"fingerprint", "layout", "owner"}
# The leases of this process, by work folder. A process does not wait for itself.
_leases: dict[Path, SoftFileLease] = {}


class WorkFolder:
    """The work folder of an artifact.

    It belongs to one fingerprint of settings and inputs. Opening it with another fingerprint empties it, so a changed
    configuration never continues a stale run.
    """

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact
        self.path = artifact.parent / ".work" / artifact.name
        self.finished = self.path / "finished"
        self.fingerprint = ""

    def open(self, fingerprint: str, layout: str = "", *, alone: bool = False) -> bool:
        """Wait until no other process owns the folder. Then create it, or keep it if its fingerprint is the same.

        All ranks call this.

        Args:
            fingerprint: fingerprint of settings and inputs.
            layout: other requirements for reading checkpoints (DeepSpeed's sharding, the number of ranks).
            alone: whether there are no other ranks, and no torch.

        Returns:
            Whether the artifact is finished: by the process waited for, or by one that ended before reporting it.

        Raises:
            UserError: if there are checkpoints of the same settings and inputs, but of another layout: they may be days
                of work, which a change of a cluster's file should not delete. Or if other users could have written into
                the folder.
        """
        self.fingerprint = fingerprint
        if alone:
            return self._open(layout, self._take_alone())
        from salmon import distributed  # needs torch, but data rules and the Snakefile do not

        waited = self._take()
        return bool(distributed.broadcast(distributed.is_main() and self._open(layout, waited)))

    def _open(self, layout: str, waited: bool) -> bool:
        """The main rank's part of `open`."""
        if waited and self._is_made() and not self.finished.is_dir():
            self.delete()
            return True
        if not self._resumes(layout) or not self.finished.is_dir():
            return False
        if not self._is_made():  # otherwise another process may be reading it
            self._publish()
        self._close()
        return True

    def _take(self) -> bool:
        """Become the owner; returns whether this had to wait for another process. All ranks call this."""
        from salmon import distributed

        waited = False
        # In turns, because ranks must not wait for one another for hours.
        while not distributed.broadcast(distributed.is_main() and self._acquire(seconds=TURN if waited else 0)):
            if not waited and distributed.is_main():
                self._say_that_it_waits()
            waited = True
        return waited

    def _take_alone(self) -> bool:
        """The same for a process without other ranks."""
        waited = False
        while not self._acquire(seconds=TURN if waited else 0):
            if not waited:
                self._say_that_it_waits()
            waited = True
        return waited

    def _say_that_it_waits(self) -> None:
        owner = self._owner()
        log.warning("%s is being made by another process (%s): waiting for it to end", self.artifact, owner)

    def _acquire(self, seconds: float) -> bool:
        """Try to get the lease. The main rank calls this."""
        for attempt in range(100):
            lease = _leases.get(self.path) or SoftFileLease(
                self.path.with_name(f"{self.path.name}.lock"), lease_duration=LEASE, thread_local=False
            )
            if lease.is_locked and lease.compromise is None:
                return True
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lease.release(force=True)
                lease.acquire(timeout=seconds, poll_interval=0.5)
            except Timeout:
                return False
            # Another job has just deleted `.work/` because it was empty: before it was needed, or right after it was
            # found to exist.
            except (FileNotFoundError, FileExistsError):
                if attempt == 99:  # no job deletes it so often
                    raise
                continue
            _leases[self.path] = lease
            break
        return True

    def _resumes(self, layout: str) -> bool:
        """Whether the folder has work of the same fingerprint; otherwise it is created again."""
        fingerprint_file, layout_file = self.path / "fingerprint", self.path / "layout"
        if fingerprint_file.is_file():
            check_private(self.path)
        same = fingerprint_file.is_file() and fingerprint_file.read_text() == self.fingerprint
        if same and not any(self.path.glob("checkpoint-*")):
            layout_file.write_text(layout)
        elif same and self._layout() != layout:
            raise UserError(
                f"the checkpoints in {self.path} are from another number of GPUs or other DeepSpeed settings, and this "
                "run cannot read them: go back to those settings, or delete the folder to start again"
            )
        elif not same:
            if self.path.exists():
                log.info("%s belongs to other settings or inputs: starting again", self.path)
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
        """The layout that the folder was opened with; version 0.1.0 named the file `shards`; before, there was none."""
        files = (self.path / "layout", self.path / "shards")
        return next((file.read_text() for file in files if file.is_file()), "")

    def _owner(self) -> str:
        """The process that opened the folder last, if known."""
        with suppress(OSError):
            return (self.path / "owner").read_text()
        return "unknown"

    def check(self) -> None:
        """Raise a UserError if another process has become the owner. The main rank calls this before it writes.

        This happens if the process could not touch its lease for a while, because it or its file system was suspended.
        """
        lease = _leases.get(self.path)
        if lease is None or lease.compromise or self._owner() != _me():
            raise UserError(
                f"{self.path} was taken over by another process ({self._owner()}), which continues the work, or was "
                "deleted; this process ends"
            )

    def write_part(self, table: pl.DataFrame) -> None:
        """Keep a finished batch of rows. Parts are complete or absent, and any rank may write them."""
        first_row = hashlib.sha256(table.row(0).__repr__().encode()).hexdigest()[:16]
        # There may be thousands of parts: the folder is not listed for each.
        with atomic(self.path / f"part-{first_row}.parquet", tidy=False) as temporary:
            table.write_parquet(temporary, compression="zstd")

    def read_parts(self, schema: Mapping[str, Any]) -> pl.DataFrame:
        """All rows kept so far, in no particular order. A damaged part is deleted; its rows count as unfinished."""
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
        """A path to write to; it becomes the artifact, with its manifest, when the block ends without an error.

        The rest of the folder is then deleted, and the lease released. The main rank calls this.
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
        """Move the finished artifact to its place."""
        self.check()
        # The artifact comes last: if it is there, everything is.
        for made in sorted(self.finished.iterdir(), key=lambda path: path.name == self.artifact.name):
            with atomic(self.artifact.with_name(made.name)) as temporary:
                _link(made, temporary)

    def _close(self) -> None:
        """Delete everything that is no longer needed, once the artifact is in its place, and release the lease."""
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
        """Delete the folder, completely or not at all, and release the lease."""
        discard(self.path)
        self.release()

    def release(self) -> None:
        """Release the folder to other processes. Deletes it if nothing has been kept in it yet."""
        if lease := _leases.pop(self.path, None):
            if not lease.compromise and self.path.is_dir() and {file.name for file in self.path.iterdir()} <= _SIGNS:
                discard(self.path)
            lease.release(force=True)
        with suppress(OSError):  # it has work folders of other jobs, or another job has deleted it
            self.path.parent.rmdir()


def release_all() -> None:
    """Release every work folder of this process, which is about to end."""
    for path in list(_leases):
        with suppress(OSError):
            WorkFolder(path.parent.parent / path.name).release()


def sweep(results: Path) -> None:
    """Delete work folders that hold only a finished artifact that is in its place."""
    for finished in results.rglob(".work/*/finished"):
        work = WorkFolder(finished.parent.parent.parent / finished.parent.name)
        with suppress(OSError):
            work.fingerprint = (work.path / "fingerprint").read_text()
            if work._acquire(0):
                if work._is_made():
                    work.delete()
                work.release()


def check_private(folder: Path) -> None:
    """Refuse a work folder into which other users could have written: DeepSpeed's checkpoints can run code.

    Raises:
        UserError: with the first path that another user owns or may write.
    """
    closed = stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0  # then no other user can reach its content
    for path in (folder, *folder.rglob("*")):
        info = path.lstat()
        if info.st_uid != os.geteuid() or stat.S_ISLNK(info.st_mode) or (not closed and info.st_mode & 0o022):
            raise UserError(
                f"{path} belongs to, or is writable by, another user, who could have put code into it: check it, and "
                f"delete {folder} to start again, or take ownership of all of it (chown -R, chmod -R go-w)"
            )
    folder.chmod(0o700)


def _me() -> str:
    """A name for this process."""
    return f"process {os.getpid()} on {socket.gethostname()}, SLURM job {os.environ.get('SLURM_JOB_ID', 'none')}"


def _link(made: Path, new: Path) -> None:
    """The same file or folder under a second name, with the present time; without copying if the file system can."""

    def link(source: str | Path, target: str | Path) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        os.utime(target)  # otherwise Snakemake would consider it older than its inputs

    if made.is_dir():
        shutil.copytree(made, new, copy_function=link)
    else:
        link(made, new)
