"""Every table of the workflow: its columns with their types and meanings, and which of them may be null.

Writers build their rows with a table's `schema`, and readers open a file with `read`. `make docs-reference` writes
docs/tables.md from this module.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from salmon.border import LARGEST, reading
from salmon.errors import UserError


@dataclass(frozen=True)
class Column:
    """One column: its type, its meaning, and whether it may be null."""

    type: pl.DataType
    meaning: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """One kind of table, stored as Parquet.

    Attributes:
        name: name in messages and documents.
        files: path of the table below the results folder.
        meaning: what one row is, and how the rows are ordered.
        key: columns whose values identify a row.
        columns: columns by name, in their order.
        reader: for messages: the key of the configuration that reads such rows in another format.
    """

    name: str
    files: str
    meaning: str
    key: tuple[str, ...]
    columns: Mapping[str, Column]
    reader: str

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """Name -> polars type, in column order."""
        return {name: column.type for name, column in self.columns.items()}

    def select(self, *names: str) -> dict[str, pl.DataType]:
        """The schema of these columns."""
        return {name: self.columns[name].type for name in names}


_STRING, _BOOL, _REAL = pl.String(), pl.Boolean(), pl.Float64()
_PROMPT = {
    "prompt_id": Column(_STRING, "hash of source, instruction and input: 20 hexadecimal digits"),
    "source": Column(_STRING, "name of the source in the configuration"),
    "instruction": Column(_STRING, "text of the user's request"),
    "input": Column(_STRING, "text that the instruction is about; empty if there is none"),
}

PROMPTS = Table(
    "prompts",
    "prompts/oasst1.parquet",
    "One prompt per row, ordered by source and then by first appearance. No two prompts have the same text.",
    ("prompt_id",),
    _PROMPT,
    "prompts.sources reads data sets and prompt files",
)

RL_PROMPTS = Table(
    "RL prompts",
    "prompts/rl.parquet",
    "One prompt of the RL stage per row, ordered and distinct like the prompts.",
    ("prompt_id",),
    {
        **_PROMPT,
        "question_type": Column(_STRING, "`general`, `reasoning` or `red_teaming`"),
        "length_bonus": Column(_REAL, "factor of the length reward for this prompt"),
    },
    "rl_prompts.sources reads data sets and prompt files",
)

SFT_EXAMPLES = Table(
    "SFT examples",
    "sft/examples.parquet",
    "One instruction per row with an answer that the initial policy learns, ordered and distinct like the prompts.",
    ("example_id",),
    {
        "example_id": Column(_STRING, "hash of source, instruction, input and output"),
        **_PROMPT,
        "prompt_id": Column(_STRING, "hash of source, instruction and input, which several examples may share"),
        "output": Column(_STRING, "the answer"),
        "is_whole": Column(_BOOL, "whether the answer is complete; from one that was cut off, no end is learned"),
    },
    "sft_data.sources reads instructions with answers",
)

PROMPT_TOO_LONG = "prompt_too_long"
"""Finish reason if the prompt leaves no room for a response, so nothing was sampled."""
IMPORTED = "imported"
"""Finish reason of an imported response, because the true reason is not known."""

RESPONSES = Table(
    "responses",
    "responses/response{0,1}.parquet",
    "One prompt per row with the initial policy's response, ordered by prompt_id.",
    ("prompt_id",),
    {
        **_PROMPT,
        "response": Column(
            _STRING, "response before the stop string, without special tokens or thinking; may be empty"
        ),
        "finish_reason": Column(
            _STRING,
            "why the response ended: `eos`, the policy ended its turn; `stop`, a stop string appeared; `length`, no "
            f"room was left; `{PROMPT_TOO_LONG}`, the prompt left no room for a response; `{IMPORTED}`, unknown, as it "
            "comes from `sampling.paths`",
        ),
        "prompt_tokens": Column(
            pl.Int32(), "number of tokens of the whole prompt, including the template; null if imported", nullable=True
        ),
        "response_tokens": Column(
            pl.Int32(),
            "number of tokens sampled, including thinking and the end of turn; null if imported",
            nullable=True,
        ),
    },
    "sampling.paths reads the response files of the authors' release",
)

ANSWERS = Table(
    "answers",
    "evaluation/{initial_,}answers.parquet",
    "One prompt per row that was not used in training, with a policy's answer, ordered by prompt_id.",
    ("prompt_id",),
    {
        **RESPONSES.columns,
        "kl": Column(
            _REAL,
            "log probability of the tokens minus their log probability under the initial policy, at RL's temperature; "
            "0 for the initial policy itself",
        ),
    },
    "sampling.paths reads responses",
)

SCORES = Table(
    "scores of answers",
    "evaluation/{initial_,}scores.parquet",
    "One answer per row, scored by one reward model under a single principle.",
    ("reward_model", "dimension", "opposite", "prompt_id"),
    {
        "reward_model": Column(_STRING, "name of the first run that has this reward model"),
        "dimension": Column(_STRING, "name of the principle; ` (RL)` after it: in the wording of `ppo.principles`"),
        "opposite": Column(_BOOL, "whether the principle is negated, that is, its negative definition is shown"),
        "prompt_id": _PROMPT["prompt_id"],
        "score": Column(_REAL, "reward of the answer"),
    },
    "`snakemake evaluation` makes this table, and no key reads one",
)

VERDICTS = Table(
    "verdicts",
    "evaluation/verdicts.parquet",
    "One comparison per row: a policy's answer against its initial policy's, in one order, judged by a model behind an "
    "endpoint.",
    ("kind", "prompt_id", "policy_first"),
    {
        "kind": Column(_STRING, "`prompts`: an answer to evaluation.prompts; `mt_bench`: a dialogue of MT-Bench"),
        "prompt_id": Column(_STRING, "as in the answers; for a dialogue, its question_id"),
        "policy_first": Column(_BOOL, "whether the policy's answer was shown before the initial policy's"),
        "preferred": Column(_STRING, "`policy`, `initial` or `tie`; null if there is no verdict", nullable=True),
        "reason": Column(
            _STRING,
            "why a verdict is missing: `unreadable` if the judge's answer does not contain one; `content_filter` or "
            "another of the endpoint's codes if it refused the request; null if there is a verdict",
            nullable=True,
        ),
    },
    "`snakemake evaluation` makes this table, and no key reads one",
)

JUDGEMENTS = Table(
    "judgements",
    "preferences/preferences.parquet",
    "One pair of responses per row under one principle, ordered by prompt_id and then by the order of the principles. "
    "Output 1 is response0, output 2 is response1.",
    ("prompt_id", "dimension"),
    {
        "prompt_id": _PROMPT["prompt_id"],
        "dimension": Column(_STRING, "name of the principle"),
        "s12": Column(_REAL, "logit(a) - logit(b) with output 1 as (a): positive if output 1 is preferred"),
        "s21": Column(_REAL, "logit(b) - logit(a) with output 2 as (a): positive if output 1 is preferred"),
    },
    "judge.path reads the preference files of the authors' release",
)

RECORD_TEXTS = ("instruction", "input", "output_1", "output_2")
"""Columns of preference records that hold texts from the data."""
_RECORD = {
    "record_id": Column(_STRING, "id of the record"),
    "prompt_id": Column(_STRING, "id of the prompt; several records may have the same prompt"),
    "source": _PROMPT["source"],
    "instruction": _PROMPT["instruction"],
    "input": _PROMPT["input"],
    "output_1": Column(_STRING, "one of the two outputs, in random order"),
    "output_2": Column(_STRING, "the other output"),
    "preference": Column(pl.Int8(), "which output is better, 1 or 2"),
    "dimensions": Column(pl.List(_STRING), "names of the principles shown; empty if none is"),
    "negated": Column(pl.List(_BOOL), "for each principle shown, whether it is shown negated"),
    "definitions": Column(
        pl.List(_STRING), "for each principle shown, the text shown: its negative definition if it is negated"
    ),
    "scores": Column(
        pl.List(_REAL),
        "for each principle shown, its score, negated if the principle is; a score above 0 favours output_1",
    ),
    "deciding": Column(
        _STRING, "name of the principle that decided; null if a rule, the sum of all or a person did", nullable=True
    ),
    "rule": Column(_STRING, "the rule that decided, `refusal` or `language`; null if none did", nullable=True),
    "flipped": Column(_BOOL, "whether label noise reversed the preference"),
    "swapped": Column(_BOOL, "whether output_1 is response1; null if imported", nullable=True),
    "instruction_language": Column(
        _STRING,
        "language of instruction and input (ISO 639); null if unknown, or if the language rule is off",
        nullable=True,
    ),
    "output_1_language": Column(_STRING, "language of output_1 (ISO 639); null as above", nullable=True),
    "output_2_language": Column(_STRING, "language of output_2 (ISO 639); null as above", nullable=True),
}


_READ_RECORDS = "aggregation.path reads records of the authors' release"
_READ_PAIRS = "pmp_data.sources reads data sets and files of pairs"


def _records(name: str, files: str, meaning: str, columns: Sequence[str], reader: str, **more: str) -> Table:
    """A table of preference records; `more` has the meanings of columns that are special to it."""
    own = {column: replace(_RECORD[column], meaning=more.get(column, _RECORD[column].meaning)) for column in columns}
    return Table(name, files, meaning, ("record_id",), own, reader)


PREFERENCE_RECORDS = _records(
    "preference records",
    "reward_data/*.parquet",
    "A view, not a separate file: the columns of the next two tables that the training of a reward model reads.",
    ("record_id", "prompt_id", *RECORD_TEXTS, "preference", "definitions", "dimensions", "negated", "deciding"),
    f"{_READ_RECORDS}, and {_READ_PAIRS}",
)
PMP_RECORDS = _records(
    "PMP records",
    "reward_data/pmp.parquet",
    "One pair of answers per row, of which a person preferred one, in random order; no principle is shown.",
    (
        "record_id",
        "prompt_id",
        "source",
        *RECORD_TEXTS,
        "preference",
        "definitions",
        "dimensions",
        "negated",
        "deciding",
    ),
    _READ_PAIRS,
    record_id="hash of source, query and outputs",
    prompt_id="hash of source and beginning of the dialogue, which several records may share",
    instruction="the query: a post, or a dialogue up to the answer",
    input="always empty",
    preference="which output the person preferred, 1 or 2",
    definitions="always empty",
    dimensions="always empty",
    negated="always empty",
    deciding="always null: a person decided",
)
EVALUATION_PAIRS = replace(
    PMP_RECORDS,
    name="evaluation pairs",
    files="evaluation/pairs.parquet",
    meaning="One pair of answers per row, of which a person preferred one, to test reward models on; like PMP records.",
    columns={
        **PMP_RECORDS.columns,
        "subset": Column(_STRING, "part of the source, if it has parts, as RewardBench does; else null", True),
    },
    reader="`snakemake evaluation` makes this table, and no key reads one",
)
PRINCIPLE_RECORDS = _records(
    "principle records",
    "reward_data/principle_preferences.parquet",
    "One pair of responses per row with the principles drawn for it, ordered by prompt_id and pass.",
    (
        *("record_id", "prompt_id", *RECORD_TEXTS, "preference", "dimensions", "negated", "definitions", "scores"),
        *("deciding", "rule", "flipped", "swapped", "instruction_language", "output_1_language", "output_2_language"),
    ),
    _READ_RECORDS,
    record_id="prompt_id and number of the pass, as in `PROMPT_ID-0`",
    preference="which output is better, 1 or 2, after rules and label noise",
    deciding="name of the principle that decided; null if a rule or the sum of all did",
)

TABLES = (
    SFT_EXAMPLES,
    PROMPTS,
    RL_PROMPTS,
    RESPONSES,
    ANSWERS,
    SCORES,
    VERDICTS,
    JUDGEMENTS,
    PREFERENCE_RECORDS,
    PMP_RECORDS,
    PRINCIPLE_RECORDS,
    EVALUATION_PAIRS,
)


MEND = "correct it, or move it away and build it again"
"""Advice about a damaged file that may be the user's own."""
# How files of other formats begin.
_BEGINNINGS = {b"{": "JSON", b"[": "JSON", b"\x1f\x8b": "packed with gzip", b"PK": "a zip archive", b"\x80": "a pickle"}


