"""Errors that a user can fix, and their messages."""

import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError


class UserError(Exception):
    """An error that the user can fix; the message says what is wrong, where, and what to do."""


def in_field(name: str, message: str) -> PydanticCustomError:
    """An error of one field, for the validator of a whole section to raise.

    Args:
        name: name of the field.
        message: text of the error, in which `{section}` stands for the key of the section.
    """
    return PydanticCustomError("in_field", message, {"field": name})


def findings(error: ValidationError, model: Any) -> list[str]:
    """Pydantic's findings as lines of `key: what is wrong (got value)`, one per key, for a person who edits the file.

    Args:
        error: error of the validation.
        model: model that was validated, or a type that contains models.
    """
    messages: dict[str, list[str]] = {}
    for finding in error.errors(include_url=False):
        key, message = _finding(finding, model)
        told = messages.setdefault(key, [])
        if message not in told:  # members of a union may give the same message
            told.append(message)
    return [f"{key or '(top level)'}: {'; or: '.join(told)}" for key, told in messages.items()]


def describe_errors(error: ValidationError, model: Any, where: str) -> str:
    """The findings of a validation, under a heading that says where they are."""
    return describe(findings(error, model), where)


def describe(lines: Iterable[str], where: str) -> str:
    """Findings under a heading that says where they are."""
    return f"{where} is not valid:\n" + "\n".join(f"  {line}" for line in lines)


def _finding(finding: ErrorDetails, model: Any) -> tuple[str, str]:
    """The key of a finding and its message."""
    location = finding["loc"]
    section = ".".join(_real_keys(location, model))
    message, got = finding["msg"].removeprefix("Value error, "), finding["input"]
    if finding["type"] == "missing":
        return section, "required, but not set"
    if finding["type"] == "extra_forbidden":
        message = "unknown key"
    elif finding["type"] == "in_field":
        field = finding["ctx"]["field"]
        return f"{section}.{field}" if section else field, message.replace("{section}.", f"{section}." * bool(section))
    elif location[-1:] == ("[key]",):
        return section, f"{'unknown key' if finding['type'] == 'literal_error' else 'not a valid name'}; {message}"
    if isinstance(got, Mapping | BaseModel):
        return section, message
    shown = repr(got)
    return section, f"{message} (got {shown if len(shown) <= 100 else shown[:97] + '...'})"


def _real_keys(location: tuple[int | str, ...], model: Any) -> list[str]:
    """The part of pydantic's location that exists in the file: without `[key]` and the member of a union."""
    keys: list[str] = []
    kind = model
    for part in location:
        kind = _bare(kind)
        if part == "[key]" or get_origin(kind) in (Union, types.UnionType):
            break
        keys.append(str(part))
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field else None
        else:  # the values of a mapping, or the items of a list
            kind = (get_args(kind) or (None,))[-1]
    return keys


def _bare(kind: Any) -> Any:
    """A type without its annotations and without `| None`."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    members = [member for member in get_args(kind) if member is not type(None)]
    is_union = get_origin(kind) in (Union, types.UnionType)
    return _bare(members[0]) if is_union and len(members) == 1 else kind
