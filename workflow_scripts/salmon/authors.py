"""Converts tables of the authors' release to ours: responses, judgements, records of the reward model.

    response files     JSON lines: instruction, input, output: {generation}; one file for each of the two responses
    preference file    JSON lines: example_idx, dimension, relative_score [s12, s21], prompt_preference
    records            a JSON list: texts, preference, and as text of Python tuples dimensions, scores and negations

A judgement refers to its pair by a number. The numbers follow the release's order of pairs: both files sorted by
instruction, pairs with a response of fewer than 16 characters left out, the rest shuffled by Python's generator with
seed 42. Reading a preference file therefore requires the two response files. No file records which of them was output 1
of the judging; the order in which they are named says it. (In the release, a file listing decides: docs/defects.md, 1.)

Rows that do not match are refused with their positions, and omitted rows are counted. Texts stay unchanged except for
surrounding white space. Responses with judgements are also cut at their first "###", because the release's judge read
no further.
"""

import ast
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired

import polars as pl
from typing_extensions import TypedDict

from salmon.border import Number
from salmon.config import Source, is_local
from salmon.errors import UserError
from salmon.formats import Located
from salmon.principles import JudgedPrinciple
from salmon.randomness import digest
from salmon.sources import read_source
from salmon.tables import IMPORTED, JUDGEMENTS, PRINCIPLE_RECORDS, RESPONSES
from salmon.text import cut_at_markers

SOURCE = "authors"
"""Name of the source of these rows."""
JUDGED_UP_TO = "###"
"""The text at which the release's judge stops reading a response, at any position."""
SHORTEST, SHUFFLE_SEED = 16, 42  # characters a judged response needs in the release; seed of its order of pairs
_NUMPY = re.compile(r"np\.\w+\(([^()]*)\)")  # form of numpy's numbers in a tuple's text since numpy 2


class Generation(TypedDict):
    """The policy's answer."""

    generation: str


class ResponseRow(TypedDict):
    """A line of a response file."""

    instruction: str
    input: NotRequired[str | None]
    output: Generation


class PreferenceRow(TypedDict):
    """A line of a preference file."""

    example_idx: int
    dimension: str
    relative_score: list[Number]
    prompt_preference: NotRequired[Literal[0, 1, 2] | None]


class RecordRow(TypedDict):
    """A record of the reward model."""

    instruction: str
    input: NotRequired[str | None]
    output_1: str
    output_2: str
    preference: Literal[1, 2]
    dimensions: str
    dimension_scores: str
    negative_definitions: str
    doinate_dimension_idx: int
    flip: bool
    rule_flag: bool
    lang: list[str]


class Response(NamedTuple):
    """A response and its prompt, without surrounding white space."""

    place: str
    instruction: str
    input: str
    text: str
    prompt_id: str
    sort_key: str  # the unchanged instruction, by which the release sorts
    characters: int  # length of the unchanged response


@dataclass(frozen=True)
class Pairs:
    """The two response files, with the same prompt in each row.

    Attributes:
        first: response0, in the release's order.
        second: response1, in the same order.
        paths: the files.
    """

    first: list[Response]
    second: list[Response]
    paths: tuple[str, str]

    def judged(self) -> list[int]:
        """Position of the pair that each `example_idx` stands for."""
        pairs = zip(self.first, self.second, strict=True)
        kept = [at for at, both in enumerate(pairs) if min(each.characters for each in both) >= SHORTEST]
        random.Random(SHUFFLE_SEED).shuffle(kept)  # noqa: S311 (the release's own order)
        return kept


def _rows(path: str, schema: Any, what: str, key: str, counts: Counter[str]) -> Iterator[Located]:
    """Rows of one of the authors' files.

    Raises:
        UserError: if it is a different kind of file, with the expected content.
    """
    if not is_local(path) or Path(path).expanduser().is_dir():
        raise UserError(f"{key}: {path} must be a local file: {what}")
    advice = f"{key} reads {what}; name such a file, or fetch it again if it was cut off"
    yield from read_source(Source(format="authors", path=path), schema, counts, advice)


def read_responses(path: str, key: str) -> list[Response]:
    """The responses of one file, in file order."""
    what = 'JSON lines of {"instruction", "input", "output": {"generation"}}, as the authors\' release writes responses'
    found = []
    for place, row in _rows(path, ResponseRow, what, key, Counter()):
        instruction, extra = row["instruction"].strip(), (row.get("input") or "").strip()
        text = row["output"]["generation"]
        prompt_id = digest(SOURCE, instruction, extra)
        found.append(Response(place, instruction, extra, text.strip(), prompt_id, row["instruction"], len(text)))
    return found


