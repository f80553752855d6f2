"""Reading of files and numbers: a library's error about a bad one becomes an error that a user can act on."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from salmon.errors import UserError

LARGEST = 1e12
"""Bound for settings and numbers in tables: sums and squares up to it are finite in single precision."""
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


@contextmanager
def reading(what: object, advice: str | Callable[[BaseException], str]) -> Iterator[None]:
    """Turn whatever a library raises in this block into an error about the file that it reads.

    Args:
        what: the file, or a description and its name.
        advice: what to do, as the end of the sentence; it may depend on the exception.

    Raises:
        UserError: with the file, the reason and the advice. A UserError or a lack of memory inside passes unchanged.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        kind = type(error).__name__
        # A panic in a Rust library is not an `Exception`, but torch's lack of memory is.
        if kind == "OutOfMemoryError" or not (isinstance(error, Exception) or kind == "PanicException"):
            raise
        todo = advice if isinstance(advice, str) else advice(error)
        raise UserError(f"{what} cannot be read: {reason(error)}; {todo}") from error


def reason(error: BaseException) -> str:
    """An error's message in one line."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} in line {error.lineno})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "integer string conversion" in str(error):
        return "a number with thousands of digits"
    said = " ".join(str(error).split()).rstrip(" .:")
    if type(error).__name__ == "UnpicklingError":  # torch's message advises loading it regardless
        said = "it contains more than tensors, or is not a pickle"
    if not said or isinstance(error, TypeError | LookupError | AttributeError):
        said = ": ".join(filter(None, (type(error).__name__, said)))
    return said if len(said) <= 300 else f"{said[:297]}..."


def read_text(path: str | Path, what: str, advice: str) -> str:
    """Text of a UTF-8 file; raises the errors of `reading`, which name it as `what path`."""
    with reading(f"{what} {path}".strip(), advice):
        return Path(path).read_text(encoding="utf-8")


def read_json(path: str | Path, what: str, advice: str) -> Any:
    """Content of a JSON file; raises the errors of `reading`, which name it as `what path`."""
    with reading(f"{what} {path}".strip(), advice):
        return json.loads(Path(path).read_text(encoding="utf-8"))
