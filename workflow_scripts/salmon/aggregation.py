"""From judgements of single principles to reward-model records (paper section 3.2; reference step 2).

The decisions depend on numbers and a few traits of the texts. Memory holds, per pair, its id and one number per
principle, about 400 bytes, and a few hashes while inputs are checked. Texts and records are processed in batches.
"""

import logging
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from salmon import checked, language, randomness, shards, tables
from salmon.border import LARGEST
from salmon.config import Aggregation
from salmon.errors import UserError
from salmon.principles import JudgedPrinciple
from salmon.script import progress
from salmon.tables import JUDGEMENTS, PRINCIPLE_RECORDS, RESPONSES
from salmon.text import cut_at_markers

log = logging.getLogger(__name__)

PART_RECORDS = 2000


@dataclass(frozen=True)
class Traits:
    """The traits of a pair that the rules use, response0 first."""

    refuses: tuple[bool, bool]
    instruction_language: str | None
    languages: tuple[str | None, str | None]


class Pair(NamedTuple):
    """A prompt and its two responses, response0 first."""

    prompt_id: str
    instruction: str
    input: str
    responses: tuple[str, str]
    traits: Traits


@dataclass(frozen=True)
class Drawn:
    """A record without its texts."""

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


def scaled_scores(
    s12: npt.NDArray[np.float64],
    s21: npt.NDArray[np.float64],
    agreement: Literal["both_orders", "mean"] = "both_orders",
) -> npt.NDArray[np.float64]:
    """Scores of one principle for all pairs, on a scale that all principles share (reference step 2).

    m_i = (s12_i + s21_i) / 2. score_i = m_i / Var if both orders agree, that is s12_i * s21_i > 0; otherwise 0.
    With "mean", score_i = m_i / Var always: the bonus that the judge gives to the output it reads first is in s12 and,
    with the opposite sign, in s21.
    Var is the population variance of all s12 and s21 pooled, including those of pairs whose score becomes 0. A
    principle that the judge decides by position therefore has a large variance and seldom dominates.

    Args:
        s12: logit(a) - logit(b) with output 1 as (a), shape [pairs].
        s21: logit(b) - logit(a) with output 2 as (a), shape [pairs].
        agreement: whether both orders must agree (`aggregation.agreement`).

    Returns:
        Scores, shape [pairs]; above 0 they favour output 1.

    Raises:
        ValueError: if all scores are equal, which leaves no scale.
    """
    pooled = np.concatenate([s12, s21])
    if pooled.size == 0 or pooled.min() == pooled.max():
        raise ValueError("no variance")
    agree = ((s12 > 0) & (s21 > 0)) | ((s12 < 0) & (s21 < 0)) | (agreement == "mean")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled: npt.NDArray[np.float64] = np.where(agree, (s12 + s21) / 2 / pooled.var(), 0.0)
    if not np.isfinite(scaled).all():  # scores so close to each other that their variance rounds to 0
        raise ValueError("no variance")
    return scaled


@cache
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

    The draws come from a generator seeded with (seed, pass, prompt_id). Their number and order never change: number of
    principles, principles, negations, refusal rule, label noise, order of outputs. Therefore the setting of one rule
    does not change the other draws.

    Args:
        prompt_id: the pair's key.
        number: the pass, counted from 0.
        scores: the pair's scores, in the order of `principles`; above 0 they favour response0.
        traits: the traits that the rules use.
        principles: the principles that may be shown.
        settings: probabilities and rules.

    Returns:
        The record without its texts, or the reason why there is none: `no_preference` or `language`.
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
        # An unknown language matches any other: it is not evidence against an answer.
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


