"""Long jobs in batches of rows: finished batches are kept, and ranks share the remaining ones.

The batches are always the same, so neither an interruption nor the number of ranks affects the result.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl

from salmon import artifacts, distributed, script
from salmon.batching import batches
from salmon.tables import Table
from salmon.work import WorkFolder

log = logging.getLogger(__name__)


def left_to_do(work: WorkFolder, keys: Sequence[str], schema: Mapping[str, Any]) -> list[int]:
    """Indices of the keys without a row in the work folder. All ranks call this."""
    # One rank looks for all: other nodes may not see all files yet, and would form other batches.
    kept = work.read_parts(schema)["prompt_id"].to_list() if distributed.is_main() else None
    done = set(distributed.broadcast(kept))
    return [place for place, key in enumerate(keys) if key not in done]


def run_batches(
    work: WorkFolder,
    lengths: Mapping[int, int],
    size: int,
    compute: Callable[[list[int]], pl.DataFrame],
    what: str,
    *,
    together: bool = False,
) -> None:
    """Compute this rank's share of the remaining rows, and keep each batch when it is finished. All ranks call this.

    Args:
        work: keeps a part of at least one row per batch.
        lengths: remaining row -> its length, equal on all ranks; batch i belongs to rank i % world.
        size: rows per batch.
        compute: makes the table of a batch of rows.
        what: names the rows in the log.
        together: all ranks hold parts of one model and compute every batch; rank 0 keeps it.
    """
    rows = list(lengths)
    parts = [[rows[place] for place in batch] for batch in batches(list(lengths.values()), size)]
    mine = parts if together else parts[distributed.rank() :: distributed.world()]
    for table in script.progress(map(compute, mine), total=len(mine), what=f"batches of {size} {what}"):
        if not together or distributed.is_main():
            work.write_part(table)
    distributed.barrier()


def write_shard(work: WorkFolder, rows: pl.DataFrame, table: Table, manifest: Mapping[str, Any]) -> None:
    """Write a shard and its manifest."""
    with work.finish(manifest) as file:
        artifacts.write_table(rows, file, table)
    log.info("%s", ", ".join(f"{name} {number}" for name, number in manifest["counts"].items()))
