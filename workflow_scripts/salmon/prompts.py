r"""Public data sets to prompts: what is asked in each, cleaned, distinct, drawn (reference: steps 1 and 3, "Prompts").

The functions of one row return a `Prompt`, or the reason why the row gives none, which is counted. A draw under a
limit takes the prompts of smallest hash of (seed, source, text): it depends on the seed and on what the data set
holds, not on the order of its rows. At most what the result needs is kept in memory.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableSet, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import polars as pl

from salmon.config import Prompts, QuestionType, RlPrompts, Source, SourceFormat
from salmon.errors import UserError
from salmon.randomness import seed_of
from salmon.script import progress
from salmon.sources import Located, read_source
from salmon.templates import join_instruction

log = logging.getLogger(__name__)

# The tables of prompts, in the order of the sources and, within one, of first appearance; prompt_id is unique,
# and so is the text that instruction and input make together.
SCHEMA: dict[str, Any] = {
    "prompt_id": pl.String,  # hash of source, instruction and input
    "source": pl.String,  # name of the source in the configuration
    "instruction": pl.String,
    "input": pl.String,  # "" where there is none
}
RL_SCHEMA: dict[str, Any] = {
    **SCHEMA,
    "question_type": pl.String,  # general, reasoning or red_teaming
    "length_bonus": pl.Float64,  # factor of the length reward
}

QUESTION_TYPES: tuple[QuestionType, ...] = ("general", "reasoning", "red_teaming")  # 0, 1, 2 in the authors' files
DOLLY_CATEGORIES = ("creative_writing", "brainstorming", "open_qa", "general_qa", "classification")
OPENORCA_FAMILIES = ("niv", "flan", "t0", "cot")
BATCH = 1000

HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"

_NLI = re.compile(r"[Pp]remise|[Hh]ypothesis|it is not possible to tell")
_COUNTER_AT_END = re.compile(r"(\d{1,3}) / (\d{1,3})$")
_COUNTER_AT_START = re.compile(r"(\d{1,3}) / (\d{1,3})(?!\d)")
_FIRST_OF_ONE = re.compile(r"(?<!\d)1 / 1(?!\d)")
_LABEL_AT_END = re.compile(r"(?:Share Prompt|Translate now|지금 번역하기|Language: ?[^\W\d_]+)$")
_BING = "Bing is powered by AI"


class Prompt(NamedTuple):
    """What is asked; type and bonus where a row has its own."""

    instruction: str
    input: str = ""
    family: str = ""  # a limit holds for each family of a source
    question_type: QuestionType | None = None
    length_bonus: float | None = None

    @property
    def text(self) -> str:
        """What the policy reads, and what makes two prompts the same."""
        return join_instruction(self.instruction, self.input)


Skipped = Literal[
    "fewer than two turns",
    "no human turn first",
    "other category",
    "with context",
    "other family",
    "NLI",
]
Reject = Callable[[Sequence[str]], Sequence[str | None]]  # texts -> for each, the reason to leave it out, or None


def digest(*parts: Any) -> str:
    """An id made of strings: 20 hexadecimal digits, the same on every machine."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def oasst1_prompts(rows: Iterable[Located], counts: Counter[str]) -> Iterator[Prompt]:
    """Root messages that have at least one reply, in the order in which they appear.

    Replies may come before their root, and messages whose parent is absent are no trouble. Memory: the roots and
    the ids of all messages.

    Raises:
        UserError: where two messages have the same id.
    """
    roots: dict[str, str] = {}
    ids: set[str] = set()
    parents: set[str] = set()
    for place, row in rows:
        if row["message_id"] in ids:
            raise UserError(f"{place}: message_id occurs twice; take out one of the files or rows that hold it")
        ids.add(row["message_id"])
        if row["parent_id"]:
            parents.add(row["parent_id"])
            counts["no root of a tree"] += 1
        else:
            roots[row["message_id"]] = row["text"] or ""
    for root, text in roots.items():
        if root in parents:
            yield Prompt(text)
        else:
            counts["root without a reply"] += 1


def sharegpt_prompt(row: Any) -> Prompt | Skipped:
    """The first turn, if a human's, of a conversation of two turns or more, without what the web page added."""
    turns = row["conversations"]
    if len(turns) < 2:
        return "fewer than two turns"
    if turns[0]["from"] not in ("human", "user"):
        return "no human turn first"
    return Prompt(clean_web_text(turns[0].get("markdown") or turns[0]["value"] or ""))


def dolly_prompt(row: Any) -> Prompt | Skipped:
    """The instruction, in the categories that need no context."""
    if row["category"] not in DOLLY_CATEGORIES:
        return "other category"
    return "with context" if (row["context"] or "").strip() else Prompt(row["instruction"] or "")


def openorca_prompt(row: Any) -> Prompt | Skipped:
    """The question, of the four families and not of natural language inference."""
    family = row["id"].partition(".")[0]
    if family not in OPENORCA_FAMILIES:
        return "other family"
    question = row["question"] or ""
    return "NLI" if is_nli(question) else Prompt(question, family=family)


def math_prompt(row: Any) -> Prompt | Skipped:
    """The problem."""
    return Prompt(row["problem"] or "")


def hh_rlhf_prompt(row: Any) -> Prompt | Skipped:
    """The first human turn of the dialogue, which both sides share."""
    before, marker, after = (row["chosen"] or "").partition(HUMAN_TURN)
    if before or not marker:
        return "no human turn first"
    return Prompt(after.partition(ASSISTANT_TURN)[0].partition(HUMAN_TURN)[0])


