"""Tables for people: self-contained HTML pages, and Markdown."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Estimate = Mapping[str, float | int | None]
Cell = str | int | float | Estimate | None
"""An estimate is written with its interval; None is an empty cell."""

STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #1b1f24; background: #fff; margin: 1.5em; }
h1 { font-size: 1.35em; margin: 0 0 .3em; }
h2 { font-size: 1.1em; margin: 1.6em 0 .3em; }
p { max-width: 60em; margin: .3em 0 .6em; color: #444c56; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; vertical-align: bottom; border-bottom: 2px solid #1b1f24; padding: .3em .8em .3em 0; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid #0072b2; }
td { vertical-align: top; border-bottom: 1px solid #d8dee4; padding: .25em .8em .25em 0; }
td.number, td:first-child:not(.text) { white-space: nowrap; }
td.text { min-width: 18em; max-width: 32em; white-space: pre-wrap; overflow-wrap: anywhere; }
small { color: #57606a; }
"""
# A click on a heading sorts by its column, a second click in reverse; empty cells stay at the end.
SORTING = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const column = [...head.parentElement.children].indexOf(head), sign = head.dataset.sorted === "1" ? -1 : 1;
  const key = row => row.children[column].dataset.key ?? row.children[column].textContent;
  const compare = (one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  };
  for (const other of head.parentElement.children) delete other.dataset.sorted;
  head.dataset.sorted = sign;
  body.append(...[...body.rows].sort(compare));
});
"""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        heading: heading above the table; empty for none.
        columns: column names.
        rows: cells in the order of the columns.
        note: a sentence on how to read it.
        digits: decimal digits of numbers.
        texts: whether cells are whole texts that keep their line breaks.
    """

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    digits: int = 2
    texts: bool = False


def shown(cell: Cell, digits: int) -> str:
    """A cell as plain text."""
    if cell is None:
        return ""
    if isinstance(cell, Mapping):
        if cell["value"] is None:
            return ""
        value = f"{cell['value']:,.{digits}f}"
        low, high = (shown(cell[end], digits) for end in ("low", "high"))
        return f"{value} ({low} to {high})" if low and high else value
    if isinstance(cell, float):
        return f"{cell:,.{digits}f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def page(title: str, tables: Sequence[Table]) -> str:
    """A self-contained HTML page of tables; a click on a heading sorts."""
    parts = [f"<h1>{html.escape(title)}</h1>", *map(_table, tables)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + f"\n<script>{SORTING}</script></body></html>\n"
    )


def _table(table: Table) -> str:
    """A table with its heading and note."""
    lines = [f"<h2>{html.escape(table.heading)}</h2>"] if table.heading else []
    lines += [f"<p>{html.escape(table.note)}</p>"] if table.note else []
    head = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in table.columns)
    lines += ['<div class="wide"><table>', f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    lines += [f"<tr>{''.join(_cell(cell, table) for cell in row)}</tr>" for row in table.rows]
    return "\n".join([*lines, "</tbody></table></div>"])


def _cell(cell: Cell, table: Table) -> str:
    """A cell, with its sort key if it is a number."""
    text = html.escape(shown(cell, table.digits))
    if isinstance(cell, Mapping) and cell["value"] is not None:
        value, _, interval = text.partition(" ")
        return (
            f'<td class="number" data-key="{cell["value"]}" title="of {cell["number"]} rows">{value} '
            f"<small>{interval}</small></td>"
        )
    if isinstance(cell, int | float):
        return f'<td class="number" data-key="{cell}">{text}</td>'
    return f'<td class="text">{text}</td>' if table.texts else f"<td>{text}</td>"


def markdown(table: Table) -> str:
    """A table in Markdown, without heading and note."""
    lines = [f"| {' | '.join(table.columns)} |", f"|{' --- |' * len(table.columns)}"]
    lines += [f"| {' | '.join(shown(cell, table.digits) for cell in row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"
