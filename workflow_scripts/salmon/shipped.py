"""Files that come with the workflow: found from any working directory, and called the same on every machine.

A relative path of the configuration starts from the working directory. Where there is no such file, and the workflow
comes with one of this name (templates and principles, the demo's model), that one is meant. Commands and rules then
hold its whole path; manifests and fingerprints its short name, which is the same wherever the checkout is.
"""

from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDERS = ("prompts", "demo", "evaluation_tasks")
TASKS = CHECKOUT / "evaluation_tasks"
"""Tasks that lm-eval has not."""


def find(value: Any, root: Path, checkout: Path = CHECKOUT) -> Any:
    """A raw configuration with the whole paths of the files that are found in the checkout only.

    Args:
        value: mappings, lists and texts.
        root: the working directory.
        checkout: of the workflow.
    """
    if isinstance(value, dict):
        return {key: find(item, root, checkout) for key, item in value.items()}
    if isinstance(value, list):
        return [find(item, root, checkout) for item in value]
    if not isinstance(value, str) or not value.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
        return value
    return str(checkout / value) if (checkout / value).exists() and not (root / value).exists() else value


def short_name(path: str) -> str:
    """What manifests call a file: one that comes with the workflow by its path in the checkout."""
    if not path.startswith("/"):
        return path
    try:
        inside = Path(path).resolve().relative_to(CHECKOUT)
    except ValueError:  # not in it
        return path
    return inside.as_posix() if inside.parts[:1] and inside.parts[0] in FOLDERS else path
