"""From public data sets to prompts: extracted, cleaned, distinct, drawn (reference: steps 1 and 3, "Prompts").

The same for examples, which have an answer.

`formats` defines what a row gives. A draw under a limit takes the prompts with the smallest hash of (seed, source,
text): it depends on the seed and on the contents of the data set, not on the order of its rows. Memory holds four times
the prompts that a limit allows, or all kept prompts without a limit.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSet, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl

from salmon.config import Prompts, RlPrompts, SftData, Source
from salmon.errors import UserError
from salmon.formats import EXAMPLE_FORMATS, PROMPT_FORMATS, Example, Found, Located, Prompt, QuestionType
from salmon.randomness import digest, ranks
from salmon.script import progress
from salmon.sources import read_source
from salmon.tables import PROMPTS, RL_PROMPTS, SFT_EXAMPLES

log = logging.getLogger(__name__)

BATCH = 1000
WAITING = 3
"""How many times a family's limit may wait to be tested."""

Reject = Callable[[Sequence[str]], Sequence[str | None]]  # texts -> for each, the reason for leaving it out, or None


def extract(format_name: str, rows: Iterable[Located], counts: Counter[str]) -> Iterator[Prompt]:
    """The prompts of a data set, stripped of white space at both ends, without empty ones.

    Args:
        format_name: the rows' format, one of `PROMPT_FORMATS`.
        rows: the rows, as `read_source` yields them.
        counts: gains the numbers of omitted rows, by reason.
    """
    for prompt in PROMPT_FORMATS[format_name].extract(rows, counts):
        instruction, extra = prompt.instruction.strip(), prompt.input.strip()
        if not instruction:
            counts["empty"] += 1
        elif (instruction, extra) == prompt[:2]:
            yield prompt
        else:
            yield prompt._replace(instruction=instruction, input=extra)


def extract_examples(format_name: str, rows: Iterable[Located], counts: Counter[str]) -> Iterator[Example]:
    """The examples of a data set, as for `extract`; those without an answer are also left out."""
    for example in EXAMPLE_FORMATS[format_name].extract(rows, counts):
        stripped = example._replace(
            instruction=example.instruction.strip(), input=example.input.strip(), output=example.output.strip()
        )
        if not stripped.instruction:
            counts["empty"] += 1
        elif not stripped.output:
            counts["no answer"] += 1
        else:
            yield stripped


def keep_all(texts: Sequence[str]) -> list[None]:
    """Reject nothing."""
    return [None] * len(texts)


def token_limits(tokenizer: Any, minimum: int, maximum: int) -> Reject:
    """Reject texts of fewer or more tokens; the beginning token counts, if the tokenizer has one.

    Args:
        tokenizer: a tokenizer of transformers.
        minimum: smallest number of tokens to keep.
        maximum: largest number of tokens to keep.
    """
    from salmon.encoding import count_tokens  # needs transformers; the prompts of step 1 do not

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
    position: int
    key: str
    prompt: Any


@dataclass
class _Family:
    """The candidates of one family, by rank.

    Texts are tested in rank order and as late as memory allows: most of a large data set is over the
    limit and needs no test.

    Attributes:
        limit: number to draw; None for all.
        cutoff: candidates of a larger rank can no longer be drawn; None while any can.
        tested: candidates that passed the test.
        untested: candidates that wait for their test.
    """

    limit: int | None
    cutoff: int | None = None
    tested: dict[int, _Candidate] = field(default_factory=dict)
    untested: dict[int, _Candidate] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """Whether enough candidates wait that they should be tested."""
        return len(self.untested) >= (max(BATCH, WAITING * self.limit) if self.limit else BATCH)

    def settle(self, reject: Reject, counts: Counter[str]) -> None:
        """Test the waiting candidates that can still be drawn, and drop the others."""
        waiting = sorted(self.untested)
        while tests := waiting[:BATCH]:
            if self.cutoff is not None and tests[0] > self.cutoff:
                break
            del waiting[:BATCH]
            found = [self.untested[rank] for rank in tests]
            for rank, candidate, reason in zip(tests, found, reject([c.prompt.text for c in found]), strict=True):
                if reason:
                    counts[reason] += 1
                else:
                    self.tested[rank] = candidate
            if self.limit and len(self.tested) >= self.limit:
                kept = sorted(self.tested)[: self.limit]
                counts["over the limit"] += len(self.tested) - len(kept)
                self.tested = {rank: self.tested[rank] for rank in kept}
                self.cutoff = kept[-1]
        counts["over the limit"] += len(waiting)
        self.untested = {}


