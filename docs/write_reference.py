"""Write the parts of documents that repeat the code: `make docs-reference`. A test fails if one is out of date.

config.schema.json     the configuration as a JSON schema, for editors
docs/configuration.md  its keys as tables
docs/tables.md         the tables' columns
README.md, docs/running.md  the targets, between two marks
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

from salmon import tables  # noqa: E402
from salmon.config import FREE  # noqa: E402
from salmon.configuration import TARGETS, Config, RunSection, section_in  # noqa: E402

TARGETS_MARK = "<!-- targets: written by `make docs-reference` -->"


def schema() -> str:
    """The JSON schema of config.yaml and of any file that is used on top of it.

    Such a file sets only some keys and removes entries of mappings with null. So no key is required, and every entry of
    a mapping may be null. Snakemake checks at its start whether the whole configuration is complete.
    """
    whole = Config.model_json_schema()
    whole |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "config.yaml of the SALMON workflow"}
    # A run is merged into the sections before it is checked, so its type has plain mappings instead of sections.
    (pattern,) = whole["properties"]["runs"]["patternProperties"]
    sections = {name: {"$ref": whole["properties"][name]["$ref"]} for name in get_args(RunSection)}
    run = {"type": "object", "properties": sections, "additionalProperties": False}
    whole["properties"]["runs"]["patternProperties"][pattern] = run

    def relax(part: Any) -> None:
        if isinstance(part, list):
            for item in part:
                relax(item)
        if not isinstance(part, dict):
            return
        part.pop("required", None)
        if isinstance(entry := part.get("additionalProperties"), dict):
            part["additionalProperties"] = {"anyOf": [entry, {"type": "null"}]}
        for pattern, entry in part.get("patternProperties", {}).items():
            part["patternProperties"][pattern] = {"anyOf": [entry, {"type": "null"}]}
        for item in part.values():
            relax(item)

    relax(whole)
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def configuration() -> str:
    """The keys of the configuration, one table per section."""
    lines = [
        "# The configuration",
        "",
        "This page lists every key of `config.yaml`. `make docs-reference` writes it from the models that validate the",
        "configuration (`workflow_scripts/salmon/config.py`). Defaults apply to scripts that are started by hand;",
        "`config.yaml` sets every key to the paper's value. An editor that reads `config.schema.json` completes and",
        "checks keys while you type: begin your own file with",
        "`# yaml-language-server: $schema=PATH/config.schema.json`.",
        "",
        "A changed key reruns everything that depends on it. Keys that *change no result* (except by rounding) are",
        "different: they rerun nothing, restart no training, and make nothing stale for `snakemake verify`. There is",
        "one exception: if the number of shards changes, Snakemake builds the shards again, and everything that",
        "depends on them. `verify` still reports their table as whole. So set the number back, or change it only when",
        "the table is built again anyway.",
        "",
    ]
    lines += _section("config.yaml", Config, "")
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, model: type[BaseModel], prefix: str) -> list[str]:
    """One section and the sections below it."""
    lines = [f"## {title}", "", (model.__doc__ or "").strip().splitlines()[0], ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    below: list[str] = []
    properties = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        lines.append(f"| `{key}` | {_type(field, properties[name])} | {_default(field)} | {_meaning(field)} |")
        section = section_in(field.annotation)
        if section is not None:
            entries = get_origin(field.annotation) is dict
            below += _section(f"{key}.*" if entries else key, section, f"{key}.{'NAME.' if entries else ''}")
    return [*lines, "", *below]


def _type(field: FieldInfo, schema: dict[str, Any]) -> str:
    """The values that a field takes, from its JSON schema."""
    if section_in(field.annotation):
        if get_origin(field.annotation) is dict:
            return "name: section"
        return "section" if field.annotation is section_in(field.annotation) else "section or null"
    return _escape(_words(schema))


def _words(part: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "enum" in part:
        return ", ".join(f"`{value}`" for value in part["enum"])
    if "const" in part:
        return f"`{part['const']}`"
    if "anyOf" in part:
        return " or ".join(_words(item) for item in part["anyOf"])
    kind = part.get("type", "any")
    if kind in ("array", "object"):
        return _container(part)
    bounds = [
        f"{sign} {part[name]:g}"
        for name, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if name in part
    ]
    return " ".join([{"boolean": "true or false", "string": "text"}.get(kind, kind), ", ".join(bounds)]).strip()


def _container(part: dict[str, Any]) -> str:
    """A JSON schema of a list or mapping in a few words."""
    if fixed := part.get("prefixItems"):
        return f"list of {len(fixed)}: {', '.join(map(_words, fixed))}"
    if part["type"] == "array":
        return f"list of {_words(part['items'])}" if part.get("items") else "list"
    names = part.get("propertyNames")
    entry = next(iter(part.get("patternProperties", {}).values()), part.get("additionalProperties"))
    if not isinstance(entry, dict):
        return "mapping"
    return f"mapping of {_words(names) if names else 'names'} to {_words(entry)}"


def _default(field: FieldInfo) -> str:
    """The default of a field."""
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return ""
    return f"`{_escape(json.dumps(value))}`"


def _meaning(field: FieldInfo) -> str:
    """The meaning of a field, and whether it changes a result."""
    return _escape(field.description or "") + ("; *changes no result*" if FREE in field.metadata else "")


def _escape(text: str) -> str:
    """Text of a table's cell."""
    return text.replace("|", "\\|")


def table_page() -> str:
    """The tables and their columns."""
    lines = [
        "# Tables",
        "",
        "This page lists every table of the workflow. `make docs-reference` writes it from",
        "`workflow_scripts/salmon/tables.py`. All tables are Parquet files (zstd) in the results folder, each with a",
        "manifest next to it. A table that only some runs have is in the folder of the first of them, `runs/NAME/`. A",
        "column is never null unless its type says so.",
        "",
    ]
    for table in tables.TABLES:
        keys = ", ".join(f"`{name}`" for name in table.key)
        lines += [f"## {table.name[0].upper()}{table.name[1:]}: `{table.files}`", ""]
        lines += [table.meaning, "", f"Key: {keys}.", "", "| column | type | meaning |", "| --- | --- | --- |"]
        lines += [
            f"| `{name}` | {column.type}{', may be null' if column.nullable else ''} | {_escape(column.meaning)} |"
            for name, column in table.columns.items()
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def with_targets(name: str) -> str:
    """A document with its table of targets."""
    rows = [f"| `{name}` | `results/{target.artifact}` | {target.meaning} |" for name, target in TARGETS.items()]
    rows = [TARGETS_MARK, "", "| target | artifact | made by |", "| --- | --- | --- |", *rows, "", TARGETS_MARK]
    mark = re.escape(TARGETS_MARK)
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(f"{mark}.*{mark}", lambda _: "\n".join(rows), text, flags=re.DOTALL)


PAGES: dict[str, Callable[[], str]] = {
    "config.schema.json": schema,
    "docs/configuration.md": configuration,
    "docs/tables.md": table_page,
    "docs/running.md": partial(with_targets, "docs/running.md"),
}


def main() -> None:
    """Write all of them."""
    for name, write in PAGES.items():
        (ROOT / name).write_text(write(), encoding="utf-8")
    sys.stdout.write(f"wrote {', '.join(PAGES)}\n")


if __name__ == "__main__":
    main()
