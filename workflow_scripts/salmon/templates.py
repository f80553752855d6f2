"""Prompt templates: plain text with named slots in braces, filled once.

Instructions and responses hold braces too, so a filled text is never formatted again: all slots are replaced
in one pass over the template, and what stands in the values is left alone.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from salmon.errors import UserError

JUDGE_SLOTS = ("UserInstruction", "OutputA", "OutputB", "Dimension", "Definition")
PMP_SLOTS = ("Output", "Input")
REWARD_SLOTS = ("Output", "Input", "Dimensions")
_SLOT = re.compile(r"\{(" + "|".join(sorted({*JUDGE_SLOTS, *REWARD_SLOTS})) + r")\}")


def fill(template: str, **values: str) -> str:
    """Replace every `{Slot}` named in `values`, in one pass; anything else in braces stays as it is."""
    return _SLOT.sub(lambda match: values.get(match[1], match[0]), template)


def read(path: str | Path) -> str:
    """Read a template. The one line break at the end of the file is not part of it.

    Raises:
        UserError: where the file is missing or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise UserError(f"template {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"template {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def slots(template: str) -> set[str]:
    """Names of the slots that a template has."""
    return {match[1] for match in _SLOT.finditer(template)}


def bullets(definitions: Iterable[str]) -> str:
    """Principles as the bullet list that a reward model reads."""
    return "\n".join(f"- {definition}" for definition in definitions)


def policy_prompt(preamble: str, assistant_marker: str, instruction: str) -> str:
    """Preamble, instruction, blank line, assistant's turn marker: what the policy continues."""
    return f"{preamble}\n{instruction}\n\n{assistant_marker}\n"
