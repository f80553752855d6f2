"""Public human preferences for pre-training the reward model (PMP): SHP and HH-RLHF (reference: step 2, "PMP data").

`formats` defines what a row gives. The order of outputs and the position of a record are drawn by hashes of (seed,
record), never by the order of a file. Records are shuffled through 16 files, so memory holds only one sixteenth of
them.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from salmon.config import PairSource
from salmon.formats import ASSISTANT_TURN, PAIR_FORMATS, Comparison, Located, Skipped
from salmon.randomness import digest, seed_of
from salmon.script import progress
from salmon.sources import read_source
from salmon.tables import PMP_RECORDS, Table
from salmon.text import fold

BUCKETS = 16
PART_ROWS = 500
TRAINED = "trained on by PMP"
"""The reason for leaving out PMP's training data when reward models and policies are measured."""


def extract(
    format_name: str, rows: Iterable[Located], min_score_ratio: float, counts: Counter[str]
) -> Iterator[Comparison]:
    """The usable comparisons of a data set, stripped of white space.

    Args:
        format_name: the rows' format, one of `PAIR_FORMATS`.
        rows: the rows, as `read_source` yields them.
        min_score_ratio: drops comparisons whose score ratio is not larger.
        counts: gains the numbers of omitted rows, by reason.
    """
    compare = PAIR_FORMATS[format_name].compare
    for _, row in rows:
        comparison = compare(row)
        if not isinstance(comparison, Skipped):
            comparison = _complete(comparison, min_score_ratio)
        if isinstance(comparison, Skipped):
            counts[comparison] += 1
        else:
            yield comparison


def _complete(comparison: Comparison, min_score_ratio: float) -> Comparison | Skipped:
    """A comparison without white space around its texts, or the reason for leaving it out."""
    if comparison.score_ratio is not None and comparison.score_ratio <= min_score_ratio:
        return Skipped("score ratio too small")
    query, preferred, other = (text.strip() for text in comparison[:3])
    if not query:
        return Skipped("empty query")
    if not (preferred and other):
        return Skipped("empty output")
    return (
        Skipped("identical outputs")
        if preferred == other
        else Comparison(query, preferred, other, subset=comparison.subset)
    )


def opening(query: str) -> str:
    """The beginning of a dialogue, up to the assistant's first turn; a post or a single question is returned whole.

    A data set has the same dialogue at several depths. The deeper query quotes the preferred answer of the shallower
    one, so they must be held out together.
    """
    return query.partition(ASSISTANT_TURN)[0]


def record(name: str, comparison: Comparison, seed: int) -> dict[str, Any]:
    """A row of `EVALUATION_PAIRS`, or of `PMP_RECORDS` plus one column; a hash draws the order of its outputs."""
    record_id = digest(name, *comparison[:3])
    first = seed_of("order of outputs", seed, record_id) % 2 == 0
    outputs = (comparison.preferred, comparison.other)
    output_1, output_2 = outputs if first else outputs[::-1]
    return {
        "record_id": record_id,
        "prompt_id": digest(name, opening(comparison.query)),
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
        "subset": comparison.subset,
    }


def shuffle(
    records: Iterable[dict[str, Any]], seed: int, folder: Path, counts: Counter[str], table: Table = PMP_RECORDS
) -> list[Path]:
    """Write each record once, to files that form the shuffled table when read in sequence.

    A record's position is a hash of (seed, record_id), 63 bits. Its upper bits select a file; each file fits into
    memory and is sorted there.

    Args:
        records: from `record`; their order does not affect the result.
        seed: seed of the shuffle.
        folder: an empty folder for the files.
        counts: gains the numbers of written and omitted records, by source (`name: kept`, `name: duplicate`).
        table: the table whose columns are written.

    Returns:
        The files in order.
    """
    waiting: list[list[dict[str, Any]]] = [[] for _ in range(BUCKETS)]
    parts: list[list[Path]] = [[] for _ in range(BUCKETS)]

    def flush(bucket: int) -> None:
        part = folder / f"{bucket:02}-{len(parts[bucket])}.parquet"
        pl.DataFrame(waiting[bucket], schema={"place": pl.Int64, **table.schema}).write_parquet(part)
        parts[bucket].append(part)
        waiting[bucket].clear()

    for row in records:
        place = seed_of("shuffle", seed, row["record_id"])
        bucket = place * BUCKETS >> 63
        waiting[bucket].append({"place": place, **{name: row[name] for name in table.columns}})
        if len(waiting[bucket]) == PART_ROWS:
            flush(bucket)
    files = []
    for bucket in range(BUCKETS):
        flush(bucket)
        rows = pl.concat([pl.read_parquet(part) for part in parts[bucket]])
        files.append(folder / f"{bucket:02}.parquet")
        distinct = rows.unique("record_id")
        for what, counted, sign in (("kept", distinct, 1), ("duplicate", rows, 1), ("duplicate", distinct, -1)):
            for source, number in counted.group_by("source").len().iter_rows():
                counts[f"{source}: {what}"] += sign * number
        distinct.sort("place").drop("place").write_parquet(files[-1])
        for part in parts[bucket]:
            part.unlink()
    counts += Counter()  # drops the zeros
    return files


def draw_records(
    records: Iterable[dict[str, Any]], limit: int, seed: int, counts: Counter[str]
) -> list[dict[str, Any]]:
    """At most `limit` distinct records: those with the smallest hash of (seed, record_id). Memory holds twice as many.

    Args:
        records: rows of `PMP_RECORDS`; their order does not affect the draw.
        limit: maximum number of records.
        seed: seed of the draw.
        counts: gains the number of omitted records, including duplicates (`over the limit`).
    """
    number = 0
    kept: dict[int, dict[str, Any]] = {}
    for row in records:
        number += 1
        kept[seed_of("draw", seed, row["record_id"])] = row
        if len(kept) >= 2 * limit:
            kept = {place: kept[place] for place in sorted(kept)[:limit]}
    drawn = [kept[place] for place in sorted(kept)[:limit]]
    if number > len(drawn):
        counts["over the limit"] += number - len(drawn)
    return drawn


def comparison_records(
    sources: Mapping[str, PairSource],
    min_score_ratio: float,
    seed: int,
    counts: Counter[str],
    trained: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """The records of all sources, in the order in which they are read.

    Args:
        sources: the sources, by name.
        min_score_ratio: see `extract`.
        seed: seed of the draws and of the order of outputs.
        counts: gains the numbers of rows, by source and reason (`name: reason`).
        trained: folded openings of queries (`text.fold`) whose comparisons are left out.

    Under a limit, a source gives the records with the smallest hashes, whatever the order of its rows.
    """
    for name, source in sources.items():
        here: Counter[str] = Counter()
        rows = progress(read_source(source, PAIR_FORMATS[source.format].row, here), total=None, what=f"rows of {name}")
        comparisons = extract(source.format, rows, min_score_ratio, here)
        records = (record(name, comparison, seed) for comparison in _without(trained, comparisons, here))
        yield from records if source.limit is None else draw_records(records, source.limit, seed, here)
        counts.update({f"{name}: {what}": number for what, number in here.items()})


def _without(trained: Collection[str], comparisons: Iterable[Comparison], counts: Counter[str]) -> Iterator[Comparison]:
    """The comparisons whose dialogues were not trained on at any depth."""
    for comparison in comparisons:
        if trained and fold(opening(comparison.query)) in trained:
            counts[TRAINED] += 1
        else:
            yield comparison
