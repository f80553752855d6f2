"""The tables' schemas: what they say about themselves, and that writers keep to them."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from salmon import aggregation, artifacts, preference_data, tables
from salmon.errors import UserError
from salmon.formats import Comparison
from salmon.tables import EVALUATION_PAIRS, PMP_RECORDS, PRINCIPLE_RECORDS, PROMPTS, RECORD_TEXTS, TABLES


def test_keys_are_columns_without_nulls_and_a_name_has_one_type() -> None:
    types: dict[str, Any] = {}
    for table in TABLES:
        assert set(table.key) <= set(table.columns)
        assert not any(table.columns[name].nullable for name in table.key)
        for name, column in table.columns.items():
            assert column.meaning
            assert types.setdefault(name, (column.type, column.nullable)) == (column.type, column.nullable), name


def test_who_makes_a_record_makes_every_column_of_it() -> None:
    """Polars silently fills a missing key with nulls."""
    drawn = [field.name for field in fields(aggregation.Drawn)]
    assert set(drawn) == set(PRINCIPLE_RECORDS.columns) - set(RECORD_TEXTS)
    record = preference_data.record("mine", Comparison("Why?", "So.", "No."), 0)
    assert set(record) == set(EVALUATION_PAIRS.columns) > set(PMP_RECORDS.columns)


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


@pytest.mark.parametrize("table", tables.TABLES, ids=lambda table: table.name)
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"instruction": "tulip-7319"}\n', "JSON"),
        (b"[]", "JSON"),
        (b"\x1f\x8b\x08", "packed with gzip"),
        (b"", "empty"),
        (b"a,b\n", "something else"),
    ],
)
def test_a_file_of_another_format(tmp_path: Path, table: tables.Table, content: bytes, found: str) -> None:
    """It names the expected table, the file's format and the key that reads it; it never says to delete the file."""
    path = tmp_path / "mine.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError) as told:
        tables.read(path, table)
    said = str(told.value)
    assert f"is {found}, but a table of {table.name} in Parquet is expected" in said
    assert said.endswith(table.reader)
    assert re.search(r"\b(sampling|judge|aggregation)\.paths?|\.sources|no key reads", said)
    assert "delete" not in said
    assert "tulip" not in said


def test_no_error_about_a_table_or_a_reward_model_tells_to_delete_it() -> None:
    """Errors about files in a work folder or checkpoint, which are not a user's own, may say so."""
    scripts = Path(__file__).parents[1] / "workflow_scripts"
    own = {"work.py", "optimization.py", "ppo.py", "tokenizers.py"}
    texts = [
        (path.name, node.value)
        for path in scripts.rglob("*.py")
        if path.name not in own
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        for node in ast.walk(call)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "delete" in node.value
    ]
    marks = {"deleted", "(deleted)"}  # a column's name, and what Linux calls memory whose file is gone
    assert [text for text in texts if text[1] not in marks and not text[1].startswith(".")] == []