def read_scores(
    path: Path, dimensions: Sequence[str], agreement: Literal["both_orders", "mean"] = "both_orders"
) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Read the judgements of the given principles and scale them.

    Returns:
        The judged prompt_ids, sorted, and their scores, shape [pairs, dimensions].

    Raises:
        UserError: for keys that are null or duplicated, for scores that are not finite numbers, and for principles
            that lack judgements of some pairs, were not judged at all, or judge all pairs alike.
    """
    rows = tables.read(path, JUDGEMENTS)
    checked.check_count(path, JUDGEMENTS)
    keys = rows.select(list(JUDGEMENTS.key))
    with tables.reading_table(path):
        names = keys.select(pl.col("dimension").unique().sort()).collect(engine="streaming")["dimension"]
    for name in names:
        tables.check_rows(keys.filter(pl.col("dimension").eq_missing(pl.lit(name))), JUDGEMENTS, path)
    rows = rows.filter(pl.col("dimension").is_in(list(dimensions)))
    sound = (pl.col("s12", "s21").is_finite() & (pl.col("s12", "s21").abs() <= LARGEST)).fill_null(False)
    with tables.reading_table(path):
        broken = rows.filter(~pl.all_horizontal(sound)).head(1).collect(engine="streaming")
    if broken.height:
        raise UserError(
            f"{path}: prompt_id {broken['prompt_id'][0]}, {broken['dimension'][0]}: s12 {broken['s12'][0]} and s21 "
            f"{broken['s21'][0]} must both be finite and not larger than {LARGEST:.0e}; judge again (a judge in half "
            "precision may overflow)"
        )
    ids = pl.Series(dtype=pl.String)
    columns = []
    for position, dimension in enumerate(dimensions):
        judged = rows.filter(pl.col("dimension") == dimension).drop("dimension").collect(engine="streaming")
        if not judged.height:
            raise UserError(
                f"{path} has no rows of the dimension {dimension}; judge with a principle file that defines it, or "
                "remove it from aggregation.dimensions"
            )
        judged = judged.sort("prompt_id")
        here = judged["prompt_id"]
        if position and not here.equals(ids):
            key = min(set(here) ^ set(ids))
            raise UserError(
                f"{path}: prompt_id {key} has judgements of only one of {dimensions[0]} and {dimension}; judge again, "
                "or remove the pair"
            )
        ids = here
        try:
            columns.append(scaled_scores(judged["s12"].to_numpy(), judged["s21"].to_numpy(), agreement))
        except ValueError:
            raise UserError(
                f"{path}: dimension {dimension} has the same score for all {len(ids)} pairs and cannot be scaled by "
                "its variance; judge more pairs, check the judge, or remove it from aggregation.dimensions"
            ) from None
    return ids.to_list(), np.stack(columns, axis=1)


def check_responses(response0: Path, response1: Path) -> pl.DataFrame:
    """Refuse responses to different prompts, and responses with null values.

    Returns:
        Their keys: one column prompt_id, sorted.

    Raises:
        UserError: with the file, the key and the fault.
    """
    both = []
    for path in (response0, response1):
        table = checked.read(path, RESPONSES, ("prompt_id", "instruction", "input", "response"))
        # Compare hashes, to keep the texts out of memory.
        same = pl.concat_str(pl.col("instruction").hash(0), pl.col("input").hash(0), separator=" ").alias(str(path))
        both.append(table.select("prompt_id", same).collect(engine="streaming"))
    texts = both[0].join(both[1], on="prompt_id", how="full", coalesce=True).sort("prompt_id")
    differing = texts.filter(pl.col(str(response0)).ne_missing(pl.col(str(response1)))).head(1)
    if differing.height:
        key, in0, in1 = differing.row(0)
        lacking = response0 if in0 is None else response1
        what = f"is not in {lacking}" if in0 is None or in1 is None else "has a different instruction in each"
        raise UserError(
            f"{response0} and {response1} do not answer the same prompts: prompt_id {key} {what}; name two files with "
            "the same prompts, or move the older one away so that it is sampled again"
        )
    return texts.select("prompt_id")


def read_pairs(
    response0: Path,
    response1: Path,
    turn_markers: Sequence[str],
    folder: Path,
    judged: Container[str],
    settings: Aggregation,
) -> Iterator[Pair]:
    """Both responses of every judged prompt, cut at the first turn marker, sorted by prompt_id.

    Args:
        response0: of the prompts that `check_responses` has matched with those of response1.
        response1: the other response to each prompt.
        turn_markers: texts at which responses are cut.
        folder: for sorted copies of files that are not sorted.
        judged: the prompt_ids to keep.
        settings: the rules that are on; only their traits are determined.
    """
    files = [shards.in_order_of_keys(path, folder / str(number)) for number, path in enumerate((response0, response1))]
    names = ("prompt_id", "instruction", "input", "response")
    rows = (shards.read_rows(each, names) for each in files)
    for (key, instruction, extra, first), (other, _, _, second) in zip(*rows, strict=True):
        if key != other:
            raise RuntimeError(f"{response0} and {response1} were changed while they were read")
        if key in judged:
            responses = cut_at_markers(first, turn_markers), cut_at_markers(second, turn_markers)
            yield Pair(key, instruction, extra, responses, look(instruction, extra, responses, settings))


def look(instruction: str, extra: str, responses: Sequence[str], settings: Aggregation) -> Traits:
    """The traits of a pair. Languages need their rule to be on, refusals need a phrase in the settings."""
    phrase = settings.refusal_phrase
    first, second = (bool(phrase) and phrase in text for text in responses)
    if not settings.language_rule:
        return Traits((first, second), None, (None, None))
    asked, *spoken = language.detect([f"{instruction}\n\n{extra}", *responses])
    return Traits((first, second), asked, (spoken[0], spoken[1]))


def aggregate(
    preferences: Path,
    response0: Path,
    response1: Path,
    *,
    principles: Sequence[JudgedPrinciple],
    settings: Aggregation,
    turn_markers: Sequence[str],
    folder: Path,
) -> tuple[pl.LazyFrame, dict[str, int]]:
    """Make reward-model records from judged pairs.

    The order of the input rows has no effect. A pair affects the records of other pairs only through the variances.

    Args:
        preferences: the judgements (Parquet).
        response0: responses (Parquet); output 1 of the judging.
        response1: responses (Parquet); output 2 of the judging.
        principles: the principles with their texts; `settings.dimensions` selects some of them.
        settings: passes, draws and rules.
        turn_markers: texts at which responses are cut.
        folder: an empty folder for intermediate files.

    Returns:
        The records (`PRINCIPLE_RECORDS`), in files, sorted by prompt_id and pass; and the counts of records and of
        what was left out, by reason.

    Raises:
        UserError: if the inputs do not match, or no record is left.
    """
    by_name = {principle.dimension: principle for principle in principles}
    unknown = [name for name in settings.dimensions if name not in by_name]
    if unknown:
        raise UserError(
            f"aggregation.dimensions: {', '.join(unknown)} not among the principles {', '.join(by_name)}; "
            "correct the name, or define it in the principle file"
        )
    shown = [by_name[name] for name in settings.dimensions]
    ids, scores = read_scores(preferences, settings.dimensions, settings.agreement)
    sampled = check_responses(response0, response1)
    lost = sorted(set(ids).difference(sampled["prompt_id"]))
    if lost:
        raise UserError(
            f"{preferences} judges prompt_id {lost[0]} and {len(lost) - 1} others that are not in {response0}; judge "
            "these responses again"
        )
    counts: Counter[str] = Counter(pairs=sampled.height, pairs_not_judged=sampled.height - len(ids))
    log.info("%d pairs, %d of them judged", sampled.height, len(ids))

    places = {key: place for place, key in enumerate(ids)}
    files: list[Path] = []
    drawn: list[tuple[Drawn, Pair]] = []
    for pair in progress(
        read_pairs(response0, response1, turn_markers, folder, places, settings), total=len(ids), what="pairs"
    ):
        row = scores[places[pair.prompt_id]].tolist()
        for number in range(settings.passes):
            record = draw_record(pair.prompt_id, number, row, pair.traits, principles=shown, settings=settings)
            if isinstance(record, str):
                counts[f"skipped_{record}"] += 1
                continue
            counts["records"] += 1
            counts["flipped"] += record.flipped
            counts[f"decided_by_{record.rule or settings.decision}"] += 1
            drawn.append((record, pair))
        if len(drawn) >= PART_RECORDS:
            files.append(_write_records(drawn, folder / f"{len(files):06}.parquet"))
            drawn = []
    if drawn:
        files.append(_write_records(drawn, folder / f"{len(files):06}.parquet"))
    if not files:
        raise UserError(
            f"{preferences}: none of {len(ids)} pairs yields a record (skipped: "
            + ", ".join(f"{reason.removeprefix('skipped_')} {n}" for reason, n in counts.items() if "skipped" in reason)
            + "); the judge's two orders never agree, or no answer is in its instruction's language"
        )
    return pl.scan_parquet(files), dict(counts)


def _write_records(drawn: Sequence[tuple[Drawn, Pair]], path: Path) -> Path:
    """Write some records with their texts."""
    texts = {
        "instruction": [pair.instruction for _, pair in drawn],
        "input": [pair.input for _, pair in drawn],
        "output_1": [pair.responses[record.swapped] for record, pair in drawn],
        "output_2": [pair.responses[not record.swapped] for record, pair in drawn],
    }
    columns = {
        name: texts[name] if name in texts else [getattr(record, name) for record, _ in drawn]
        for name in PRINCIPLE_RECORDS.columns
    }
    # Polars turns every list in a column of lists into a series; Arrow does not.
    schema = pl.DataFrame(schema=PRINCIPLE_RECORDS.schema).to_arrow().schema
    pl.DataFrame(pa.table(columns, schema=schema)).write_parquet(path)
    return path