def draw_prompts(
    prompts: Iterable[Found],
    *,
    name: str,
    limit: int | None,
    seed: int,
    reject: Reject,
    taken: MutableSet[str],
    counts: Counter[str],
) -> list[Found]:
    """Distinct, accepted prompts or examples, at most `limit` per family, in the order of first appearance.

    At most four times a family's limit is held in memory. A text in two families counts for the first of
    them.

    Args:
        prompts: the prompts; their order does not affect the draw.
        name: the source's name, on which the draw depends.
        limit: maximum number per family; None for all.
        seed: seed of the draw.
        reject: decides which texts to leave out, and why.
        taken: hashes of other sources' texts, which are left out here; gains those of the result.
        counts: gains the omitted numbers: `duplicate`, the reasons of `reject`, and `over the limit`, among which
            there may be further duplicates and texts to reject.
    """
    families: dict[str, _Family] = {}
    rank_of = ranks("draw", seed, name)
    for position, prompt in enumerate(prompts):
        family = families.setdefault(prompt.family, _Family(limit))
        text = prompt.text
        rank = rank_of(text)
        if family.cutoff is not None and rank > family.cutoff:
            counts["over the limit"] += 1
        elif rank in family.tested or rank in family.untested or (key := digest(text)) in taken:
            counts["duplicate"] += 1
        else:
            family.untested[rank] = _Candidate(position, key, prompt)
            if family.is_full:
                family.settle(reject, counts)
    kept = []
    for _, family in sorted(families.items()):
        family.settle(reject, counts)
        for candidate in family.tested.values():
            if candidate.key in taken:
                counts["duplicate"] += 1
            else:
                taken.add(candidate.key)
                kept.append(candidate)
    counts += Counter()  # drops the zeros
    return [candidate.prompt for candidate in sorted(kept)]


def collect_prompts(
    settings: Prompts, reject: Reject = keep_all, bonuses: dict[QuestionType, float] | None = None
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The prompts of all sources.

    Args:
        settings: sources and seed.
        reject: decides which texts to leave out, and why.
        bonuses: length bonus of every question type, for the columns of the RL stage; None for a table without them.

    Returns:
        The table `PROMPTS`, or `RL_PROMPTS` with `bonuses`; and the numbers of rows read, kept and left out by
        reason, for every source (`name: reason`).

    Raises:
        UserError: if a source cannot be read or no prompt is left.
    """
    taken: set[str] = set()
    records: list[tuple[Any, ...]] = []
    totals: dict[str, int] = {}
    for name, source in settings.sources.items():
        counts: Counter[str] = Counter()
        rows = _rows(name, source, PROMPT_FORMATS[source.format].row, counts)
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
        records += [_record(name, source, prompt, bonuses) for prompt in prompts]
        totals |= _told(name, counts)
    if not records:
        raise UserError(f"no prompt is left from any source ({_listed(totals)}); check the sources and the limits")
    table = PROMPTS if bonuses is None else RL_PROMPTS
    return pl.DataFrame(records, schema=table.schema, orient="row"), totals


def collect_examples(settings: SftData) -> tuple[pl.DataFrame, dict[str, int]]:
    """The examples of all sources.

    Returns:
        The table `SFT_EXAMPLES`, and the numbers of rows as in `collect_prompts`.

    Raises:
        UserError: if a source cannot be read or no example is left.
    """
    taken: set[str] = set()
    records: list[tuple[Any, ...]] = []
    totals: dict[str, int] = {}
    for name, source in settings.sources.items():
        counts: Counter[str] = Counter()
        rows = _rows(name, source, EXAMPLE_FORMATS[source.format].row, counts)
        examples = draw_prompts(
            extract_examples(source.format, rows, counts),
            name=name,
            limit=source.limit,
            seed=settings.seed,
            reject=keep_all,
            taken=taken,
            counts=counts,
        )
        counts["kept"] = len(examples)
        totals |= _told(name, counts)
        records += [
            (
                digest(name, *example[:3]),
                *(digest(name, *example[:2]), name, example.instruction, example.input),
                *(example.output, example.is_whole),
            )
            for example in examples
        ]
    if not records:
        raise UserError(f"no example is left from any source ({_listed(totals)}); check the sources and the limits")
    return pl.DataFrame(records, schema=SFT_EXAMPLES.schema, orient="row"), totals


def collect_rl_prompts(settings: RlPrompts, tokenizer: Any) -> tuple[pl.DataFrame, dict[str, int]]:
    """The prompts of the RL stage: the table `RL_PROMPTS`, with texts whose number of tokens is within the limits."""
    return collect_prompts(
        settings, token_limits(tokenizer, settings.min_tokens, settings.max_tokens), settings.length_bonus
    )


def _rows(name: str, source: Source, schema: Any, counts: Counter[str]) -> Iterator[Located]:
    """Rows of a source, with progress in the log."""
    return progress(read_source(source, schema, counts), total=None, what=f"rows of {name}")


def _told(name: str, counts: Mapping[str, int]) -> dict[str, int]:
    """A source's numbers in the form of a manifest; also writes them to the log."""
    log.info("%s: %s", name, ", ".join(f"{number} {what}" for what, number in counts.items()))
    return {f"{name}: {what}": number for what, number in counts.items()}


def _listed(totals: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {number}" for what, number in totals.items())


def _record(
    name: str, source: Source, prompt: Prompt, bonuses: dict[QuestionType, float] | None
) -> tuple[str | float, ...]:
    """One row of the table."""
    common = (digest(name, prompt.instruction, prompt.input), name, prompt.instruction, prompt.input)
    if bonuses is None:
        return common
    kind = prompt.question_type or source.question_type
    return (*common, kind, bonuses[kind] if prompt.length_bonus is None else prompt.length_bonus)
