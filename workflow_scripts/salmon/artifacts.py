"""Artifacts: written under a temporary name, then renamed, and described by a manifest.

An artifact is one file or one folder. It appears under its name only when it is complete.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel

from salmon.errors import UserError
from salmon.shipped import short_name
from salmon.tables import Table, check_written

log = logging.getLogger(__name__)

PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "accelerate"),
    *("datasets", "polars", "snakemake", "py3langid", "numpy", "lm_eval"),
)

ROW_GROUP = 10_000
"""Rows that are written, and later read, at a time. With Polars' default, most tables would be a single group."""


@contextmanager
def atomic(path: Path, *, tidy: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` when the block ends without an error.

    Works for a file and for a folder. Only a complete new artifact replaces an older one. A failure leaves neither the
    temporary nor a partial artifact.

    Args:
        path: the artifact's final path.
        tidy: whether to delete temporaries that a killed process has left; this lists the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if tidy:
        _remove_leftovers(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        flush(temporary)
        if temporary.is_dir():
            discard(path)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def temporary_path(path: Path) -> Path:
    """The path where this process prepares the content of `path`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def _is_alive(pid: int) -> bool:
    """Whether a process with this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A new folder next to an artifact for intermediate files. It is deleted at the end."""
    folder = path.with_name(f"{path.name}.parts")
    _remove_leftovers(folder)
    temporary = temporary_path(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        remove(temporary)


def _remove_leftovers(path: Path) -> None:
    """Delete the temporaries of a path that belong to this process, or to an ended process of this machine."""
    # Version 0.1.0 did not record the machine.
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(?:(?P<host>.+)-)?(?P<pid>\d+)\.tmp")
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        if (
            (match := pattern.fullmatch(entry.name))
            and match["host"] in (None, socket.gethostname())
            and (int(match["pid"]) == os.getpid() or not _is_alive(int(match["pid"])))
        ):
            remove(entry)


def flush(path: Path) -> None:
    """Flush a file, or all files of a folder, to disk, so that none is empty after a machine failure."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def remove(path: Path) -> None:
    """Delete a file or folder if it exists. Another process may delete it at the same time."""
    if path.is_dir() and not path.is_symlink():
        while path.is_dir():
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete a file or folder if it exists. After an interruption, it is either complete or gone."""
    away = folder.with_name(f"{folder.name}.deleted")
    _remove_leftovers(away)
    if folder.exists():
        folder = folder.rename(temporary_path(away))
        remove(folder)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically, for people and programs to read."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_table(
    rows: pl.LazyFrame | pl.DataFrame,
    path: Path,
    table: Table | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Write a Parquet file (zstd), atomically. A lazy frame is streamed.

    Args:
        rows: the table's rows, in order.
        path: the file to write.
        table: the kind of table; the written file is checked against it. None if the input has been checked.
        manifest: written next to the table. After an interruption, a table never has another table's manifest.
    """
    with atomic(path) as temporary:
        if isinstance(rows, pl.LazyFrame):
            rows.sink_parquet(temporary, compression="zstd", maintain_order=True, row_group_size=ROW_GROUP)
        else:
            rows.write_parquet(temporary, compression="zstd")
        if table:
            check_written(temporary, table)
        if manifest is not None:
            flush(temporary)
            if not _is_same(manifest_path(path), manifest):
                remove(path)
            write_json(manifest_path(path), manifest)


def _is_same(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the existing manifest has the same settings and inputs, such as one that another process wrote."""
    with suppress(OSError, ValueError):
        old: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return all(old.get(name) == manifest[name] for name in ("settings", "inputs", "counts"))
    return False


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder.

    Manifests and metrics are left out: they record times and speeds, which do not affect later stages.
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
        UserError: if one does not exist.
    """
    return {str(file): hash_path(Path(file)) for file in files}


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash of resolved settings and input hashes. A run may resume another if and only if the two are equal."""
    named = {short_name(path): what for path, what in inputs.items()}
    return hashlib.sha256(json.dumps([plain(settings), named], sort_keys=True).encode()).hexdigest()


def manifest_path(artifact: Path) -> Path:
    """Path of an artifact's manifest: next to a table, inside a model folder."""
    return artifact.with_suffix(".manifest.json") if artifact.suffix == ".parquet" else artifact / "manifest.json"


def manifest(settings: Mapping[str, Any], inputs: Mapping[str, str], counts: Mapping[str, int]) -> dict[str, Any]:
    """The inputs and settings that made an artifact.

    Args:
        settings: resolved settings; sections may be pydantic models. They include the seeds.
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
        "inputs": {short_name(path): what for path, what in inputs.items()},
        "counts": dict(counts),
        "packages": versions,
        "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as manifests record them, as JSON types."""
    found: dict[str, Any] = _plain(settings)
    return found


def _plain(value: Any) -> Any:
    """Settings as JSON types, with short names for files of the checkout."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return short_name(str(value)) if isinstance(value, Path | str) else value


def git_commit() -> str | None:
    """Commit of the workflow, with `-dirty` if files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None
