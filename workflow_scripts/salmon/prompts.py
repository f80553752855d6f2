"""Public data sets to prompts: what is asked in each, cleaned, distinct, drawn (reference: steps 1 and 3, "Prompts").

`formats` says what a row gives. A draw under a limit takes the prompts of smallest hash of (seed, source, text): it
depends on the seed and on what the data set holds, not on the order of its rows. At most what the result needs is kept
in memory.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableSet, Sequence
from itertools import islice
from typing import Any, NamedTuple

import polars as pl

from salmon.config import Prompts, RlPrompts, Source
from salmon.encoding import count_tokens
from salmon.errors import UserError
from salmon.formats import PROMPT_FORMATS, Located, Prompt, QuestionType
from salmon.randomness import digest, seed_of
from salmon.script import progress
from salmon.sources import read_source
from salmon.tables import PROMPTS, RL_PROMPTS

log = logging.getLogger(__name__)

BATCH = 1000

Reject = Callable[[Sequence[str]], Sequence[str | None]]  # texts -> for each, the reason to leave it out, or None


def extract(format_name: str, rows: Iterable[Located], counts: Counter[str]) -> Iterator[Prompt]:
    """The prompts of a data set, stripped of white space at both ends, empty ones left out.

    Args:
        format_name: of the rows, one of `PROMPT_FORMATS`.
        rows: as `read_source` yields them.
        counts: gains the number of rows left out by reason.
    """
    for prompt in PROMPT_FORMATS[format_name].extract(rows, counts):
        stripped = prompt._replace(instruction=prompt.instruction.strip(), input=prompt.input.strip())
        if stripped.instruction:
            yield stripped
        else:
            counts["empty"] += 1


def keep_all(texts: Sequence[str]) -> list[None]:
    """Reject nothing."""
    return [None] * len(texts)


def token_limits(tokenizer: Any, minimum: int, maximum: int) -> Reject:
    """Reject texts of fewer or more tokens, special tokens not counted.

    Args:
        tokenizer: of transformers.
        minimum: smallest number of tokens that is kept.
        maximum: largest number of tokens that is kept.
    """

    def reject(texts: Sequence[str]) -> list[str | None]:
        return [
            f"fewer than {minimum} tokens"
            if number < minimum
            else f"more than {maximum} tokens"
            if number > maximum
            else None
            for number in count_tokens(tokenizer, texts)
        ]

    return reject


class _Candidate(NamedTuple):
    rank: int
    position: int
    key: str
    prompt: Prompt


def draw_prompts(
    prompts: Iterable[Prompt],
    *,
    name: str,
    limit: int | None,
    seed: int,
    reject: Reject,
    taken: MutableSet[str],
    counts: Counter[str],
) -> list[Prompt]:
    """Distinct prompts that are not rejected, at most `limit` a family, in the order of first appearance.

    A prompt is tokenised only while it can still be among the `limit` of smallest rank, and at most twice as many
    as the result has are kept. A text in two families counts for the first of them.

    Args:
        prompts: in any order; which are drawn does not depend on it.
        name: of the source, which the draw depends on.
        limit: at most so many a family; None for all.
        seed: of the draw.
        reject: tells which texts to leave out, and why.
        taken: hashes of texts that other sources gave, which are left out here; gains those of the result.
        counts: gains the numbers left out: `duplicate`, the reasons of `reject`, and `over the limit`, among which
            there may be further duplicates and texts to reject.
    """
    families: dict[str, dict[str, _Candidate]] = {}
    cutoffs: dict[str, int] = {}
    numbered = enumerate(prompts)
    while batch := list(islice(numbered, BATCH)):
        fresh: dict[tuple[str, str], _Candidate] = {}
        for position, prompt in batch:
            family, key = prompt.family, digest(prompt.text)
            rank = seed_of("draw", seed, name, prompt.text)
            if key in taken or (family, key) in fresh or key in families.get(family, ()):
                counts["duplicate"] += 1
            elif family in cutoffs and rank > cutoffs[family]:
                counts["over the limit"] += 1
            else:
                fresh[family, key] = _Candidate(rank, position, key, prompt)
        for candidate, reason in zip(fresh.values(), reject([c.prompt.text for c in fresh.values()]), strict=True):
            if reason:
                counts[reason] += 1
            else:
                families.setdefault(candidate.prompt.family, {})[candidate.key] = candidate
        for family, candidates in families.items():
            if limit and len(candidates) >= 2 * limit:
                families[family] = _smallest(candidates, limit, counts)
                cutoffs[family] = max(candidate.rank for candidate in families[family].values())
    smallest = [_smallest(families[family], limit, counts) for family in sorted(families)]
    kept = _merge(smallest, taken, counts)
    return [candidate.prompt for candidate in sorted(kept, key=lambda candidate: candidate.position)]


def _merge(
    families: Iterable[dict[str, _Candidate]], taken: MutableSet[str], counts: Counter[str]
) -> Iterator[_Candidate]:
    """The candidates of all families; a text goes to the first that has it."""
    for family in families:
        for candidate in family.values():
            if candidate.key in taken:
                counts["duplicate"] += 1
            else:
                taken.add(candidate.key)
                yield candidate


def _smallest(candidates: dict[str, _Candidate], limit: int | None, counts: Counter[str]) -> dict[str, _Candidate]:
    """The `limit` candidates of smallest rank, or all."""
    if limit is None:
        return candidates
    ranked = sorted(candidates.values())
    counts["over the limit"] += len(ranked[limit:])
    return {candidate.key: candidate for candidate in ranked[:limit]}


def collect_prompts(
    settings: Prompts, reject: Reject = keep_all, bonuses: dict[QuestionType, float] | None = None
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The prompts of all sources.

    Args:
        settings: sources and seed.
        reject: tells which texts to leave out, and why.
        bonuses: length bonus of every question type, for the columns of the RL stage; None for a table without them.

    Returns:
        The table `PROMPTS`, or with `bonuses` `RL_PROMPTS`; and numbers of rows: read, kept and left out by
        reason, for every source (`name: reason`).

    Raises:
        UserError: where a source cannot be read or no prompt is left.
    """
    taken: set[str] = set()
    records: list[tuple[Any, ...]] = []
    totals: dict[str, int] = {}
    for name, source in settings.sources.items():
        counts: Counter[str] = Counter()
        rows = _counted(
            progress(read_source(source, PROMPT_FORMATS[source.format].row), total=None, what=f"rows of {name}"), counts
        )
        prompts = draw_prompts(
            extract(source.format, rows, counts),
            name=name,
            limit=source.limit,
            seed=settings.seed,
            reject=reject,
            taken=taken,
            counts=counts,
        )
        counts["kept"] = len(prompts)
        log.info("%s: %s", name, ", ".join(f"{number} {what}" for what, number in counts.items()))
        records += [_record(name, source, prompt, bonuses) for prompt in prompts]
        totals |= {f"{name}: {what}": number for what, number in counts.items()}
    if not records:
        counted = ", ".join(f"{what} {number}" for what, number in totals.items())
        raise UserError(f"no prompt is left of all sources ({counted}); check the sources and the limits")
    table = PROMPTS if bonuses is None else RL_PROMPTS
    return pl.DataFrame(records, schema=table.schema, orient="row"), totals


def collect_rl_prompts(settings: RlPrompts, tokenizer: Any) -> tuple[pl.DataFrame, dict[str, int]]:
    """The prompts of the RL stage: the table `RL_PROMPTS`, of texts whose number of tokens is within the limits."""
    return collect_prompts(
        settings, token_limits(tokenizer, settings.min_tokens, settings.max_tokens), settings.length_bonus
    )


def _record(
    name: str, source: Source, prompt: Prompt, bonuses: dict[QuestionType, float] | None
) -> tuple[str | float, ...]:
    """One row of the table."""
    common = (digest(name, prompt.instruction, prompt.input), name, prompt.instruction, prompt.input)
    if bonuses is None:
        return common
    kind = prompt.question_type or source.question_type
    return (*common, kind, bonuses[kind] if prompt.length_bonus is None else prompt.length_bonus)


def _counted(rows: Iterable[Located], counts: Counter[str]) -> Iterator[Located]:
    """The rows, counted as they pass."""
    for row in rows:
        counts["rows"] += 1
        yield row
