"""Long jobs in batches of rows: finished batches are kept, and ranks share those that are left.

Neither an interruption nor the number of ranks shows in the result, because the batches are the same.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from salmon import artifacts, distributed, script
from salmon.artifacts import WorkFolder
from salmon.batching import batches
from salmon.tables import Table

log = logging.getLogger(__name__)


def left_to_do(work: WorkFolder, fingerprint: str, keys: Sequence[str], schema: Mapping[str, Any]) -> list[int]:
    """Open the work folder, and find the places of the keys of which it holds no row. All ranks call this."""
    if distributed.is_main():
        work.open(fingerprint)
    # One rank looks for all: other nodes may not see yet what is in the folder, and would form other batches.
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
    """Compute this rank's share of what is left, keeping each batch as it is finished. All ranks call this.

    Args:
        work: keeps a part of at least one row per batch.
        lengths: row that is left -> its length, the same on all ranks; batch i belongs to rank i % world.
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


def write_shard(work: WorkFolder, rows: pl.DataFrame, output: Path, table: Table, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a shard and then its table, whose presence says that both are whole."""
    artifacts.write_json(artifacts.manifest_path(output), manifest)
    artifacts.write_table(rows, output, table)
    work.delete()
    log.info("%s", ", ".join(f"{name} {number}" for name, number in manifest["counts"].items()))
