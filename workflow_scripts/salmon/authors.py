"""The tables that the authors' release writes, to ours: responses, judgements, records of the reward model.

    response files     JSON lines: instruction, input, output: {generation}; one file for each of the two responses
    preference file    JSON lines: example_idx, dimension, relative_score [s12, s21], prompt_preference
    records            a JSON list: texts, preference, and as text of Python tuples dimensions, scores and negations

A judgement names its pair by a number. It counts pairs as the release orders them: both files sorted by instruction,
pairs with a response of fewer than 16 characters left out, the rest shuffled by Python's generator of seed 42. So the
two response files are needed to read a preference file. Which of them was output 1 of the judging is not written
anywhere: whoever names the files says it by their order. (In the release, a file listing decides: docs/defects.md, 1.)

Rows that do not fit each other are refused with their places, and what is left out is counted. Texts stay as they are
but for white space around them, and of responses with judgements what the release's judge did not read: it reads a
response up to its first "###".
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
"""Name of the source of such rows."""
JUDGED_UP_TO = "###"
"""Where a response ends for the judge of the release, wherever that stands."""
SHORTEST, SHUFFLE_SEED = 16, 42  # characters of a response that the release judges, and the seed of its order of pairs
_NUMPY = re.compile(r"np\.\w+\(([^()]*)\)")  # how tuples of numpy's numbers are written since its version 2


class Generation(TypedDict):
    """What the policy has said."""

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
    """A response and its prompt, without white space around their texts."""

    place: str
    instruction: str
    input: str
    text: str
    prompt_id: str
    sort_key: str  # the instruction as it is written, by which the release sorts
    characters: int  # of the response as it is written


@dataclass(frozen=True)
class Pairs:
    """The two response files, row by row of the same prompts.

    Attributes:
        first: response0, as the release sorts it.
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
        UserError: where it is another file; it says what is expected.
    """
    if not is_local(path) or Path(path).expanduser().is_dir():
        raise UserError(f"{key}: {path} has to be a local file: {what}")
    advice = f"{key} reads {what}; name such a file, or fetch it again if it was cut off"
    yield from read_source(Source(format="authors", path=path), schema, counts, advice)


def read_responses(path: str, key: str) -> list[Response]:
    """The responses of one file, in its order."""
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
        key: of the configuration, for messages.

    Raises:
        UserError: where the files are not of the same prompts; it names a row of each.
    """
    # As the release does: sorted by the instruction alone, equal ones in the order of their file.
    first, second = (sorted(read_responses(path, key), key=lambda each: each.sort_key) for path in paths)
    if len(first) != len(second):
        raise UserError(
            f"{key}: {paths[0]} has {len(first)} rows and {paths[1]} {len(second)}: they are not of the same prompts, "
            "or one is cut off; name two whole response files of one run"
        )
    for one, other in zip(first, second, strict=True):
        if one.prompt_id != other.prompt_id:
            raise UserError(
                f"{key}: {paths[0]} and {paths[1]} are not of the same prompts: sorted by instruction, {one.place} "
                f"meets {other.place}, and they differ; name two response files of one run"
            )
    return Pairs(first, second, (paths[0], paths[1]))


def responses(pairs: Pairs, index: int, cut_at: str | None = None) -> tuple[pl.DataFrame, dict[str, int]]:
    """The table `RESPONSES` of one of the two; of doubled prompts the first pair, as the files have it.

    Args:
        pairs: of both files.
        index: 0 or 1.
        cut_at: where a response ends; None for the whole response.

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

    Pairs that were not judged under all principles of the file (the last batch of each process was never written) are
    left out, and so are judgements of a doubled prompt but the first.

    Returns:
        The table, and counts of pairs: `too_short`, `not_judged`, `incomplete`, `duplicate` and `judged` add up to
        `pairs`; and of judgements: those `read`, and `rows` of the table.

    Raises:
        UserError: where the file is not about these pairs, or judges one twice in two ways.
    """
    what = 'JSON lines of {"example_idx", "dimension", "relative_score": [s12, s21]}, as the authors\' release judges'
    order, names = pairs.judged(), [principle.dimension for principle in principles]
    scores: dict[int, dict[str, tuple[float, float]]] = {}
    counts: Counter[str] = Counter()
    for place, row in _rows(path, PreferenceRow, what, key, counts):
        number, name = row["example_idx"], row["dimension"]
        if len(row["relative_score"]) != 2:
            raise UserError(
                f"{key}: {place}: relative_score has {len(row['relative_score'])} numbers, and 2 are expected"
            )
        s12, s21 = row["relative_score"]
        if not 0 <= number < len(order):
            raise UserError(
                f"{key}: {place}: example_idx is {number}, but {pairs.paths[0]} and {pairs.paths[1]} have {len(order)} "
                f"pairs of responses of {SHORTEST} characters or more: they are not the responses that were judged"
            )
        if name not in names:
            raise UserError(
                f"{key}: {place}: dimension {name!r} is not in judge.principles, which defines {', '.join(names)}; "
                "name the file of principles that was judged with"
            )
        if (row.get("prompt_preference") or _verdict(s12, s21)) != _verdict(s12, s21):
            raise UserError(f"{key}: {place}: prompt_preference is not what relative_score says; fetch the file again")
        if scores.setdefault(number, {}).setdefault(name, (s12, s21)) != (s12, s21):
            raise UserError(
                f"{key}: {place}: pair {number} was judged under {name!r} before, with other scores: the file holds "
                "several runs, which the release appends; take out all but one"
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
    """Which output both orders prefer, 0 for none."""
    return 1 if s12 > 0 and s21 > 0 else 2 if s12 < 0 and s21 < 0 else 0


def records(path: str, principles: Sequence[JudgedPrinciple], key: str) -> tuple[pl.DataFrame, dict[str, int]]:
    """The table `PRINCIPLE_RECORDS` of the release's records.

    They name principles, whose texts are those of `principles`. Records of a prompt are numbered as they come.

    Returns:
        The table, and counts: `records` are all that were `read`.

    Raises:
        UserError: where a record contradicts itself or names other principles.
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
            raise UserError(f"{where}: dimensions, scores, negations and languages do not fit each other")
        if unknown := [name for name in names if name not in by_name]:
            raise UserError(
                f"{where}: dimension {unknown[0]!r} is not in judge.principles, which defines {', '.join(by_name)}; "
                "name the file of principles that the records were made with"
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
                # Where a rule decided and all languages are the same, it was not the rule of the languages.
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
    # The number of a prompt's record, not its text: 10 comes after 9.
    number = pl.col("record_id").str.extract(r"(\d+)$").cast(pl.Int64)
    return table.sort("prompt_id", number), {"read": counts["rows"], "records": table.height}


def _tuple(text: str, kind: type, where: str, column: str) -> list[Any]:
    """The parts of a Python tuple that is written as text; nothing of it is evaluated."""
    try:
        parts = ast.literal_eval(_NUMPY.sub(r"\1", text) if kind is float else text)
        found = [kind(part) for part in parts if isinstance(part, str if kind is str else int | float)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        parts, found = (), []
    if not isinstance(parts, tuple) or not found or len(found) != len(parts):
        raise UserError(f"{where}: column {column} is not the text of a Python tuple; fetch the file again")
    return found
