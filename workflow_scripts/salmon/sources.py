"""Public data sets, row by row, in their upstream schemas: from the hub, or from local files.

Every row is checked against the schema of its format, so later code can rely on names and types. Errors name the file,
the row or line, and the column, never a text of the data, and cover all rows, not only the first. Memory does not grow
with a file. Strings stay strings: nothing in a file is evaluated.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import ijson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from salmon.artifacts import hash_path
from salmon.config import Source, is_local
from salmon.errors import UserError
from salmon.formats import Located

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
BATCH_ROWS = 1000
BAD_ROWS_TOLD = 20
ADVICE = "correct the file, or set the format that it has"
_BOM = b"\xef\xbb\xbf"


class _Broken(str):
    """A row that cannot be read, with the reason."""

    __slots__ = ()


def read_source(source: Source, schema: Any, counts: Counter[str], advice: str | None = None) -> Iterator[Located]:
    """Rows of a data set, file by file in the order of the configuration, each with its location.

    Bad rows, which do not fit the format, are left out, up to `source.max_bad_rows`. If there are more, no further row
    is yielded, but the rest is still read, so that the error lists them all.

    Args:
        source: the source.
        schema: `TypedDict` of the required columns (`formats`).
        counts: gains the numbers of rows read (`rows`) and left out (`bad rows`).
        advice: advice for a file of another format, as the end of a sentence; None for a configuration's source.

    Yields:
        (place, row): row is a dict of the schema's columns; other columns are left out.

    Raises:
        UserError: if a file, folder or hub data set is missing, damaged or empty, or has too many bad rows.
    """
    check = TypeAdapter(schema).validate_python
    told: list[str] = []

    def bad(place: str, reason: str) -> None:
        counts["bad rows"] += 1
        if len(told) < BAD_ROWS_TOLD:
            told.append(f"{place}: {reason}")

    for path in source.paths:
        parts: list[tuple[str, Iterator[Located]]]
        if is_local(path):
            parts = [(str(file), _read_file(file, schema, advice or ADVICE)) for file in local_files(path)]
        else:
            parts = [(path, _read_hub(path, source, schema))]
        for name, rows in parts:
            place = ""
            for place, row in rows:
                counts["rows"] += 1
                if isinstance(row, _Broken):
                    bad(place, row)
                    continue
                try:
                    checked = check(row, strict=True)
                except ValidationError as error:
                    bad(place, _finding(error))
                    continue
                if counts["bad rows"] <= source.max_bad_rows:
                    yield place, checked
            if not place:
                raise UserError(f"{name} holds no rows; {advice or 'fetch it again or remove it from the sources'}")
    if counts["bad rows"] > source.max_bad_rows:
        raise UserError(_describe_bad_rows(told, counts["bad rows"], source, schema, advice))


def _describe_bad_rows(told: list[str], number: int, source: Source, schema: Any, advice: str | None) -> str:
    """The message about the bad rows of a data set: the first rows one by one, and advice."""
    needed = ", ".join(sorted(schema.__required_keys__))
    lines = [*told, f"... and {number - len(told)} more"] if number > len(told) else told
    if advice:
        return "\n".join([*lines, f"{number} bad rows; {advice}"])
    lines.append(
        f"{number} bad rows, but max_bad_rows of the source allows {source.max_bad_rows}; format {source.format} "
        f"needs {needed}: fix the rows (fetch the file again if it was cut off), set the format that it has, or raise "
        "max_bad_rows to leave them out"
    )
    return "\n".join(lines)


def identify_sources(sources: Mapping[str, Source]) -> dict[str, str]:
    """Identity of the data for a manifest: the hash of local data, the revision of data on the hub."""
    return {
        path: hash_path(Path(path).expanduser()) if is_local(path) else source.revision or "main"
        for source in sources.values()
        for path in source.paths
    }


def local_files(path: str) -> list[Path]:
    """The file, or the data files below the folder, by name. Hidden files and the workflow's manifests do not count.

    Raises:
        UserError: if there is nothing, or nothing readable.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = [
            file
            for file in sorted(place.rglob("*"))
            if file.is_file()
            and file.name.endswith(ENDINGS)
            and not file.name.endswith("manifest.json")
            and not any(part.startswith(".") for part in file.relative_to(place).parts)
        ]
        if not files:
            raise UserError(f"folder {path} holds no data files ({', '.join(ENDINGS)})")
        return files
    if not place.exists():
        raise UserError(f"{path} does not exist (local file or folder; a hub id has the form owner/name)")
    if not place.name.endswith(ENDINGS):
        raise UserError(f"{path} has an unknown ending; known are {', '.join(ENDINGS)}")
    return [place]


