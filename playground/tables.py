"""Tables of the playground as HTML."""

from collections.abc import Iterable, Sequence
from html import escape

from playground.results import Policy
from playground.workbench import Verdict

CSS = """
.salmon {border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums}
.salmon th, .salmon td {padding: .35em .7em; border-bottom: 1px solid var(--border-color-primary); text-align: right}
.salmon th:first-child, .salmon td:first-child {text-align: left}
.salmon td.best {font-weight: 700}
.salmon td span {display: block; height: .3em; border-radius: .15em; background: #e07a5f; margin: .2em 0 0 auto}
.salmon td.best span {background: #3d7ea6}
.salmon small {display: block; font-weight: 400; opacity: .75; max-width: 22em}
.salmon-note {opacity: .75}
"""


def note(text: str) -> str:
    """A sentence in a table's place."""
    return f'<p class="salmon-note">{escape(text)}</p>'


def table(columns: Sequence[str], rows: Iterable[str]) -> str:
    """A table of rows that are HTML already."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return f'<table class="salmon"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def scores(names: Sequence[str], rows: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """Rewards of answers (columns) under principles (rows), with bars from the lowest of a row to its highest.

    Args:
        names: of the policies that have answered.
        rows: label of what is shown, its sentence, and one reward per policy.
    """

    def row(label: str, sentence: str, values: Sequence[float]) -> str:
        low, high = min(values), max(values)
        cells = []
        for name, value in zip(names, values, strict=True):
            width = 100 * (value - low) / (high - low) if high > low else 0
            best = ' class="best"' if len(values) > 1 and value == high else ""
            bar = f'<span style="width: {width:.0f}%"></span>'
            marks = f'data-shown="{escape(label)}" data-policy="{escape(name)}"'
            cells.append(f"<td{best} {marks}>{value:+.3f}{bar}</td>")
        return f"<tr><td>{escape(label)}<small>{escape(sentence)}</small></td>{''.join(cells)}</tr>"

    explained = note(
        "Rewards of each answer (columns) when the reward model is shown the principle of the row. Compare only "
        "numbers within a row; the highest is in bold."
    )
    return table(["shown", *names], [row(*one) for one in rows]) + explained


def verdicts(first: str, second: str, found: Sequence[Verdict]) -> str:
    """What the judge says, by principle."""

    def row(one: Verdict) -> str:
        if one.s12 > 0 and one.s21 > 0:
            said = first
        elif one.s12 < 0 and one.s21 < 0:
            said = second
        else:
            said = "the orders disagree"
        return (
            f"<tr><td>{escape(one.dimension)}</td><td>{one.s12:+.2f}</td><td>{one.s21:+.2f}</td>"
            f'<td data-verdict="{escape(one.dimension)}">{escape(said)}</td></tr>'
        )

    explained = note(
        f"Log odds that the judge prefers the answer of {first} to that of {second}, where it reads that one first and "
        "where it reads it second. A verdict counts where both have the same sign."
    )
    return table(["principle", "read first", "read second", "preferred"], map(row, found)) + explained


def judge_prompts(found: Sequence[Verdict]) -> str:
    """The prompts of the judge, folded."""
    return "".join(
        f"<details><summary>The judge's prompt: {escape(one.dimension.removesuffix(', negated'))}, {order}</summary>"
        f"<pre>{escape(text)}</pre></details>"
        for one in found
        for order, text in zip(("one answer first", "the other first"), one.prompts, strict=True)
    )


def merged(parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Titles and texts, those with the same text under one title."""
    by_text: dict[str, list[str]] = {}
    for title, text in parts:
        by_text.setdefault(text, []).append(title)
    return [("; ".join(titles), text) for text, titles in by_text.items()]


def runs(policies: Sequence[Policy]) -> str:
    """The trained policies: what they were shown, and how RL went."""

    def row(one: Policy) -> str:
        shown = ", ".join(principle.dimension for principle in one.principles) or "none"
        cells = [one.name, shown, str(len(one.steps))]
        for key in ("score", "kl_sequence", "response_tokens"):
            curve = one.curve(key)
            cells.append("" if curve is None else f"{curve[0]:.2f} → {curve[1]:.2f}")
        return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"

    columns = [
        "run",
        "principles shown in RL",
        "steps",
        "reward model's score",
        "KL to the initial policy, nats",
        "tokens",
    ]
    trained = [one for one in policies if one.folder]
    return table(columns, map(row, trained)) + note(
        "At the first step, and on average over the last tenth of the steps."
    )