def read_pairs(paths: Sequence[str], key: str) -> Pairs:
    """Both responses of every prompt.

    Args:
        paths: of response0 and response1, in this order: the first is output 1 of the judging.
        key: the configuration key, for messages.

    Raises:
        UserError: if the prompts of the two files differ; it names a row of each file.
    """
    # As in the release: sorted by instruction alone, equal instructions in file order.
    first, second = (sorted(read_responses(path, key), key=lambda each: each.sort_key) for path in paths)
    if len(first) != len(second):
        raise UserError(
            f"{key}: {paths[0]} has {len(first)} rows and {paths[1]} {len(second)}: their prompts differ, or one file "
            "is cut off; name two complete response files of the same run"
        )
    for one, other in zip(first, second, strict=True):
        if one.prompt_id != other.prompt_id:
            raise UserError(
                f"{key}: the prompts of {paths[0]} and {paths[1]} differ: sorted by instruction, {one.place} is paired "
                f"with {other.place}, and they differ; name two response files of the same run"
            )
    return Pairs(first, second, (paths[0], paths[1]))


def responses(pairs: Pairs, index: int, cut_at: str | None = None) -> tuple[pl.DataFrame, dict[str, int]]:
    """The table `RESPONSES` of one of the two files. Of duplicate prompts, only the first pair is kept.

    Args:
        pairs: the pairs of both files.
        index: 0 or 1.
        cut_at: text at which a response ends; None for the whole response.

    Returns:
        The table, and counts: `rows` of the table and `duplicate` prompts add up to `read`.
    """
    rows = (pairs.first, pairs.second)[index]
    kept = {row.prompt_id: row for row in reversed(rows)}
    table = pl.DataFrame(
        [
            (key, SOURCE, row.instruction, row.input, _cut(row.text, cut_at), IMPORTED, None, None)
            for key, row in sorted(kept.items())
        ],
        schema=RESPONSES.schema,
        orient="row",
    )
    return table, {"read": len(rows), "duplicate": len(rows) - len(kept), "rows": len(kept)}


def _cut(text: str, marker: str | None) -> str:
    return cut_at_markers(text, [marker]).strip() if marker else text


