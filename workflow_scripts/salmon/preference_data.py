"""Public human preferences for pre-training the reward model (PMP): SHP and HH-RLHF (reference: step 2, "PMP data").

`formats` says what a row gives. Which output comes first, and where a record stands, are drawn by hashes of
(seed, record), never by the order of a file. Records are shuffled through files of a sixteenth each, so that memory
holds no more than one of those.
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
"""The reason to leave out what PMP learns, where reward models and policies are measured."""


def extract(
    format_name: str, rows: Iterable[Located], min_score_ratio: float, counts: Counter[str]
) -> Iterator[Comparison]:
    """The comparisons of a data set, stripped of white space, where there is something to compare.

    Args:
        format_name: of the rows, one of `PAIR_FORMATS`.
        rows: as `read_source` yields them.
        min_score_ratio: comparisons that have a score ratio have a larger one.
        counts: gains the number of rows left out by reason.
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
    """A comparison without white space around its texts, or the reason to leave it out."""
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
    """Where a dialogue begins, up to the assistant's first turn; a post, or a question alone, is whole.

    A data set has one dialogue at several depths. The deeper query quotes the answer that was preferred in the
    shallower one, so that they are held out together.
    """
    return query.partition(ASSISTANT_TURN)[0]


def record(name: str, comparison: Comparison, seed: int) -> dict[str, Any]:
    """A row of `EVALUATION_PAIRS`, and of `PMP_RECORDS` with one column more; its outputs in an order drawn by hash."""
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
    """Write records, each once, to files that are the shuffled table when read one after the other.

    A record's place is a hash of (seed, record_id), 63 bits. Its upper bits say which file it belongs to; a file
    fits into memory and is sorted there.

    Args:
        records: of `record`, in any order, on which the result does not depend.
        seed: of the shuffle.
        folder: empty; holds the files.
        counts: gains the numbers of records written and left out, by source (`name: kept`, `name: duplicate`).
        table: whose columns are written.

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
    """At most `limit` distinct records, those of smallest hash of (seed, record_id); twice as many are held.

    Args:
        records: of `PMP_RECORDS`, in any order, on which the draw does not depend.
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
        sources: by name.
        min_score_ratio: see `extract`.
        seed: of the draws, and of the order of outputs.
        counts: gains the numbers of rows, by source and reason (`name: reason`).
        trained: openings of queries, folded (`text.fold`), whose comparisons are left out.

    Under a limit, a source gives its records of smallest hash, whatever the order of its rows.
    """
    for name, source in sources.items():
        here: Counter[str] = Counter()
        rows = progress(read_source(source, PAIR_FORMATS[source.format].row, here), total=None, what=f"rows of {name}")
        comparisons = extract(source.format, rows, min_score_ratio, here)
        records = (record(name, comparison, seed) for comparison in _without(trained, comparisons, here))
        yield from records if source.limit is None else draw_records(records, source.limit, seed, here)
        counts.update({f"{name}: {what}": number for what, number in here.items()})


def _without(trained: Collection[str], comparisons: Iterable[Comparison], counts: Counter[str]) -> Iterator[Comparison]:
    """The comparisons whose dialogue was not trained on, at any depth."""
    for comparison in comparisons:
        if trained and fold(opening(comparison.query)) in trained:
            counts[TRAINED] += 1
        else:
            yield comparison
