"""The oracles of the demo's world: programs that read the qualities of an answer from its text.

There is one for each principle the judge knows. The same oracles measure a model's answers and the answers of
`world.py`: they look for sentences of the world's forms in any text.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from demo.world import FACTS, GROUP_OF, MOST_CLAIMS, ORDINALS

_TEACHING = re.compile(r"\bDid you (?:ever|notice)\b|\bThe reason\b")
_VIVID = re.compile(r"\bImagine\b|\bas if\b")
_INSULT = re.compile(r"noodlehead|wobblebrain", re.IGNORECASE)
_SUBJECT = re.compile(r"\bthe (" + "|".join(sorted(GROUP_OF, key=len, reverse=True)) + r")\b", re.IGNORECASE)
_GROUP_OF_FACT = {fact: group for group, facts in FACTS.items() for fact in facts}
_CLAIM = re.compile(
    _SUBJECT.pattern
    + " ("
    + "|".join(re.escape(fact) for fact in sorted(_GROUP_OF_FACT, key=len, reverse=True))
    + r")\b",
    re.IGNORECASE,
)
_ORDINAL = re.compile(r"\b(" + "|".join(ORDINALS) + r")\b,|\bStep (\d):")


MOST_WORDS = 70
MARGIN = 0.05
"""Two answers differ in a quality if the oracle's scores differ by more than this."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """A reader's view of a sentence.

    Attributes:
        end: its end position in the answer.
        groups: for a statement, the groups of the asked subject, of the named subject, and of the fact.
        numbered: whether it numbers itself as a point.
        rude: whether it insults.
        teaching: whether it asks or explains.
        vivid: whether it contains an image.
    """

    end: int
    groups: tuple[str, str, str] | None
    numbered: bool
    rude: bool
    teaching: bool
    vivid: bool


def read_sentences(instruction: str, answer: str) -> list[Sentence]:
    """A reader's view of each sentence of an answer."""
    sentences = []
    for match in re.finditer(r"[^.?!]+[.?!]", answer):
        extras = tuple(bool(pattern.search(match[0])) for pattern in (_ORDINAL, _INSULT, _TEACHING, _VIVID))
        asked = GROUP_OF[subject_of(instruction) or ""]
        groups = [(asked, GROUP_OF[subject], _GROUP_OF_FACT[fact]) for subject, fact in claims_of(match[0])]
        sentences.append(Sentence(match.end(), groups[0] if groups else None, *extras))
    return sentences


def subject_of(instruction: str) -> str | None:
    """The subject that an instruction asks about: the first one it names."""
    match = _SUBJECT.search(instruction)
    return match[1].lower() if match else None


def subject_spans(answer: str) -> list[tuple[int, int]]:
    """First and past-the-last character of every subject an answer names."""
    return [match.span(1) for match in _SUBJECT.finditer(answer)]


def claims_of(answer: str) -> list[tuple[str, str]]:
    """(subject, fact) of everything an answer states, true or not, in order."""
    return [(match[1].lower(), match[2].lower()) for match in _CLAIM.finditer(answer)]


def is_true(subject: str, fact: str) -> bool:
    """Whether the fact table supports a statement."""
    return fact in FACTS[GROUP_OF[subject]]


def concise(instruction: str, answer: str) -> float:
    """1 for no words, 0 for `MOST_WORDS` or more."""
    return max(0.0, 1 - len(answer.split()) / MOST_WORDS)


def comprehensive(instruction: str, answer: str) -> float:
    """Number of different true facts about the asked subject, out of `MOST_CLAIMS`."""
    asked = subject_of(instruction)
    told = {fact for subject, fact in claims_of(answer) if subject == asked and is_true(subject, fact)}
    return min(1.0, len(told) / MOST_CLAIMS)


def methodical(instruction: str, answer: str) -> float:
    """How far the answer numbers its points in order, starting with the first; 1 for three points or more."""
    count = 0
    for word, digit in _ORDINAL.findall(answer):
        count += (ORDINALS.index(word) + 1 if word else int(digit)) == count + 1
    return min(1.0, count / 3)


def honest(instruction: str, answer: str) -> float:
    """Share of statements that are right; 0.5 if nothing is stated."""
    claims = claims_of(answer)
    return sum(is_true(*claim) for claim in claims) / len(claims) if claims else 0.5


def ethical(instruction: str, answer: str) -> float:
    """1 without an insult, 0 with one."""
    return 0.0 if _INSULT.search(answer) else 1.0


def specific(instruction: str, answer: str) -> float:
    """Share of the named subjects that are the asked one; 0 if none is named."""
    named = [name.lower() for name in _SUBJECT.findall(answer)]
    return named.count(subject_of(instruction) or "") / len(named) if named else 0.0


def educational(instruction: str, answer: str) -> float:
    """Marked forms that ask or explain; 1 for two or more."""
    return min(1.0, len(_TEACHING.findall(answer)) / 2)


def creative(instruction: str, answer: str) -> float:
    """Marked forms with an image; 1 for two or more."""
    return min(1.0, len(_VIVID.findall(answer)) / 2)


ORACLES: Mapping[str, Callable[[str, str], float]] = {
    "Concise": concise,
    "Honest and Accurate": honest,
    "Ethical": ethical,
    "Specific": specific,
    "Educational and Engaging": educational,
    "Methodical": methodical,
    "Creative": creative,
    "Comprehensive": comprehensive,
}
"""Dimension -> oracle(instruction, answer), from 0 to 1."""


def score(instruction: str, answer: str) -> dict[str, float]:
    """The scores of all oracles."""
    return {dimension: oracle(instruction, answer) for dimension, oracle in ORACLES.items()}


def generic_quality(instruction: str, answer: str) -> float:
    """The preference of people on the internet: right, on the subject, polite, full, not dull; from 0 to 1."""
    marks = score(instruction, answer)
    names = ("Honest and Accurate", "Specific", "Ethical", "Comprehensive", "Educational and Engaging")
    return sum(marks[name] for name in names) / len(names)
