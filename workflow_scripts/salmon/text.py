"""Small functions on texts that several stages share."""

import re
from collections.abc import Sequence


def join_instruction(instruction: str, extra: str) -> str:
    """The instruction and, after a blank line, its input if it has one."""
    return f"{instruction}\n\n{extra}" if extra else instruction


def fold(text: str) -> str:
    """The text without regard to case and white space, for the comparison with others."""
    return " ".join(text.casefold().split())


def cut_thinking(text: str, opening: str, closing: str) -> str:
    """The text without what stands between thinking markers, and without the markers.

    A closing marker without an opening one ends thinking that began in the prompt: all before it goes. An opening
    marker without a closing one begins thinking that did not end: all after it goes. White space goes where an end of
    the text was cut off.
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
    """The text before the first turn marker in it; the whole text where there is none.

    Markers are literal and count wherever they stand; of several, the one that begins first cuts.

    Raises:
        ValueError: for an empty marker, which would cut everything.
    """
    if not all(markers):
        raise ValueError("a turn marker is empty")
    if not markers:
        return text
    return re.split("|".join(map(re.escape, markers)), text, maxsplit=1)[0]