def _finding(error: ValidationError) -> str:
    """The first fault of a row, without its content."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    column = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"column {column} is missing"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"column {column}: {message}" if column else "the row is not an object with named columns"


def _wanted(columns: list[str], schema: Any, path: str, advice: str) -> list[str]:
    """Columns to read from a file that lists its columns.

    Raises:
        UserError: if a column that the format needs is missing.
    """
    missing = sorted(schema.__required_keys__ - set(columns))
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; {advice}")
    return [name for name in columns if name in schema.__annotations__]


def _read_file(path: Path, schema: Any, advice: str) -> Iterator[Located]:
    """Rows of one local file; every failure to read it becomes a `UserError`."""
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, schema, advice)
        elif ".jsonl" in path.suffixes[-2:] or _holds_lines(path):
            yield from _read_json_lines(path)
        else:
            yield from _read_json(path)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path} is damaged or cut off (gzip); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None


def _holds_lines(path: Path) -> bool:
    """Whether a `.json` file has an object on the first line, and more after it: the authors' files hold JSON Lines."""
    with _open(path) as stream:
        if stream.peek(1)[:1] != b"{":  # type: ignore[attr-defined]
            return False
        try:
            json.loads(stream.readline())
        except (ValueError, RecursionError):
            return False
        return any(line.strip() for line in stream)


def _read_parquet(path: Path, schema: Any, advice: str) -> Iterator[Located]:
    """Rows of a Parquet file, batch by batch, of the wanted columns only."""
    number = 0
    try:
        # By default it keeps everything that it has read; with a buffer, it holds one batch of pages at a time.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            columns = _wanted(file.schema_arrow.names, schema, str(path), advice)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{path} is damaged, cut off or not Parquet (after row {number}: {type(error).__name__}); fetch it again"
        ) from None


def _read_json_lines(path: Path) -> Iterator[Located]:
    r"""Objects of a JSON Lines file; only "\n" ends a line, because texts hold every other line separator."""
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
                if b"\\ud" in line.lower():
                    row = _without_surrogates(row)
                yield place, row
            except UnicodeDecodeError as error:
                yield place, _Broken(f"not UTF-8 (byte {error.start} of the line)")
            except (ValueError, RecursionError) as error:
                where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
                yield place, _Broken(f"broken JSON{where}")


def _read_json(path: Path) -> Iterator[Located]:
    """Objects of one JSON list, parsed while reading; or the single object of a file (MATH as published).

    A task of BIG-bench is an object whose list `examples` holds the rows.
    """
    number = 0
    for parser in (ijson, ijson.get_backend("python")):
        with _open(path) as stream:
            start = stream.peek(1 << 12).lstrip()[:1]  # type: ignore[attr-defined]
            if not start:
                return
            if start not in (b"[", b"{"):
                raise UserError(
                    f"{path} is neither a JSON list nor an object; correct it, or remove it from the sources"
                )
            try:
                rows = parser.items(stream, "item" if start == b"[" else _place(path), use_float=True)
                for row in islice(rows, number, None):
                    number += 1
                    yield f"{path}, row {number}", row if parser is ijson else _without_surrogates(row)
                return
            except (ijson.JSONError, ValueError) as error:  # their messages quote the data
                # The C parser accepts no numbers beyond 64 bits; the Python parser, 40 times slower, continues there.
                if parser is ijson and "overflow" in str(error):
                    continue
                lines = "; JSON lines belong in a file that ends with .jsonl" if start == b"{" else ""
                raise UserError(
                    f"{path}: broken JSON, or not UTF-8, after row {number}; fix it, or fetch it again if it was cut "
                    f"off{lines}"
                ) from None


def _place(path: Path) -> str:
    """Path of the rows in a JSON object, in ijson's notation: the list `examples`, or the object itself."""
    with _open(path) as stream:
        found = any(event[:2] == ("examples", "start_array") for event in ijson.parse(stream))
    return "examples.item" if found else ""


def _without_surrogates(row: Any) -> Any:
    """A row with "?" for lone surrogates, which are not characters and which no table can hold."""
    return json.loads(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))


def _open(path: Path) -> IO[bytes]:
    """Open a file, decompressed if necessary, after its byte-order mark if it has one."""
    stream: Any = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 (readers close it)
    if stream.peek(len(_BOM)).startswith(_BOM):
        stream.read(len(_BOM))
    return stream


def _read_hub(path: str, source: Source, schema: Any) -> Iterator[Located]:
    """Rows of a data set on the hub, streamed."""
    import datasets

    try:
        rows = datasets.load_dataset(
            path, split=source.split, revision=source.revision, data_files=source.data_files, streaming=True
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read from the hub: {reason}. Check path, split, revision and data_files; a machine "
            "without a network needs a local copy as path."
        ) from error
    if rows.column_names:
        rows = rows.select_columns(_wanted(rows.column_names, schema, path, ADVICE))
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except Exception as error:  # its readers and the network may raise anything; their messages may quote the data
        raise UserError(
            f"{path}: reading from the hub failed after row {number} ({type(error).__name__}); run again, or set a "
            "local copy as path"
        ) from error
