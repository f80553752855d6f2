"""Tables of ours, read only where they are whole: schema, rows, and what the manifest beside them counts."""

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

OWN = "if the table is your own, take the manifest away; else move both away, and let them be built again"


class Manifest(BaseModel):
    """The parts of a manifest that are read again."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, Annotated[int, Field(ge=0)]]


def read(path: Path, table: Table, columns: Sequence[str] | None = None) -> pl.LazyFrame:
    """Open a table of ours, after a look at all of its rows (`tables.check_rows`) and at its manifest (`check_count`).

    Args:
        path: of the file.
        table: what it should be.
        columns: those that are wanted, the key's among them; None for all.

    Raises:
        UserError: where anything is wrong with it.
    """
    rows = tables.read(path, table, columns)
    check_count(path, table)
    tables.check_rows(rows, table, path)
    return rows


def read_manifest(table: Path) -> Manifest:
    """The manifest of a table of ours.

    Raises:
        UserError: where it cannot be read, or is none.
    """
    path = manifest_path(table)
    raw = read_json(path, "", OWN)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{describe_errors(error, Manifest, str(path))}\n{OWN}") from None


def check_count(path: Path, table: Table) -> None:
    """Refuse a table with other rows than its manifest counts. A table without a manifest is somebody's own.

    Args:
        path: of the table.
        table: what it should be.

    Raises:
        UserError: also where the manifest is of another kind of table.
    """
    if not manifest_path(path).exists():
        return
    counts = read_manifest(path).counts
    counted = rows_counted(counts)
    if table.name not in counted:
        raise UserError(
            f"{manifest_path(path)} is not the manifest of a table of {table.name}: it counts "
            f"{', '.join(sorted(counts)) or 'nothing'}; {OWN}"
        )
    rows = tables.number_of_rows(path)
    if rows != counted[table.name]:
        raise UserError(f"{path} has {rows} rows, but its manifest counts {counted[table.name]}; {OWN}")


def kind_of(path: Path, kinds: Sequence[Table]) -> Table:
    """Which of several kinds of tables a file is by its manifest; the first one where it has none.

    Raises:
        UserError: where its manifest is of another kind.
    """
    if not manifest_path(path).exists():
        return kinds[0]
    counted = rows_counted(read_manifest(path).counts)
    found = next((kind for kind in kinds if kind.name in counted), None)
    if found is None:
        named = " or ".join(kind.name for kind in kinds)
        raise UserError(f"{manifest_path(path)} is not the manifest of a table of {named}; {OWN}")
    return found


def rows_counted(counts: Mapping[str, int]) -> dict[str, int]:
    """The kinds of tables that a manifest with these counts may be of, and the number of rows it says they have."""
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
    kept = [number for name, number in counts.items() if name.endswith(": kept")]  # of each source
    of_sources = (SFT_EXAMPLES, PROMPTS, RL_PROMPTS, PMP_RECORDS, EVALUATION_PAIRS, PREFERENCE_RECORDS)
    return dict.fromkeys((kind.name for kind in of_sources), sum(kept)) if kept else {}
