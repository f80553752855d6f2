"""Tables that are made in shards, one job each, and gathered: responses and judgements.

The number of shards does not show in the result: a row belongs to a shard by its place, and what is gathered
is ordered by its key.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from salmon import artifacts, tables
from salmon.errors import UserError
from salmon.tables import JUDGEMENTS, RESPONSES, Table

OF_ONE_SHARD = ("shard", "shards")
"""Settings in the manifest of a shard that the table of all of them does not depend on."""


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
        The table, and its manifest: settings of the shards, their summed counts, their inputs and the hashes of their
        files.

    Raises:
        UserError: where a shard is missing, damaged, given twice, made with other settings or inputs, or all
            are empty.
    """
    manifests = [_manifest(shard) for shard in shards]
    _check_whole(shards, manifests)
    table = _table(shards[0])
    rows = pl.concat([tables.read(shard, table) for shard in shards])
    if rows.select(pl.len()).collect().item() == 0:
        raise UserError(
            f"all {len(shards)} shards of {shards[0].parent} are empty; their manifests count the rows left out"
        )
    tables.check_rows(rows, table, f"the table of {len(shards)} shards in {shards[0].parent}")
    counts: Counter[str] = Counter()
    for each in manifests:
        counts.update(each["counts"])
    settings = {name: value for name, value in manifests[0]["settings"].items() if name not in OF_ONE_SHARD}
    # The inputs of the shards, too: the shards may be deleted.
    inputs = manifests[0]["inputs"] | artifacts.hash_inputs(shards)
    manifest = artifacts.manifest(settings, inputs, counts)
    return rows.sort("prompt_id", maintain_order=True), manifest


def _manifest(shard: Path) -> dict[str, Any]:
    """Manifest of a shard."""
    path = artifacts.manifest_path(shard)
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete {shard} and build it again") from None
    return manifest


def _check_whole(shards: Sequence[Path], manifests: Sequence[Mapping[str, Any]]) -> None:
    """Refuse shards that are not exactly those of one table."""
    numbers = [manifest["settings"]["shard"] for manifest in manifests]
    of = manifests[0]["settings"]["shards"]
    if sorted(numbers) != list(range(of)):
        raise UserError(f"{shards[0].parent}: found shards {sorted(numbers)} of 0 to {of - 1}; give each of them once")
    for shard, manifest in zip(shards, manifests, strict=True):
        for part in ("settings", "inputs"):
            mine, first = ({**each[part], "shard": None} for each in (manifest, manifests[0]))
            if mine != first:
                other = ", ".join(sorted(name for name in mine | first if mine.get(name) != first.get(name)))
                raise UserError(f"{shard} and {shards[0]} were made with other {part} ({other}); build both again")


def _table(shard: Path) -> Table:
    """Which table a shard is a part of."""
    columns = tables.schema_of(shard)
    for table in (RESPONSES, JUDGEMENTS):
        if all(columns.get(name) == kind for name, kind in table.schema.items()):
            return table
    raise UserError(f"{shard} has columns {', '.join(columns)}: neither responses nor judgements")
