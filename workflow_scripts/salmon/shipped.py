"""Files that come with the workflow: found from any working directory, with the same name on every machine.

A relative path in the configuration refers to the working directory. If it has no such file, but the workflow ships one
with this name (templates and principles, the demo's model), the shipped file is used. Commands and rules then have its
full path; manifests and fingerprints its short name, which does not depend on the checkout's location.
"""

from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDERS = ("prompts", "demo", "evaluation_tasks")
TASKS = CHECKOUT / "evaluation_tasks"
"""Tasks that lm-eval does not have."""


def find(value: Any, root: Path, checkout: Path = CHECKOUT) -> Any:
    """A raw configuration with full paths for the files that exist only in the checkout.

    Args:
        value: mappings, lists and texts.
        root: the working directory.
        checkout: the workflow's checkout.
    """
    if isinstance(value, dict):
        return {key: find(item, root, checkout) for key, item in value.items()}
    if isinstance(value, list):
        return [find(item, root, checkout) for item in value]
    if not isinstance(value, str) or not value.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
        return value
    return str(checkout / value) if (checkout / value).exists() and not (root / value).exists() else value


def short_name(path: str) -> str:
    """A file's name in manifests: for a file of the workflow, its path in the checkout."""
    if not path.startswith("/"):
        return path
    try:
        inside = Path(path).resolve().relative_to(CHECKOUT)
    except ValueError:  # not in the checkout
        return path
    return inside.as_posix() if inside.parts[:1] and inside.parts[0] in FOLDERS else path
