"""Tables that are made in shards, with one job per shard, and then gathered: responses and judgements.

The number of shards does not affect the result: a row's position determines its shard, and the gathered table is sorted
by key.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from salmon import artifacts, checked, tables
from salmon.errors import UserError
from salmon.script import progress
from salmon.tables import JUDGEMENTS, RESPONSES, Table

BATCH_ROWS = 2000
BUCKETS = 16

OF_ONE_SHARD = ("shard", "shards")
"""Settings in a shard's manifest that do not affect the gathered table."""


def rows_of(table: pl.LazyFrame, shard: int, shards: int) -> pl.LazyFrame:
    """The rows of one shard: row i of a table belongs to shard i % shards.

    Raises:
        UserError: if there is no such shard.
    """
    if not 0 <= shard < shards:
        raise UserError(f"there is no shard {shard} of {shards}; shards are counted from 0")
    return table.gather_every(shards, offset=shard)


def in_order(rows: pl.DataFrame, keys: pl.DataFrame) -> pl.DataFrame:
    """One row per key, in the order of the keys.

    Args:
        rows: finished rows, in any order.
        keys: the key columns only.
    """
    ordered = keys.join(rows, on=keys.columns, how="inner", maintain_order="left")
    if not ordered.height == rows.height == keys.height:
        raise RuntimeError(f"{rows.height} rows for {keys.height} keys, {ordered.height} in common")
    return ordered.select(rows.columns)


def read_batches(path: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """The rows of a Parquet file in order, some thousands at a time.

    Polars' own scans hold at least a whole row group, which may be the whole table.
    """
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns)):
            yield pl.DataFrame(batch).select(columns)


