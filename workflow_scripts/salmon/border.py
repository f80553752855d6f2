"""Where files and numbers come in: what a library says about a bad one becomes an error that a user can act on."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from salmon.errors import UserError

LARGEST = 1e12
"""No setting and no number of a table is larger: sums and squares of such numbers are finite in single precision."""
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


@contextmanager
def reading(what: object, advice: str | Callable[[BaseException], str]) -> Iterator[None]:
    """Whatever a library raises in this block is about the file that it reads.

    Args:
        what: the file, or what it is and its name.
        advice: what to do, the end of the sentence; it may depend on what was raised.

    Raises:
        UserError: what, why, and what to do. It passes as it is where it is raised inside; so does a lack of memory.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        kind = type(error).__name__
        # Panics of libraries in Rust are no `Exception`; torch's lack of memory is an ordinary one.
        if kind == "OutOfMemoryError" or not (isinstance(error, Exception) or kind == "PanicException"):
            raise
        todo = advice if isinstance(advice, str) else advice(error)
        raise UserError(f"{what} cannot be read: {reason(error)}; {todo}") from error


def reason(error: BaseException) -> str:
    """What an error says, in a line."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} in line {error.lineno})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "integer string conversion" in str(error):
        return "a number of thousands of digits"
    said = " ".join(str(error).split()).rstrip(" .:")
    if type(error).__name__ == "UnpicklingError":  # torch's text advises to read it whatever it holds
        said = "it holds more than tensors, or is no pickle"
    if not said or isinstance(error, TypeError | LookupError | AttributeError):
        said = ": ".join(filter(None, (type(error).__name__, said)))
    return said if len(said) <= 300 else f"{said[:297]}..."


def read_text(path: str | Path, what: str, advice: str) -> str:
    """Text of a file in UTF-8; errors as of `reading`, which name it as `what path`."""
    with reading(f"{what} {path}".strip(), advice):
        return Path(path).read_text(encoding="utf-8")


def read_json(path: str | Path, what: str, advice: str) -> Any:
    """Content of a JSON file; errors as of `reading`, which name it as `what path`."""
    with reading(f"{what} {path}".strip(), advice):
        return json.loads(Path(path).read_text(encoding="utf-8"))
