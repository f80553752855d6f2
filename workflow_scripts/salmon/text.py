"""Small functions on texts that several stages share."""

import re
from collections.abc import Sequence


def join_instruction(instruction: str, extra: str) -> str:
    """The instruction and, after a blank line, its input if it has one."""
    return f"{instruction}\n\n{extra}" if extra else instruction


def fold(text: str) -> str:
    """The text folded for comparisons that ignore case and white space."""
    return " ".join(text.casefold().split())


def cut_thinking(text: str, opening: str, closing: str) -> str:
    """The text without thinking markers and the text between them.

    A closing marker without an opening one ends thinking that began in the prompt: everything before it is removed. An
    opening marker without a closing one begins thinking that did not end: everything after it is removed. White space
    at a cut end is also removed.
    """
    while True:
        begin, end = text.find(opening), text.find(closing)
        if end >= 0 and not 0 <= begin < end:
            text = text[end + len(closing) :].lstrip()
        elif begin >= 0:
            before, (_, _, after) = text[:begin], text[begin + len(opening) :].partition(closing)
            text = f"{before}{after}" if before.strip() and after.strip() else (before.rstrip() or after.lstrip())
        else:
            return text


def cut_at_markers(text: str, markers: Sequence[str]) -> str:
    """The text before the first turn marker in it; the whole text if there is none.

    Markers are literal and count at any position; the one that begins first cuts.

    Raises:
        ValueError: for an empty marker, which would cut everything.
    """
    if not all(markers):
        raise ValueError("a turn marker is empty")
    if not markers:
        return text
    return re.split("|".join(map(re.escape, markers)), text, maxsplit=1)[0]