def read_rows(paths: Iterable[Path], columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The rows of Parquet files in order."""
    for path in paths:
        for batch in read_batches(path, columns):
            yield from batch.iter_rows()


def in_order_of_keys(path: Path, folder: Path) -> list[Path]:
    """A Parquet file as files sorted by `prompt_id`: itself if it is sorted, otherwise a copy in the folder."""
    table = pl.scan_parquet(path)
    falls = (pl.col("prompt_id") > pl.col("prompt_id").shift(-1)).any()
    if table.select(falls).collect(engine="streaming").item():
        return sort_rows([path], table.collect_schema().names(), folder)
    return [path]


def sort_rows(paths: Sequence[Path], columns: Sequence[str], folder: Path) -> list[Path]:
    """Sort rows by `prompt_id` through 16 files; memory holds one of them, and all ids.

    Args:
        paths: Parquet files. Rows with the same prompt_id keep their order if they are in one file.
        columns: columns of the rows.
        folder: created here; holds the result.

    Returns:
        Files that form the sorted table when read in sequence.
    """
    folder.mkdir()
    ids = pl.scan_parquet(list(paths)).select("prompt_id").collect(engine="streaming").to_series().sort()
    bounds = ids.gather([place * ids.len() // BUCKETS for place in range(1, BUCKETS)])
    parts = [folder / f"{bucket:02}.unsorted" for bucket in range(BUCKETS)]
    schema = pl.scan_parquet(paths[0]).select(columns).head(0).collect().to_arrow().schema
    with ExitStack() as stack:
        writers = [stack.enter_context(pq.ParquetWriter(part, schema)) for part in parts]
        for path in progress(paths, total=len(paths), what="files"):
            for batch in read_batches(path, columns):
                bucket = bounds.search_sorted(batch["prompt_id"].fill_null(""), side="right").alias("bucket")
                rows = batch.with_columns(bucket).partition_by("bucket", as_dict=True, include_key=False)
                for (number,), some in rows.items():
                    writers[number].write_table(some.to_arrow())
    files = [part.with_suffix(".parquet") for part in parts]
    for part, file in zip(parts, files, strict=True):
        pl.read_parquet(part).sort("prompt_id", maintain_order=True).write_parquet(file)
        part.unlink()
    return files


def gather_shards(shards: Sequence[Path], folder: Path) -> tuple[pl.LazyFrame, dict[str, Any]]:
    """One table from all shards, sorted by `prompt_id`; rows of a prompt keep their order.

    All rows of a prompt are in one shard, so the result does not depend on the number of shards.

    Args:
        shards: Parquet files of one table of the workflow, each next to its manifest.
        folder: created here; holds intermediate files.

    Returns:
        The table, and its manifest: settings of the shards, their summed counts, their inputs and the hashes of their
        files.

    Raises:
        UserError: if a shard is missing, damaged, duplicated, or made with other settings or inputs; or if all are
            empty.
    """
    manifests = [checked.read_manifest(shard) for shard in shards]
    _check_whole(shards, manifests)
    table = _table(shards[0])
    # Only imported tables have null columns, and these are never in shards.
    whole = replace(table, columns={name: replace(one, nullable=False) for name, one in table.columns.items()})
    rows = pl.concat([checked.read(shard, whole) for shard in shards])
    if rows.select(pl.len()).collect().item() == 0:
        raise UserError(
            f"all {len(shards)} shards of {shards[0].parent} are empty; their manifests count the omitted rows"
        )
    files = sort_rows(shards, list(table.columns), folder)
    for file in files:
        keys = pl.scan_parquet(file).select(list(table.key))
        tables.check_rows(keys, table, f"the table of {len(shards)} shards in {shards[0].parent}")
    if table is JUDGEMENTS:
        _check_judgements(rows, shards[0].parent)
    counts: Counter[str] = Counter()
    for each in manifests:
        counts.update(each.counts)
    settings = {name: value for name, value in manifests[0].settings.items() if name not in OF_ONE_SHARD}
    # Also the inputs of the shards, because the shards may be deleted.
    inputs = manifests[0].inputs | artifacts.hash_inputs(shards)
    return pl.scan_parquet(files), artifacts.manifest(settings, inputs, counts)


def _check_whole(shards: Sequence[Path], manifests: Sequence[checked.Manifest]) -> None:
    """Refuse shards unless they are exactly the shards of one table, each with the rows that its manifest counts."""
    numbers = [manifest.settings.get("shard") for manifest in manifests]
    of = manifests[0].settings.get("shards")
    if len(numbers) != of or sorted(numbers, key=str) != sorted(range(of), key=str):
        found = ", ".join(sorted(map(str, numbers)))
        last = of - 1 if isinstance(of, int) else of
        raise UserError(f"{shards[0].parent}: found shards [{found}] of 0 to {last}; give each of them once")
    for shard, manifest in zip(shards, manifests, strict=True):
        for part in ("settings", "inputs"):
            mine, first = ({**getattr(each, part), "shard": None} for each in (manifest, manifests[0]))
            if mine != first:
                other = ", ".join(sorted(name for name in mine | first if mine.get(name) != first.get(name)))
                raise UserError(f"{shard} and {shards[0]} were made with other {part} ({other}); build both again")


def _check_judgements(rows: pl.LazyFrame, where: Path) -> None:
    """Refuse pairs that were judged by only some of the principles."""
    numbers = rows.group_by("prompt_id").len().sort("len", "prompt_id").collect()
    all_of_them = rows.select(pl.col("dimension").n_unique()).collect().item()
    some = numbers.filter(pl.col("len") != all_of_them)
    if some.height:
        raise UserError(
            f"{where}: {some.height} pairs were judged by only some of {all_of_them} principles, such as prompt_id "
            f"{some['prompt_id'][0]} by {some['len'][0]}; move the shards away, so that they are judged again"
        )


def _table(shard: Path) -> Table:
    """The table that a shard belongs to."""
    columns = tables.schema_of(shard)
    for table in (RESPONSES, JUDGEMENTS):
        if all(columns.get(name) == kind for name, kind in table.schema.items()):
            return table
    raise UserError(f"{shard} has columns {', '.join(columns)}: neither responses nor judgements")
