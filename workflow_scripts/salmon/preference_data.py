r"""Public human preferences for pre-training the reward model (PMP): SHP and HH-RLHF (reference: step 2, "PMP data").

The functions of one row return a `Comparison`, or the reason why the row gives none, which is counted. Which output
comes first, and where a record stands, are drawn by hashes of (seed, record), never by the order of a file. Records
are shuffled through files of a sixteenth each, so that memory holds no more than one of those.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl

from salmon.config import PmpData, SourceFormat
from salmon.errors import UserError
from salmon.prompts import ASSISTANT_TURN, digest
from salmon.randomness import seed_of
from salmon.script import progress
from salmon.sources import Located, read_source

# The columns of the reward-model records that a trainer reads; those of the principles are empty here.
SCHEMA: dict[str, Any] = {
    "record_id": pl.String,  # hash of source, query, preferred and other output
    "prompt_id": pl.String,  # hash of source and query
    "source": pl.String,  # name of the source in the configuration
    "instruction": pl.String,  # the query
    "input": pl.String,  # ""
    "output_1": pl.String,
    "output_2": pl.String,
    "preference": pl.Int8,  # the preferred output, 1 or 2
    "definitions": pl.List(pl.String),  # []
    "dimensions": pl.List(pl.String),  # []
    "negated": pl.List(pl.Boolean),  # []
    "deciding": pl.String,  # null
}
BUCKETS = 16
PART_ROWS = 500


class Comparison(NamedTuple):
    """Two answers to a query, of which a person preferred one."""

    query: str
    preferred: str
    other: str


Skipped = Literal[
    "score ratio too small",
    "no assistant turn in common",
    "empty query",
    "empty output",
    "identical outputs",
]


def shp_comparison(row: Any, min_score_ratio: float) -> Comparison | Skipped:
    """A pair of answers to a post, if the one has more than `min_score_ratio` times the score of the other."""
    if row["score_ratio"] <= min_score_ratio:
        return "score ratio too small"
    a, b = row["human_ref_A"] or "", row["human_ref_B"] or ""
    return _complete(row["history"] or "", *((a, b) if row["labels"] == 1 else (b, a)))


def hh_rlhf_comparison(row: Any) -> Comparison | Skipped:
    r"""The rests of two dialogues after the last "\n\nAssistant:" that they have in common, and what stands before it.

    The query keeps the names of the speakers. A dialogue that is a beginning of the other one is no special case:
    the turn of the assistant that one ends and the other goes on with begins after the query.
    """
    preferred, other = row["chosen"] or "", row["rejected"] or ""
    shared = os.path.commonprefix([preferred, other])  # noqa: RUF071 (character by character is what we want)
    query, marker, _ = shared.rpartition(ASSISTANT_TURN)
    if not marker:
        return "no assistant turn in common"
    start = len(query) + len(marker)
    return _complete(query, preferred[start:], other[start:])


def _complete(query: str, preferred: str, other: str) -> Comparison | Skipped:
    """A comparison without white space around its texts, if there is something to compare."""
    found = Comparison(query.strip(), preferred.strip(), other.strip())
    if not found.query:
        return "empty query"
    if not (found.preferred and found.other):
        return "empty output"
    return "identical outputs" if found.preferred == found.other else found


def extract(
    kind: SourceFormat, rows: Iterable[Located], min_score_ratio: float, counts: Counter[str]
) -> Iterator[Comparison]:
    """The comparisons of a data set.

    Args:
        kind: format of the rows, shp or hh_rlhf.
        rows: as `read_source` yields them.
        min_score_ratio: SHP pairs have a larger one.
        counts: gains the number of rows read (`rows`) and left out by reason.
    """
    if kind not in ("shp", "hh_rlhf"):
        raise UserError(f"format {kind} has no preferences; use shp or hh_rlhf")
    for _, row in rows:
        counts["rows"] += 1
        found = shp_comparison(row, min_score_ratio) if kind == "shp" else hh_rlhf_comparison(row)
        if isinstance(found, str):
            counts[found] += 1
        else:
            yield found


def record(name: str, comparison: Comparison, seed: int) -> dict[str, Any]:
    """A row of the table, its outputs in an order drawn by hash."""
    record_id = digest(name, *comparison)
    first = seed_of("order of outputs", seed, record_id) % 2 == 0
    outputs = (comparison.preferred, comparison.other)
    output_1, output_2 = outputs if first else outputs[::-1]
    return {
        "record_id": record_id,
        "prompt_id": digest(name, comparison.query),
        "source": name,
        "instruction": comparison.query,
        "input": "",
        "output_1": output_1,
        "output_2": output_2,
        "preference": 1 if first else 2,
        "definitions": [],
        "dimensions": [],
        "negated": [],
        "deciding": None,
    }


def shuffle(records: Iterable[dict[str, Any]], seed: int, folder: Path) -> list[Path]:
    """Write records, each once, to files that are the shuffled table when read one after the other.

    A record's place is a hash of (seed, record_id), 63 bits. Its upper bits say which file it belongs to; a file
    fits into memory and is sorted there.

    Args:
        records: of `SCHEMA`, in any order, on which the result does not depend.
        seed: of the shuffle.
        folder: empty; holds the files.

    Returns:
        The files in order.
    """
    waiting: list[list[dict[str, Any]]] = [[] for _ in range(BUCKETS)]
    parts: list[list[Path]] = [[] for _ in range(BUCKETS)]

    def flush(bucket: int) -> None:
        part = folder / f"{bucket:02}-{len(parts[bucket])}.parquet"
        pl.DataFrame(waiting[bucket], schema={"place": pl.Int64, **SCHEMA}).write_parquet(part)
        parts[bucket].append(part)
        waiting[bucket].clear()

    for row in records:
        place = seed_of("shuffle", seed, row["record_id"])
        bucket = place * BUCKETS >> 63
        waiting[bucket].append({"place": place, **row})
        if len(waiting[bucket]) == PART_ROWS:
            flush(bucket)
    files = []
    for bucket in range(BUCKETS):
        flush(bucket)
        rows = pl.concat([pl.read_parquet(part) for part in parts[bucket]])
        files.append(folder / f"{bucket:02}.parquet")
        rows.unique("record_id").sort("place").drop("place").write_parquet(files[-1])
        for part in parts[bucket]:
            part.unlink()
    return files


def draw(records: Iterable[dict[str, Any]], limit: int, seed: int, counts: Counter[str]) -> list[dict[str, Any]]:
    """At most `limit` distinct records, those of smallest hash of (seed, record_id); twice as many are held.

    Args:
        records: of `SCHEMA`, in any order, on which the draw does not depend.
        limit: how many at most.
        seed: of the draw.
        counts: gains the number left out, doubled ones among them (`over the limit`).
    """
    number = 0
    kept: dict[int, dict[str, Any]] = {}
    for row in records:
        number += 1
        kept[seed_of("draw", seed, row["record_id"])] = row
        if len(kept) >= 2 * limit:
            kept = {place: kept[place] for place in sorted(kept)[:limit]}
    drawn = [kept[place] for place in sorted(kept)[:limit]]
    counts["over the limit"] += number - len(drawn)
    return drawn


def pmp_records(settings: PmpData, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The records of all sources, in the order in which they are read.

    Args:
        settings: sources, score ratio and seed.
        counts: gains the numbers of rows, by source and reason (`name: reason`).

    Under a limit, a source gives its records of smallest hash, whatever the order of its rows.
    """
    for name, source in settings.sources.items():
        found: Counter[str] = Counter()
        rows = progress(read_source(source), total=None, what=f"rows of {name}")
        comparisons = extract(source.format, rows, settings.min_score_ratio, found)
        records = (record(name, comparison, settings.seed) for comparison in comparisons)
        yield from records if source.limit is None else draw(records, source.limit, settings.seed, found)
        counts.update({f"{name}: {what}": number for what, number in found.items()})
