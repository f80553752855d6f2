"""Prompt templates: plain text with named slots in braces, filled once.

Instructions and responses also contain braces, so a filled text is never formatted again: all slots are replaced in one
pass over the template, and braces in the values have no effect.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from salmon.border import read_text
from salmon.errors import UserError

JUDGE_SLOTS = ("UserInstruction", "OutputA", "OutputB", "Dimension", "Definition")
ENDPOINT_SLOTS = ("UserInstruction", "OutputA", "OutputB")
PMP_SLOTS = ("Output", "Input")
REWARD_SLOTS = ("Output", "Input", "Dimensions")
_SLOT = re.compile(r"\{(" + "|".join(sorted({*JUDGE_SLOTS, *REWARD_SLOTS})) + r")\}")


def fill(template: str, **values: str) -> str:
    """Replace every `{Slot}` named in `values`, in one pass; other text in braces stays unchanged."""
    return _SLOT.sub(lambda match: values.get(match[1], match[0]), template)


def read(path: str | Path) -> str:
    """Read a template. A single line break at the end of the file is not part of it.

    Raises:
        UserError: if the file is missing or not UTF-8.
    """
    return read_text(path, "template", "a template is a text file in UTF-8").removesuffix("\n")


def slots(template: str) -> set[str]:
    """Names of the slots in a template."""
    return {match[1] for match in _SLOT.finditer(template)}


def check_slots(template: str, path: str | Path, needed: Iterable[str], key: str) -> None:
    """Refuse a template without a slot for something it should show.

    Args:
        template: the text.
        path: its file, for the message.
        needed: names of the required slots.
        key: the file's configuration key, for the message.
    """
    if missing := [f"{{{name}}}" for name in needed if name not in slots(template)]:
        raise UserError(f"template {path} has no slot {', '.join(missing)} ({key})")


def turns(template: str) -> tuple[str, str, str]:
    """The parts of a template as turns of a chat: system, user, and the beginning of the assistant's turn.

    The last line begins the assistant's turn. The paragraphs before the first one with a slot are the system's turn,
    which may be empty; the rest is the user's. Headings stay with their paragraphs: those before the first slot go to
    the user's turn. Headings before the last line are dropped, because the chat template marks the speakers.

    Raises:
        UserError: if no line with a slot comes before the last one.
    """
    before, _, begun = template.rpartition("\n")
    paragraphs = [paragraph for paragraph in before.split("\n\n") if paragraph.strip()]
    first = next((place for place, paragraph in enumerate(paragraphs) if slots(paragraph)), None)
    if first is None:
        raise UserError("it has no line with a slot before its last one, which begins the assistant's turn")
    while first > 0 and _is_heading(paragraphs[first - 1]):
        first -= 1
    while _is_heading(paragraphs[-1]):
        paragraphs.pop()
    system, user = ("\n\n".join(part).strip("\n") for part in (paragraphs[:first], paragraphs[first:]))
    return system, user, begun


def _is_heading(paragraph: str) -> bool:
    """Whether a paragraph is only a heading without a slot."""
    text = paragraph.strip()
    return text.startswith("#") and "\n" not in text and not slots(text)


def bullets(definitions: Iterable[str]) -> str:
    """Principles as the bullet list that a reward model reads."""
    return "\n".join(f"- {definition}" for definition in definitions)


def policy_prompt(preamble: str, assistant_marker: str, instruction: str) -> str:
    """The prompt that the policy continues: preamble, instruction, blank line, assistant's turn marker."""
    return f"{preamble}\n{instruction}\n\n{assistant_marker}\n"


def policy_dialogue(preamble: str, assistant_marker: str, said: Sequence[str]) -> str:
    """The same for a dialogue, with the user first and last; the preamble's last line is the user's turn marker.

    An answer ends with a line break and that marker, as it was sampled (the paper's stop string).
    """
    user_marker = preamble.rpartition("\n")[2]
    text = policy_prompt(preamble, assistant_marker, said[0])
    for answer, asked in zip(said[1::2], said[2::2], strict=True):
        text = policy_prompt(f"{text}{answer}\n\n{user_marker}", assistant_marker, asked)
    return text
