"""Artifacts: written beside and renamed, described by a manifest, resumed from a work folder.

An artifact is one file or one folder. Nothing of it is visible under its name before it is whole. What a long
job needs to resume after an interruption lives in an undeclared work folder, because Snakemake deletes the
declared outputs of a failed job.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel

from salmon.errors import UserError
from salmon.tables import Table, check_written

log = logging.getLogger(__name__)

PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "accelerate"),
    *("datasets", "polars", "snakemake", "py3langid", "numpy"),
)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` when the block ends without an error.

    Works for a file and for a folder; an older artifact is replaced only by a whole new one. A failure leaves
    neither the temporary nor a partial artifact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        yield temporary
        flush(temporary)
        if temporary.is_dir():
            remove(path)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def flush(path: Path) -> None:
    """Put a file, or all files of a folder, on the disk, so that a machine that fails leaves none of them empty."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically, for people and programs to read."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_table(rows: pl.LazyFrame | pl.DataFrame, path: Path, table: Table | None = None) -> None:
    """Write a Parquet file (zstd), atomically. A lazy frame is streamed.

    Args:
        rows: of the table, in order.
        path: of the file.
        table: what has been written is checked to be this one; None for parts, which are not whole yet.
    """
    with atomic(path) as temporary:
        if isinstance(rows, pl.LazyFrame):
            rows.sink_parquet(temporary, compression="zstd", maintain_order=True)
        else:
            rows.write_parquet(temporary, compression="zstd")
        if table:
            check_written(temporary, table)


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder.

    Manifests and metrics are left out: they record when and how fast, which does not change what follows.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; build it first, or correct the path")
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if path.is_dir():
            if file.name in ("manifest.json", "metrics.json", "metrics.jsonl") or "tensorboard" in file.parts:
                continue
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def hash_inputs(files: Iterable[Path | str]) -> dict[str, str]:
    """Path -> SHA-256 of input files and folders, for manifests and fingerprints.

    Raises:
        UserError: where one does not exist.
    """
    return {str(file): hash_path(Path(file)) for file in files}


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash of resolved settings and input hashes: equal exactly when a run may continue another one."""
    return hashlib.sha256(json.dumps([plain(settings), dict(inputs)], sort_keys=True).encode()).hexdigest()


def manifest_path(artifact: Path) -> Path:
    """Where the manifest of an artifact is: beside a table, inside a model folder."""
    return artifact.with_suffix(".manifest.json") if artifact.suffix == ".parquet" else artifact / "manifest.json"


def manifest(settings: Mapping[str, Any], inputs: Mapping[str, str], counts: Mapping[str, int]) -> dict[str, Any]:
    """What an artifact was made of and with.

    Args:
        settings: resolved settings; sections may be pydantic models. Seeds are among them.
        inputs: path -> SHA-256 or revision.
        counts: rows in, rows out and rows left out by reason.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "settings": plain(settings),
        "inputs": dict(inputs),
        "counts": dict(counts),
        "packages": versions,
        "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as manifests hold them, as JSON types."""
    found: dict[str, Any] = _plain(settings)
    return found


def _plain(value: Any) -> Any:
    """Settings as JSON types."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def git_commit() -> str | None:
    """Commit of the workflow, with `-dirty` where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


def _me() -> str:
    """A name for this process."""
    return f"process {os.getpid()} on {socket.gethostname()}, SLURM job {os.environ.get('SLURM_JOB_ID', 'none')}"


def check_owner(folder: Path) -> None:
    """Raise a UserError if another process has opened this work folder since this one did.

    That happens where a cluster runs one job twice (SLURM may create a job and yet report that it could not).
    """
    owner = (folder / "owner").read_text() if folder.is_dir() else "nobody"
    if owner != _me():
        raise UserError(
            f"{folder} was taken over by another process ({owner}), which continues the work; this one ends"
        )


class WorkFolder:
    """The undeclared folder in which a long job keeps what it needs to resume after an interruption.

    It stands beside the artifact, in `.work/`, and belongs to one fingerprint of settings and inputs: opened
    with another one, it is emptied, so that a changed configuration never continues a stale run.
    """

    def __init__(self, artifact: Path) -> None:
        self.path = artifact.parent / ".work" / artifact.name

    def create(self) -> None:
        """Create the folder, empty: what a killed run may have left in it is deleted."""
        remove(self.path)
        while not self.path.is_dir():
            with suppress(FileNotFoundError):  # another job has just deleted `.work/`, which was empty
                self.path.mkdir(parents=True)

    def open(self, fingerprint: str, layout: str = "") -> None:
        """Create the folder, or keep what it holds if it belongs to the same fingerprint. One rank calls this.

        Args:
            fingerprint: of the settings and inputs.
            layout: what else has to be the same for checkpoints to be read (DeepSpeed's sharding, the number of ranks).

        Raises:
            UserError: where there are checkpoints of the same settings and inputs, but of another layout: days of work,
                which are not to be deleted because a cluster's file has changed.
        """
        fingerprint_file, layout_file = self.path / "fingerprint", self.path / "layout"
        if fingerprint_file.is_file() and fingerprint_file.read_text() == fingerprint:
            if not any(self.path.glob("checkpoint-*")):
                layout_file.write_text(layout)
            elif self._layout() != layout:
                raise UserError(
                    f"the checkpoints in {self.path} are of another number of GPUs, or of other DeepSpeed settings, "
                    "than this run's, which cannot read them: go back to those, or delete the folder to start anew"
                )
            (self.path / "owner").write_text(_me())
            log.info("continuing from %s", self.path)
            return
        if self.path.exists():
            log.info("%s belongs to other settings or inputs: starting anew", self.path)
        self.create()
        layout_file.write_text(layout)
        (self.path / "owner").write_text(_me())
        with atomic(fingerprint_file) as temporary:
            temporary.write_text(fingerprint)

    def _layout(self) -> str:
        """The layout that the folder was opened with; version 0.1.0 called the file `shards`, and before had none."""
        files = (self.path / "layout", self.path / "shards")
        return next((file.read_text() for file in files if file.is_file()), "")

    def write_part(self, table: pl.DataFrame) -> None:
        """Keep a finished batch of rows; parts are whole or absent, and any rank may write them."""
        first_row = hashlib.sha256(table.row(0).__repr__().encode()).hexdigest()[:16]
        write_table(table, self.path / f"part-{first_row}.parquet")

    def read_parts(self, schema: Mapping[str, Any]) -> pl.DataFrame:
        """All rows kept so far, in no particular order."""
        parts = sorted(self.path.glob("part-*.parquet"))
        empty = pl.DataFrame(schema=dict(schema))
        return pl.concat([empty, *(pl.read_parquet(part) for part in parts)])

    def delete(self) -> None:
        """Delete the folder, once the artifact is whole."""
        started = time.monotonic()
        remove(self.path)
        with suppress(OSError):  # work folders of other jobs are in it, or another job has deleted it
            self.path.parent.rmdir()
        log.debug("deleted %s in %.1f s", self.path, time.monotonic() - started)
