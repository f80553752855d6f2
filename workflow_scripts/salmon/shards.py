"""Tables that are made in shards, one job each, and gathered: responses and judgements.

The number of shards does not show in the result: a row belongs to a shard by its place, and what is gathered
is ordered by its key.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from salmon import artifacts, checked, tables
from salmon.errors import UserError
from salmon.tables import JUDGEMENTS, RESPONSES, Table


def rows_of(table: pl.LazyFrame, shard: int, shards: int) -> pl.LazyFrame:
    """The rows of one shard: row i of a table belongs to shard i % shards.

    Raises:
        UserError: where there is no such shard.
    """
    if not 0 <= shard < shards:
        raise UserError(f"there is no shard {shard} of {shards}; they are counted from 0")
    return table.gather_every(shards, offset=shard)


def in_order(rows: pl.DataFrame, keys: pl.DataFrame) -> pl.DataFrame:
    """One row per key, in the order of the keys.

    Args:
        rows: finished rows, in any order.
        keys: the key's columns only.
    """
    ordered = keys.join(rows, on=keys.columns, how="inner", maintain_order="left")
    if not ordered.height == rows.height == keys.height:
        raise RuntimeError(f"{rows.height} rows for {keys.height} keys, {ordered.height} in common")
    return ordered.select(rows.columns)


def gather_shards(shards: Sequence[Path]) -> tuple[pl.LazyFrame, dict[str, Any]]:
    """One table of all shards, sorted by `prompt_id`; the order within a prompt stays.

    As all rows of a prompt are in one shard, the result does not depend on the number of shards.

    Args:
        shards: Parquet files of one table of ours, each beside its manifest.

    Returns:
        The table, and its manifest: settings of the shards, their summed counts, the hashes of their files.

    Raises:
        UserError: where a shard is missing, damaged, given twice, made with other settings or inputs, or all
            are empty.
    """
    manifests = [checked.read_manifest(shard) for shard in shards]
    _check_whole(shards, manifests)
    table = _table(shards[0])
    rows = pl.concat([checked.read(shard, table) for shard in shards])
    if rows.select(pl.len()).collect().item() == 0:
        raise UserError(
            f"all {len(shards)} shards of {shards[0].parent} are empty; their manifests count the rows left out"
        )
    tables.check_rows(rows.select(list(table.key)), table, f"the table of {len(shards)} shards in {shards[0].parent}")
    if table is JUDGEMENTS:
        _check_judgements(rows, shards[0].parent)
    counts: Counter[str] = Counter()
    for each in manifests:
        counts.update(each.counts)
    settings = {name: value for name, value in manifests[0].settings.items() if name not in ("shard", "shards")}
    manifest = artifacts.manifest(settings, artifacts.hash_inputs(shards), counts)
    return rows.sort("prompt_id", maintain_order=True), manifest


def _check_whole(shards: Sequence[Path], manifests: Sequence[checked.Manifest]) -> None:
    """Refuse shards that are not exactly those of one table, each with the rows that its manifest counts."""
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
    """Refuse pairs that were judged by some of the principles only."""
    numbers = rows.group_by("prompt_id").len().sort("len", "prompt_id").collect()
    all_of_them = rows.select(pl.col("dimension").n_unique()).collect().item()
    some = numbers.filter(pl.col("len") != all_of_them)
    if some.height:
        raise UserError(
            f"{where}: {some.height} pairs were judged by some of {all_of_them} principles only, such as prompt_id "
            f"{some['prompt_id'][0]} by {some['len'][0]}; delete the shards and judge again"
        )


def _table(shard: Path) -> Table:
    """Which table a shard is a part of."""
    columns = tables.schema_of(shard)
    for table in (RESPONSES, JUDGEMENTS):
        if all(columns.get(name) == kind for name, kind in table.schema.items()):
            return table
    raise UserError(f"{shard} has columns {', '.join(columns)}: neither responses nor judgements")
