"""The tables' schemas: what they say of themselves, and that writers keep to them."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from salmon import aggregation, artifacts, preference_data
from salmon.formats import Comparison
from salmon.tables import PMP_RECORDS, PRINCIPLE_RECORDS, PROMPTS, RECORD_TEXTS, TABLES


def test_keys_are_columns_without_nulls_and_a_name_has_one_type() -> None:
    types: dict[str, Any] = {}
    for table in TABLES:
        assert set(table.key) <= set(table.columns)
        assert not any(table.columns[name].nullable for name in table.key)
        for name, column in table.columns.items():
            assert column.meaning
            assert types.setdefault(name, (column.type, column.nullable)) == (column.type, column.nullable), name


def test_who_makes_a_record_makes_every_column_of_it() -> None:
    """Polars fills a key that is missing with nulls, in silence."""
    drawn = [field.name for field in fields(aggregation.Drawn)]
    assert set(drawn) == set(PRINCIPLE_RECORDS.columns) - set(RECORD_TEXTS)
    record = preference_data.record("mine", Comparison("Why?", "So.", "No."), 0)
    assert set(record) == set(PMP_RECORDS.columns)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.drop("input"), "was written with the columns"),
        (lambda rows: rows.with_columns(more=1), "was written with the columns"),
        (lambda rows: rows.with_columns(source=pl.lit(1)), "was written with the columns"),
        (lambda rows: rows.with_columns(source=pl.lit(None, pl.String)), "with nulls in source"),
    ],
)
def test_a_table_that_is_not_whole_is_not_written(tmp_path: Path, change: Any, said: str, lazy: bool) -> None:
    rows = pl.DataFrame({name: ["a", "b"] for name in PROMPTS.columns})
    artifacts.write_table(rows.lazy() if lazy else rows, tmp_path / "right.parquet", PROMPTS)
    wrong = change(rows)
    with pytest.raises(RuntimeError, match=said):
        artifacts.write_table(wrong.lazy() if lazy else wrong, tmp_path / "wrong.parquet", PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["right.parquet"]
