"""Small functions on texts that several stages share."""

import re
from collections.abc import Sequence


def join_instruction(instruction: str, extra: str) -> str:
    """The instruction and, after a blank line, its input if it has one."""
    return f"{instruction}\n\n{extra}" if extra else instruction


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
