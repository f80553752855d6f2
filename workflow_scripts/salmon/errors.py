"""What a user can mend, and how it is told."""

from pydantic import ValidationError


class UserError(Exception):
    """Something the user can mend; the message says what is wrong, where, and what to do."""


def describe_errors(error: ValidationError, where: str) -> str:
    """Pydantic's findings as lines of `key: what is wrong (got value)`, for a person who edits the file."""
    lines = []
    for finding in error.errors(include_url=False):
        key = ".".join(str(part) for part in finding["loc"]) or "(top level)"
        message = finding["msg"].removeprefix("Value error, ")
        if finding["type"] == "extra_forbidden":
            message = "unknown key"
        elif finding["type"] == "missing":
            lines.append(f"  {key}: required, but not set")
            continue
        got = repr(finding["input"])
        lines.append(f"  {key}: {message} (got {got if len(got) <= 100 else got[:97] + '...'})")
    return f"{where} is not valid:\n" + "\n".join(lines)