def written_prompt(row: Any) -> Prompt | Skipped:
    """A row of a prompt file, the authors' or ours, with type and bonus if it has them."""
    kind = row.get("question_type")
    return Prompt(
        row["instruction"] or "",
        row.get("input") or "",
        question_type=QUESTION_TYPES[kind] if isinstance(kind, int) else kind,
        length_bonus=row.get("length_bonus"),
    )


_OF_ONE_ROW: dict[SourceFormat, Callable[[Any], Prompt | Skipped]] = {
    "sharegpt": sharegpt_prompt,
    "dolly": dolly_prompt,
    "openorca": openorca_prompt,
    "math": math_prompt,
    "hh_rlhf": hh_rlhf_prompt,
    "prompts": written_prompt,
}


def extract(kind: SourceFormat, rows: Iterable[Located], counts: Counter[str]) -> Iterator[Prompt]:
    """The prompts of a data set, stripped of white space at both ends, empty ones left out.

    Args:
        kind: format of the rows.
        rows: as `read_source` yields them.
        counts: gains the number of rows left out by reason.
    """
    found: Iterable[Prompt | Skipped]
    if kind == "oasst1":
        found = oasst1_prompts(rows, counts)
    elif kind in _OF_ONE_ROW:
        found = (_OF_ONE_ROW[kind](row) for _, row in rows)
    else:
        raise UserError(f"format {kind} is no source of prompts; use one of oasst1, {', '.join(_OF_ONE_ROW)}")
    for prompt in found:
        if isinstance(prompt, str):
            counts[prompt] += 1
            continue
        stripped = prompt._replace(instruction=prompt.instruction.strip(), input=prompt.input.strip())
        if stripped.instruction:
            yield stripped
        else:
            counts["empty"] += 1


def is_nli(question: str) -> bool:
    """Whether a question is a task of natural language inference (reference: step 3)."""
    return _NLI.search(question) is not None


def clean_web_text(text: str) -> str:
    """A prompt as it was typed, without what a scraped chat page put around it (reference: step 3, "Cleaning").

    Stripped at the end: page counters `n / m` with n <= m, and labels of the page and its extensions; at the start:
    page counters, everything up to a counter `1 / 1`, and a line with Bing's disclaimer.
    """
    previous = None
    while text != previous:
        previous = text
        text = _LABEL_AT_END.sub("", text.strip()).rstrip()
        if (counter := _COUNTER_AT_END.search(text)) and (page := _page(counter)):
            text = text[: counter.end(1) - len(page)]
        elif (counter := _COUNTER_AT_START.match(text)) and int(counter[1]) <= int(counter[2]):
            text = text[counter.end() :]
    *_, text = _FIRST_OF_ONE.split(text)
    first, line_break, rest = text.lstrip().partition("\n")
    return (rest if line_break and _BING in first else text).strip()


def _page(counter: re.Match[str]) -> str:
    """The digits of a counter's first number, which may be glued to digits of the text: as many as give n <= m."""
    digits = counter[1]
    return next((digits[start:] for start in range(len(digits)) if int(digits[start:]) <= int(counter[2])), "")


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
        if not texts:  # which the tokenizer refuses
            return []
        ids = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [
            f"fewer than {minimum} tokens"
            if len(tokens) < minimum
            else f"more than {maximum} tokens"
            if len(tokens) > maximum
            else None
            for tokens in ids
        ]

    return reject


class _Candidate(NamedTuple):
    rank: int
    position: int
    key: str
    prompt: Prompt


def draw(
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
        for family, found in families.items():
            if limit and len(found) >= 2 * limit:
                families[family] = _smallest(found, limit, counts)
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


def _smallest(found: dict[str, _Candidate], limit: int | None, counts: Counter[str]) -> dict[str, _Candidate]:
    """The `limit` candidates of smallest rank, or all."""
    if limit is None:
        return found
    ranked = sorted(found.values())
    counts["over the limit"] += len(ranked[limit:])
    return {candidate.key: candidate for candidate in ranked[:limit]}


def read_prompts(
    settings: Prompts, reject: Reject = keep_all, bonuses: dict[QuestionType, float] | None = None
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The prompts of all sources.

    Args:
        settings: sources and seed.
        reject: tells which texts to leave out, and why.
        bonuses: length bonus of a question type, for the columns of the RL stage; None for a table without them.

    Returns:
        A table of `SCHEMA`, or with `bonuses` of `RL_SCHEMA`; and numbers of rows: read, kept and left out by
        reason, for every source (`name: reason`).

    Raises:
        UserError: where a source cannot be read or no prompt is left.
    """
    missing = [kind for kind in QUESTION_TYPES if bonuses is not None and kind not in bonuses]
    if missing:
        raise UserError(f"rl_prompts.length_bonus lacks {', '.join(missing)}; set one for every question type")
    taken: set[str] = set()
    records: list[tuple[Any, ...]] = []
    totals: dict[str, int] = {}
    for name, source in settings.sources.items():
        counts: Counter[str] = Counter()
        rows = _counted(progress(read_source(source), total=None, what=f"rows of {name}"), counts)
        prompts = draw(
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
    schema = SCHEMA if bonuses is None else RL_SCHEMA
    return pl.DataFrame(records, schema=schema, orient="row"), totals


def read_rl_prompts(settings: RlPrompts, tokenizer: Any) -> tuple[pl.DataFrame, dict[str, int]]:
    """The prompts of the RL stage: a table of `RL_SCHEMA`, of texts whose number of tokens is within the limits."""
    return read_prompts(
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
