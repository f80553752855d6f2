"""Judgements of single principles to reward-model records (paper section 3.2; reference step 2).

What is decided depends on numbers and a few traits of the texts; the texts themselves are only looked at and
joined, streamed by polars. Kept in memory, per pair: one number per principle, the traits and the drawn records.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from salmon import checked, language, randomness, tables
from salmon.border import LARGEST
from salmon.config import Aggregation
from salmon.errors import UserError
from salmon.principles import JudgedPrinciple
from salmon.tables import JUDGEMENTS, PRINCIPLE_RECORDS, RECORD_TEXTS, RESPONSES
from salmon.text import cut_at_markers

log = logging.getLogger(__name__)

_ANSWERS = ("response0", "response1")
DRAWN = {name: kind for name, kind in PRINCIPLE_RECORDS.schema.items() if name not in RECORD_TEXTS}
"""The columns that are drawn: all but the texts."""


@dataclass(frozen=True)
class Traits:
    """What the rules look at in a pair, response0 first."""

    refuses: tuple[bool, bool]
    instruction_language: str | None
    languages: tuple[str | None, str | None]


@dataclass(frozen=True)
class Drawn:
    """A record but for its texts: the columns of `DRAWN`."""

    record_id: str
    prompt_id: str
    preference: int
    dimensions: list[str]
    negated: list[bool]
    definitions: list[str]
    scores: list[float]
    deciding: str | None
    rule: str | None
    flipped: bool
    swapped: bool
    instruction_language: str | None
    output_1_language: str | None
    output_2_language: str | None


def scaled_scores(s12: npt.NDArray[np.float64], s21: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scores of one principle over all pairs, on a scale that principles share (reference step 2).

    m_i = (s12_i + s21_i) / 2, and score_i = m_i / Var(m) where both orders agree, that is s12_i * s21_i > 0, else 0.
    Var(m) is the population variance over all pairs, those included whose score becomes 0.

    Args:
        s12: logit(a) - logit(b) with output 1 as (a), shape [pairs].
        s21: logit(b) - logit(a) with output 2 as (a), shape [pairs].

    Returns:
        Scores, shape [pairs]; above 0 they favour output 1.

    Raises:
        ValueError: if all means are equal, which leaves no scale.
    """
    mean = (s12 + s21) / 2
    if mean.size == 0 or mean.min() == mean.max():
        raise ValueError("no variance")
    agree = ((s12 > 0) & (s21 > 0)) | ((s12 < 0) & (s21 < 0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled: npt.NDArray[np.float64] = np.where(agree, mean / mean.var(), 0.0)
    if not np.isfinite(scaled).all():  # means so near to each other that their variance is rounded to nothing
        raise ValueError("no variance")
    return scaled


def count_probabilities(p: float, largest: int) -> npt.NDArray[np.float64]:
    """Probabilities of showing 1 ... `largest` principles: Geometric(p), redrawn while larger."""
    weights = (1 - p) ** np.arange(largest)
    probabilities: npt.NDArray[np.float64] = weights / weights.sum()
    return probabilities


def draw_record(
    prompt_id: str,
    number: int,
    scores: Sequence[float],
    traits: Traits,
    *,
    principles: Sequence[JudgedPrinciple],
    settings: Aggregation,
) -> Drawn | str:
    """Draw the record of one pair in one pass.

    The draws come from a generator of (seed, pass, prompt_id) and are always the same many in the same order:
    number of principles, principles, negations, refusal rule, label noise, order of outputs. So no setting of
    a rule changes what else is drawn.

    Args:
        prompt_id: key of the pair.
        number: of the pass, from 0.
        scores: of the pair, in the order of `principles`; above 0 they favour response0.
        traits: what the rules look at.
        principles: those that may be shown.
        settings: probabilities and rules.

    Returns:
        The record without its texts, or the reason for there being none: `no_preference` or `language`.
    """
    rng = randomness.rng("aggregation", settings.seed, number, prompt_id)
    largest = min(settings.max_principles, len(principles))
    count = 1 + rng.choice(largest, p=count_probabilities(settings.geometric_p, largest))
    chosen = rng.choice(len(principles), size=count, replace=False)
    negated = rng.random(count) < settings.negation_probability
    refusal_draw, noise_draw, order_draw = rng.random(3)

    shown = [-scores[index] if turned else scores[index] for index, turned in zip(chosen, negated, strict=True)]
    dominant = int(np.argmax(np.abs(shown)))
    value = shown[dominant] if settings.decision == "dominant" else float(np.sum(shown))
    if value == 0:
        return "no_preference"
    winner, rule = (0 if value > 0 else 1), None

    if traits.refuses[0] != traits.refuses[1] and refusal_draw < settings.refusal_probability:
        winner, rule = traits.refuses.index(False), "refusal"
    if settings.language_rule:
        wanted = traits.instruction_language
        # An unknown language matches every other: it is not evidence against an answer.
        matches = [wanted is None or spoken is None or spoken == wanted for spoken in traits.languages]
        if not any(matches):
            return "language"
        if not all(matches):
            winner, rule = matches.index(True), "language"

    flipped = bool(noise_draw < (settings.rule_label_noise if rule else settings.label_noise))
    swapped = bool(order_draw < 0.5)
    sign = -1.0 if swapped else 1.0
    languages = traits.languages[::-1] if swapped else traits.languages
    return Drawn(
        record_id=f"{prompt_id}-{number}",
        prompt_id=prompt_id,
        preference=1 + (winner ^ flipped ^ swapped),
        dimensions=[principles[index].dimension for index in chosen],
        negated=[bool(turned) for turned in negated],
        definitions=[
            principles[index].negative_definition if turned else principles[index].definition
            for index, turned in zip(chosen, negated, strict=True)
        ],
        scores=[sign * score + 0.0 for score in shown],  # + 0.0 makes -0.0 plain 0
        deciding=principles[chosen[dominant]].dimension if settings.decision == "dominant" and not rule else None,
        rule=rule,
        flipped=flipped,
        swapped=swapped,
        instruction_language=traits.instruction_language,
        output_1_language=languages[0],
        output_2_language=languages[1],
    )


def read_scores(path: Path, dimensions: Sequence[str]) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Read the judgements of the given principles and scale them.

    Returns:
        The judged prompt_ids, sorted, and their scores, shape [pairs, dimensions].

    Raises:
        UserError: for keys that are null or there twice, scores that are no finite numbers, pairs that were not
            judged by every principle, principles that were not judged at all or judge all pairs alike.
    """
    rows = tables.read(path, JUDGEMENTS)
    checked.check_count(path, JUDGEMENTS)
    tables.check_rows(rows.select(list(JUDGEMENTS.key)), JUDGEMENTS, path)
    with tables.reading_table(path):
        whole = rows.filter(pl.col("dimension").is_in(list(dimensions))).collect()
    sound = (pl.col("s12", "s21").is_finite() & (pl.col("s12", "s21").abs() <= LARGEST)).fill_null(False)
    broken = whole.filter(~pl.all_horizontal(sound)).head(1)
    if broken.height:
        raise UserError(
            f"{path}: prompt_id {broken['prompt_id'][0]}, {broken['dimension'][0]}: s12 {broken['s12'][0]} and s21 "
            f"{broken['s21'][0]} are not both finite, or larger than {LARGEST:.0e}; judge again (a judge in half "
            "precision may overflow)"
        )
    by_dimension = whole.partition_by("dimension", as_dict=True)
    ids: list[str] = []
    columns = []
    for position, dimension in enumerate(dimensions):
        if (dimension,) not in by_dimension:
            raise UserError(
                f"{path} has no rows of the dimension {dimension}; judge with a principle file that defines it, or "
                "take it out of aggregation.dimensions"
            )
        judged = by_dimension.pop((dimension,)).sort("prompt_id")
        here = judged["prompt_id"].to_list()
        if position and here != ids:
            key = min(set(here) ^ set(ids))
            raise UserError(
                f"{path}: prompt_id {key} was judged by one of {dimensions[0]} and {dimension}, but not by the other; "
                "delete the file and judge again"
            )
        ids = here
        try:
            columns.append(scaled_scores(judged["s12"].to_numpy(), judged["s21"].to_numpy()))
        except ValueError:
            raise UserError(
                f"{path}: dimension {dimension} has the same score for all {len(ids)} pairs, so that it cannot be "
                "scaled by its variance; judge more pairs, check the judge, or take it out of aggregation.dimensions"
            ) from None
    return ids, np.stack(columns, axis=1)


def join_responses(response0: Path, response1: Path, turn_markers: Sequence[str]) -> pl.LazyFrame:
    """Both responses of every prompt, cut at the first turn marker, joined by prompt_id.

    Returns:
        Columns prompt_id, instruction, input, response0, response1.

    Raises:
        UserError: where the tables are not about the same prompts, or a value is null.
    """
    both = []
    for path in (response0, response1):
        table = checked.read(path, RESPONSES, ("prompt_id", "instruction", "input", "response"))
        # Hashes stand for the texts, so that checking needs no memory for them.
        same = pl.concat_str(pl.col("instruction").hash(0), pl.col("input").hash(0), separator=" ").alias(str(path))
        both.append((table, table.select("prompt_id", same)))
    (table0, texts0), (table1, texts1) = both
    texts = texts0.join(texts1, on="prompt_id", how="full", coalesce=True).sort("prompt_id")
    differing = texts.filter(pl.col(str(response0)).ne_missing(pl.col(str(response1)))).head(1).collect()
    if differing.height:
        key, in0, in1 = differing.row(0)
        lacking = response0 if in0 is None else response1
        what = f"is not in {lacking}" if in0 is None or in1 is None else "has different instructions in both"
        raise UserError(
            f"{response0} and {response1} are not about the same prompts: prompt_id {key} {what}; delete the older "
            "one and sample it again from the same prompts"
        )

    def cut(name: str) -> pl.Expr:
        return pl.col(name).map_elements(lambda text: cut_at_markers(text, turn_markers), return_dtype=pl.String)

    other = table1.select("prompt_id", response1="response")
    return (
        table0.rename({"response": "response0"})
        .join(other, on="prompt_id", how="inner")
        .with_columns(cut("response0"), cut("response1"))
    )


def read_traits(pairs: pl.LazyFrame, refusal_phrase: str) -> dict[str, Traits]:
    """What the rules look at in every pair, by prompt_id; texts are streamed.

    Args:
        pairs: as `join_responses` gives them.
        refusal_phrase: marks a refusal wherever it stands; empty, nothing is one.
    """

    def detect(texts: pl.Series) -> pl.Series:
        return pl.Series(language.detect(texts.to_list()), dtype=pl.String)

    def refuses(name: str) -> pl.Expr:
        if not refusal_phrase:
            return pl.lit(False).alias(f"refuses_{name}")
        return pl.col(name).str.contains(refusal_phrase, literal=True).alias(f"refuses_{name}")

    questions = pl.concat_str("instruction", "input", separator="\n\n")
    table = pairs.select(
        "prompt_id",
        refuses("response0"),
        refuses("response1"),
        questions.map_batches(detect, return_dtype=pl.String, is_elementwise=True).alias("instruction_language"),
        *(pl.col(name).map_batches(detect, return_dtype=pl.String, is_elementwise=True) for name in _ANSWERS),
    ).collect(engine="streaming")
    return {
        key: Traits((refuses0, refuses1), instruction_language, (language0, language1))
        for key, refuses0, refuses1, instruction_language, language0, language1 in table.iter_rows()
    }


def aggregate(
    preferences: Path,
    response0: Path,
    response1: Path,
    *,
    principles: Sequence[JudgedPrinciple],
    settings: Aggregation,
    turn_markers: Sequence[str],
) -> tuple[pl.LazyFrame, dict[str, int]]:
    """Make reward-model records of judged pairs.

    The order of rows in the inputs changes nothing. Another pair changes a record only through the variances.

    Args:
        preferences: the judgements (Parquet).
        response0: responses (Parquet); output 1 of the judging.
        response1: the same, output 2 of the judging.
        principles: with the texts to show; `settings.dimensions` picks some of them.
        settings: passes, draws and rules.
        turn_markers: where responses are cut.

    Returns:
        The records (`PRINCIPLE_RECORDS`), sorted by prompt_id and pass, not yet materialised; and how many there
        are and were left out, by reason.

    Raises:
        UserError: where inputs do not fit together, or nothing is left.
    """
    by_name = {principle.dimension: principle for principle in principles}
    unknown = [name for name in settings.dimensions if name not in by_name]
    if unknown:
        raise UserError(
            f"aggregation.dimensions: {', '.join(unknown)} not among the principles: {', '.join(by_name)}; "
            "correct the name, or define it in the principle file"
        )
    shown = [by_name[name] for name in settings.dimensions]
    ids, scores = read_scores(preferences, settings.dimensions)
    pairs = join_responses(response0, response1, turn_markers)
    sampled = set(pairs.select("prompt_id").collect()["prompt_id"])
    if lost := sorted(set(ids) - sampled):
        raise UserError(
            f"{preferences} judges prompt_id {lost[0]} and {len(lost) - 1} others that are not in {response0}; judge "
            "the present responses"
        )
    counts: Counter[str] = Counter(pairs=len(sampled), pairs_not_judged=len(sampled) - len(ids))
    judged = pl.LazyFrame({"prompt_id": ids}, schema={"prompt_id": pl.String})
    traits = read_traits(pairs.join(judged, on="prompt_id", how="semi"), settings.refusal_phrase)
    log.info("looked at %d pairs, %d of them judged", len(sampled), len(ids))

    drawn = []
    for key, row in zip(ids, scores.tolist(), strict=True):
        for number in range(settings.passes):
            record = draw_record(key, number, row, traits[key], principles=shown, settings=settings)
            if isinstance(record, str):
                counts[f"skipped_{record}"] += 1
                continue
            counts["records"] += 1
            counts["flipped"] += record.flipped
            counts[f"decided_by_{record.rule or settings.decision}"] += 1
            drawn.append(record)
    if not drawn:
        raise UserError(
            f"{preferences}: none of {len(ids)} pairs gives a record (skipped: "
            + ", ".join(f"{reason.removeprefix('skipped_')} {n}" for reason, n in counts.items() if "skipped" in reason)
            + "); the judge's two orders never agree, or no answer is in the language of its instruction"
        )
    records = pl.DataFrame([vars(record) for record in drawn], schema=DRAWN).lazy()
    first, second = (pl.col(name) for name in _ANSWERS)
    table = (
        records.join(pairs, on="prompt_id", how="left", maintain_order="left")
        .with_columns(
            output_1=pl.when("swapped").then(second).otherwise(first),
            output_2=pl.when("swapped").then(first).otherwise(second),
        )
        .select(list(PRINCIPLE_RECORDS.columns))
    )
    return table, dict(counts)
