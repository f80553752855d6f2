"""The workflow's tables, checked before they are read: schema, rows, and the row counts in their manifests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from salmon import tables
from salmon.artifacts import manifest_path
from salmon.border import read_json
from salmon.errors import UserError, describe_errors
from salmon.tables import (
    ANSWERS,
    EVALUATION_PAIRS,
    JUDGEMENTS,
    PMP_RECORDS,
    PREFERENCE_RECORDS,
    PRINCIPLE_RECORDS,
    PROMPTS,
    RESPONSES,
    RL_PROMPTS,
    SCORES,
    SFT_EXAMPLES,
    VERDICTS,
    Table,
)

OWN = "if you made the table yourself, remove the manifest; otherwise move both away, so that they are built again"


class Manifest(BaseModel):
    """The parts of a manifest that the workflow reads."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, Annotated[int, Field(ge=0)]]


def read(path: Path, table: Table, columns: Sequence[str] | None = None) -> pl.LazyFrame:
    """Open a table of the workflow after checking all its rows (`tables.check_rows`) and its manifest (`check_count`).

    Args:
        path: the file.
        table: the expected kind of table.
        columns: the columns to read, including the key's; None for all.

    Raises:
        UserError: if the table fails a check.
    """
    rows = tables.read(path, table, columns)
    check_count(path, table)
    tables.check_rows(rows, table, path)
    return rows


def read_manifest(table: Path) -> Manifest:
    """The manifest of a table of the workflow.

    Raises:
        UserError: if it cannot be read, or is not a manifest.
    """
    path = manifest_path(table)
    raw = read_json(path, "", OWN)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{describe_errors(error, Manifest, str(path))}\n{OWN}") from None


def check_count(path: Path, table: Table) -> None:
    """Refuse a table whose number of rows differs from its manifest. A table without a manifest is the user's own.

    Args:
        path: the table.
        table: the expected kind of table.

    Raises:
        UserError: also if the manifest belongs to another kind of table.
    """
    if not manifest_path(path).exists():
        return
    counts = read_manifest(path).counts
    counted = rows_counted(counts)
    if table.name not in counted:
        raise UserError(
            f"{manifest_path(path)} is not a manifest of the table {table.name}: it counts "
            f"{', '.join(sorted(counts)) or 'nothing'}; {OWN}"
        )
    rows = tables.number_of_rows(path)
    if rows != counted[table.name]:
        raise UserError(f"{path} has {rows} rows, but its manifest counts {counted[table.name]}; {OWN}")


def kind_of(path: Path, kinds: Sequence[Table]) -> Table:
    """The kind of table that a file is according to its manifest; the first kind if it has no manifest.

    Raises:
        UserError: if its manifest belongs to another kind.
    """
    if not manifest_path(path).exists():
        return kinds[0]
    counted = rows_counted(read_manifest(path).counts)
    found = next((kind for kind in kinds if kind.name in counted), None)
    if found is None:
        named = " or ".join(kind.name for kind in kinds)
        raise UserError(f"{manifest_path(path)} is not a manifest of the table {named}; {OWN}")
    return found


def rows_counted(counts: Mapping[str, int]) -> dict[str, int]:
    """The kinds of tables that a manifest with these counts may describe, each with its number of rows."""
    for marks, kinds in (
        (("judged", "rows"), (JUDGEMENTS,)),
        (("records",), (PRINCIPLE_RECORDS, PREFERENCE_RECORDS)),
        (("answers",), (ANSWERS, RESPONSES)),
        (("scores",), (SCORES,)),
        (("verdicts",), (VERDICTS,)),
        (("kept",), (PMP_RECORDS, EVALUATION_PAIRS, PREFERENCE_RECORDS)),
        (("rows",), (RESPONSES,)),
    ):
        if all(mark in counts for mark in marks):
            return {kind.name: counts[marks[-1]] for kind in kinds}
    kept = [number for name, number in counts.items() if name.endswith(": kept")]  # for each source
    of_sources = (SFT_EXAMPLES, PROMPTS, RL_PROMPTS, PMP_RECORDS, EVALUATION_PAIRS, PREFERENCE_RECORDS)
    return dict.fromkeys((kind.name for kind in of_sources), sum(kept)) if kept else {}