def judgements(
    path: str, pairs: Pairs, principles: Sequence[JudgedPrinciple], key: str
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The table `JUDGEMENTS` of a preference file.

    Pairs that were not judged under all principles of the file are left out (the last batch of each process was never
    written). Of a duplicate prompt, only the first pair's judgements are kept.

    Returns:
        The table, and counts of pairs: `too_short`, `not_judged`, `incomplete`, `duplicate` and `judged` add up to
        `pairs`; and of judgements: those `read`, and `rows` of the table.

    Raises:
        UserError: if the file is about other pairs, or has two different judgements of the same pair.
    """
    what = 'JSON lines of {"example_idx", "dimension", "relative_score": [s12, s21]}, as the authors\' release judges'
    order, names = pairs.judged(), [principle.dimension for principle in principles]
    scores: dict[int, dict[str, tuple[float, float]]] = {}
    counts: Counter[str] = Counter()
    for place, row in _rows(path, PreferenceRow, what, key, counts):
        number, name = row["example_idx"], row["dimension"]
        if len(row["relative_score"]) != 2:
            raise UserError(f"{key}: {place}: relative_score has {len(row['relative_score'])} numbers instead of 2")
        s12, s21 = row["relative_score"]
        if not 0 <= number < len(order):
            raise UserError(
                f"{key}: {place}: example_idx is {number}, but {pairs.paths[0]} and {pairs.paths[1]} have {len(order)} "
                f"pairs of responses with {SHORTEST} characters or more: other responses were judged"
            )
        if name not in names:
            raise UserError(
                f"{key}: {place}: dimension {name!r} is not in judge.principles, which defines {', '.join(names)}; "
                "name the principle file that the judging used"
            )
        if (row.get("prompt_preference") or _verdict(s12, s21)) != _verdict(s12, s21):
            raise UserError(f"{key}: {place}: prompt_preference contradicts relative_score; fetch the file again")
        if scores.setdefault(number, {}).setdefault(name, (s12, s21)) != (s12, s21):
            raise UserError(
                f"{key}: {place}: pair {number} has two different judgements under {name!r}: the file holds several "
                "runs, because the release appends; keep only one of them"
            )
    judged_with = [name for name in names if any(name in found for found in scores.values())]
    complete = {number: found for number, found in scores.items() if len(found) == len(judged_with)}
    firsts: dict[str, int] = {}
    for at, row in enumerate(pairs.first):
        firsts.setdefault(row.prompt_id, at)
    kept = {
        pairs.first[order[number]].prompt_id: found
        for number, found in complete.items()
        if firsts[pairs.first[order[number]].prompt_id] == order[number]
    }
    table = pl.DataFrame(
        [(prompt_id, name, *kept[prompt_id][name]) for prompt_id in sorted(kept) for name in judged_with],
        schema=JUDGEMENTS.schema,
        orient="row",
    )
    return table, {
        "pairs": len(pairs.first),
        "too_short": len(pairs.first) - len(order),
        "not_judged": len(order) - len(scores),
        "incomplete": len(scores) - len(complete),
        "duplicate": len(complete) - len(kept),
        "judged": len(kept),
        "read": counts["rows"],
        "rows": table.height,
    }


def _verdict(s12: float, s21: float) -> int:
    """The output that both orders prefer; 0 for neither."""
    return 1 if s12 > 0 and s21 > 0 else 2 if s12 < 0 and s21 < 0 else 0


def records(path: str, principles: Sequence[JudgedPrinciple], key: str) -> tuple[pl.DataFrame, dict[str, int]]:
    """The table `PRINCIPLE_RECORDS` of the release's records.

    They name principles; `principles` has the texts. Records of a prompt are numbered in file order.

    Returns:
        The table, and counts: `records` equals `read`.

    Raises:
        UserError: if a record contradicts itself or names other principles.
    """
    what = "a JSON list of records with dimensions, dimension_scores and preference, as the authors' release aggregates"
    by_name = {principle.dimension: principle for principle in principles}
    counts: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    found = []
    for place, row in _rows(path, RecordRow, what, key, counts):
        where = f"{key}: {place}"
        names = _tuple(row["dimensions"], str, where, "dimensions")
        scores = _tuple(row["dimension_scores"], float, where, "dimension_scores")
        negated = _tuple(row["negative_definitions"], float, where, "negative_definitions")
        deciding = row["doinate_dimension_idx"]
        fits = len(names) == len(scores) == len(negated) and 0 <= deciding < len(names) and len(row["lang"]) == 3
        if not fits or not set(negated) <= {0, 1}:
            raise UserError(f"{where}: dimensions, scores, negations and languages do not match")
        if unknown := [name for name in names if name not in by_name]:
            raise UserError(
                f"{where}: dimension {unknown[0]!r} is not in judge.principles, which defines {', '.join(by_name)}; "
                "name the principle file that the records were made with"
            )
        instruction, extra = row["instruction"].strip(), (row.get("input") or "").strip()
        prompt_id = digest(SOURCE, instruction, extra)
        shown = [by_name[name] for name in names]
        found.append(
            {
                "record_id": f"{prompt_id}-{numbers[prompt_id]}",
                "prompt_id": prompt_id,
                "instruction": instruction,
                "input": extra,
                "output_1": row["output_1"],
                "output_2": row["output_2"],
                "preference": row["preference"],
                "dimensions": names,
                "negated": [bool(each) for each in negated],
                "definitions": [
                    each.negative_definition if turned else each.definition
                    for each, turned in zip(shown, negated, strict=True)
                ],
                "scores": scores,
                "deciding": None if row["rule_flag"] else names[deciding],
                # If a rule decided and all languages are equal, it was not the language rule.
                "rule": None if not row["rule_flag"] else "language" if len(set(row["lang"])) > 1 else "refusal",
                "flipped": row["flip"],
                "swapped": None,
                **dict(
                    zip(("instruction_language", "output_1_language", "output_2_language"), row["lang"], strict=True)
                ),
            }
        )
        numbers[prompt_id] += 1
    table = pl.DataFrame(found, schema=PRINCIPLE_RECORDS.schema, orient="row")
    # Sort by the record's number, not by its text: 10 comes after 9.
    number = pl.col("record_id").str.extract(r"(\d+)$").cast(pl.Int64)
    return table.sort("prompt_id", number), {"read": counts["rows"], "records": table.height}


def _tuple(text: str, kind: type, where: str, column: str) -> list[Any]:
    """The parts of a Python tuple written as text. Nothing is evaluated."""
    try:
        parts = ast.literal_eval(_NUMPY.sub(r"\1", text) if kind is float else text)
        found = [kind(part) for part in parts if isinstance(part, str if kind is str else int | float)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        parts, found = (), []
    if not isinstance(parts, tuple) or not found or len(found) != len(parts):
        raise UserError(f"{where}: column {column} is not the text of a Python tuple; fetch the file again")
    return found
