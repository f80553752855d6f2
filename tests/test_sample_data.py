"""The sample data match their README, and are small."""

import csv
import gzip
import io
import json
import re
from collections import Counter
from pathlib import Path

import polars as pl

DATA = Path(__file__).parent / "data"
FILES = sorted(path for path in DATA.rglob("*") if path.suffix in (".gz", ".parquet"))


def rows(path: Path) -> int:
    if path.suffix == ".parquet":
        return len(pl.read_parquet(path))
    text = gzip.decompress(path.read_bytes()).decode("utf-8-sig")
    if path.name.endswith(".csv.gz"):
        return len(list(csv.DictReader(io.StringIO(text, newline=""))))
    if path.name.endswith(".json.gz"):
        found = json.loads(text)
        return len(found["examples"] if isinstance(found, dict) else found)
    return len([json.loads(line) for line in text.split("\n") if line])


def test_the_readme_has_every_file_with_its_rows() -> None:
    table = re.findall(r"^\| \[(.+?)\]\(\1\) \| (\d+) \|", (DATA / "README.md").read_text(), re.M)
    assert {name: int(number) for name, number in table} == {
        path.relative_to(DATA).as_posix(): rows(path) for path in FILES
    }


def test_the_files_are_small_and_there_are_no_others() -> None:
    assert {path.name for path in DATA.rglob("*") if path.is_file() and path not in FILES} == {
        "README.md",
        "LICENSE.MIT",
    }
    assert sum(path.stat().st_size for path in FILES) < 1_500_000


def test_the_samples_hold_what_was_promised() -> None:
    dolly = pl.read_ndjson(gzip.decompress((DATA / "databricks-dolly-15k" / "sample.jsonl.gz").read_bytes()))
    assert len(set(dolly["category"])) == 8
    trees = pl.read_parquet(DATA / "oasst1" / "validation_sample.parquet")
    assert len(trees.columns) == 18
    known = set(trees["message_id"])
    absent = [parent for parent in trees["parent_id"] if parent is not None and parent not in known]
    assert len(absent) == 1
    scores = Counter(max(found.values()) < 0.1 for found in trees["detoxify"])
    assert scores == {True: len(trees)}
    lines = gzip.decompress((DATA / "gsm8k" / "train_sample.jsonl.gz").read_bytes()).decode()
    wrong, right = len(lines.splitlines()), lines.count("\n")
    assert wrong > right
