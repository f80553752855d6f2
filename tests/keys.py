"""Keys of the configuration, from its JSON schema."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = json.loads((Path(__file__).parents[1] / "config.schema.json").read_text())


def is_key(key: str) -> bool:
    """Whether config.yaml, or a file laid over it, may have this key: `a.b.c`, list items by number."""
    parts = [SCHEMA]
    for name in key.split("."):
        parts = [below for part in parts for below in _below(part, name)]
    return bool(parts)


def _below(part: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    if "$ref" in part:
        yield from _below(SCHEMA["$defs"][part["$ref"].rsplit("/", 1)[1]], name)
    for member in part.get("anyOf", ()):
        yield from _below(member, name)
    if name in part.get("properties", {}):
        yield part["properties"][name]
    allowed = part.get("propertyNames", {}).get("enum", [name])
    if isinstance(entry := part.get("additionalProperties"), dict) and name in allowed:
        yield entry
    yield from part.get("patternProperties", {}).values()
    if name.isdigit():
        if isinstance(entry := part.get("items"), dict):
            yield entry
        yield from part.get("prefixItems", [])[int(name) :][:1]