def _rebuild(error: BaseException) -> str:
    """Advice about a file that cannot be read."""
    missing = isinstance(error, FileNotFoundError)
    return "build it first, or correct its name" if missing else "copy it again, or move it away and build it again"


def _check_format(path: Path, table: Table) -> None:
    """Refuse a file that is not Parquet.

    Raises:
        UserError: with the format found, the table expected, and the key of the configuration that reads it.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        start = stream.read(4)
    if start != b"PAR1":
        found = next(
            (what for begin, what in _BEGINNINGS.items() if start.lstrip().startswith(begin)), "something else"
        )
        raise UserError(
            f"{path} cannot be read: it is {found if start else 'empty'}, but a table of {table.name} in Parquet is "
            f"expected ({table.files}); name the right file. {table.reader}"
        )


def reading_table(where: object) -> AbstractContextManager[None]:
    """Turn what is raised in this block into an error about this table; see `border.reading`."""
    return reading(where, _rebuild)


def read(path: Path, table: Table, columns: Sequence[str] | None = None) -> pl.LazyFrame:
    """Open a Parquet file of the workflow and check that it is complete and has the required columns and types.

    Args:
        path: path of the file.
        table: the table that it should be.
        columns: columns to read; None for all. Further columns are ignored.

    Raises:
        UserError: naming the file and the columns that are missing or have a different type.
    """
    _check_format(path, table)
    wanted = table.select(*(columns or table.columns))
    schema = schema_of(path)
    wrong = [f"{name} ({kind}, found {schema.get(name)})" for name, kind in wanted.items() if schema.get(name) != kind]
    if wrong:
        raise UserError(
            f"{path} lacks columns: {', '.join(wrong)}, which a table of {table.name} needs; name the right file. "
            f"{table.reader}"
        )
    # A file's column statistics are not used, because wrong ones could hide rows and damage.
    return pl.scan_parquet(path, glob=False, use_statistics=False).select(list(wanted))


def schema_of(path: Path) -> pl.Schema:
    """The columns of a Parquet file.

    Raises:
        UserError: if it cannot be read.
    """
    with reading_table(path):
        return pl.scan_parquet(path, glob=False).collect_schema()


def number_of_rows(path: Path) -> int:
    """Number of rows of a Parquet file, from its metadata.

    Raises:
        UserError: if it cannot be read.
    """
    with reading_table(path):
        rows: int = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
    return rows


def check_written(path: Path, table: Table) -> None:
    """Refuse an output that is not the table it should be: a column is missing, has another type, or has nulls.

    Raises:
        RuntimeError: naming the columns. This is a bug in the program, which polars hides by filling in nulls.
    """
    schema = schema_of(path)
    if dict(schema) != table.schema:
        raise RuntimeError(f"a table of {table.name} was written with the columns {dict(schema)}, not {table.schema}")
    whole = [name for name, column in table.columns.items() if not column.nullable]
    nulls = pl.scan_parquet(path).select(pl.col(whole).null_count()).collect(engine="streaming")
    if wrong := [name for name in whole if nulls[name].item()]:
        raise RuntimeError(f"a table of {table.name} was written with nulls in {', '.join(wrong)}")


def check_rows(rows: pl.LazyFrame, table: Table, where: object) -> None:
    """Read all rows once and refuse nulls where none may be, numbers that are not finite, and repeated keys.

    Args:
        rows: some or all columns of the table, including its key.
        table: the table that the rows belong to.
        where: the file, for messages.

    Raises:
        UserError: naming the file, the columns and the first such row.
    """
    key = list(table.key)
    names = rows.collect_schema().names()
    flaws = {
        ("nulls", name): _holds(name, table, pl.Expr.is_null) for name in names if not table.columns[name].nullable
    }
    too_large = f"numbers that are not finite, or larger than {LARGEST:.0e},"
    numbers = [name for name in names if _element(table, name).is_float()]
    flaws |= {(too_large, name): _holds(name, table, _no_number) for name in numbers}
    with reading_table(where):
        # Every column is read to its end, so that damage shows here and not later.
        every = pl.all().null_count().name.suffix(" ")
        counts = rows.select(every, *(flaw.sum().alias(" ".join(at)) for at, flaw in flaws.items()))
        found = counts.collect(engine="streaming").row(0, named=True)
        if wrong := [at for at in flaws if found[" ".join(at)]]:
            what = wrong[0][0]
            here = [at for at in wrong if at[0] == what]
            row = rows.filter(pl.any_horizontal(flaws[at] for at in here)).head(1).select(key).collect()
            named = ", ".join(f"{column} {row[column][0]}" for column in key)
            raise UserError(
                f"{where} has {what} in {', '.join(name for _, name in here)}, first in the row of {named}; {MEND}"
            )
        doubled = rows.group_by(key).len().filter(pl.col("len") > 1).sort(key).head(1).collect(engine="streaming")
    if doubled.height:
        named = ", ".join(f"{column} {doubled[column][0]}" for column in key)
        raise UserError(f"{where} has {doubled['len'][0]} rows of {named}; {MEND}")


def _element(table: Table, name: str) -> pl.DataType:
    """Type of a column, or of the elements of its lists."""
    kind = table.columns[name].type
    return kind.inner if isinstance(kind, pl.List) else kind  # type: ignore[return-value]


def _holds(name: str, table: Table, flaw: Callable[[pl.Expr], pl.Expr]) -> pl.Expr:
    """Whether a column or its lists have a flaw."""
    column = pl.col(name)
    if isinstance(table.columns[name].type, pl.List):
        inside = column.list.eval(flaw(pl.element())).list.any().fill_null(False)
        return column.is_null() | inside if flaw is pl.Expr.is_null else inside
    return flaw(column).fill_null(False)


def _no_number(value: pl.Expr) -> pl.Expr:
    """Whether a number is unusable: not finite, or too large."""
    return ~(value.is_finite() & (value.abs() <= LARGEST))
