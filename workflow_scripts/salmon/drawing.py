"""The look of pictures: one style, one palette, and the few kinds of axes that all pictures use.

The same numbers give the same file: the SVG has no date and no random names. The colours are those of Okabe and Ito,
which colour-blind people can distinguish. When the colours run out, lines and marks differ.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from salmon.pages import Estimate

mpl.rcParams.update(
    {
        "svg.hashsalt": "salmon",
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#57606a",
        "axes.labelcolor": "#1b1f24",
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": "#e6e9ed",
        "grid.linewidth": 0.8,
        "xtick.color": "#57606a",
        "ytick.color": "#57606a",
        "xtick.labelcolor": "#1b1f24",
        "ytick.labelcolor": "#1b1f24",
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.5,
        "figure.facecolor": "white",
        "figure.constrained_layout.h_pad": 0.08,
        "figure.constrained_layout.w_pad": 0.08,
    }
)
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1f24")
SHADES = DARK, GREY, LIGHT = "#57606a", "#9aa3ad", "#dde2e7"
LINES, MARKS = ("-", "--", ":"), ("o", "s", "^")
CHANCE = 0.5
ROW = 0.26  # height of one line of labels, in inches


def figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, whose parts do not overlap."""
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Figure, file: Path | IO[bytes]) -> None:
    """Write a figure as SVG."""
    drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def style(number: int) -> dict[str, Any]:
    """Colour, line and mark of series number N. They repeat after 21 series."""
    turn = number // len(PALETTE)
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": LINES[turn % len(LINES)],
        "marker": MARKS[turn % len(MARKS)],
    }


def wrapped(text: str, width: int = 26) -> str:
    """A label, broken into several lines."""
    return textwrap.fill(text, width)


def rows(axes: Axes, names: Sequence[str]) -> None:
    """Use names as rows, from top to bottom."""
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def dots(
    axes: Axes,
    names: Sequence[str],
    series: Mapping[str, Sequence[Estimate]],
    *,
    reference: float | None = None,
    first: int = 0,
) -> None:
    """Values with their intervals, one row per name; an unknown value has no dot.

    Args:
        axes: to draw on.
        names: row names.
        series: label -> an estimate for each row; an interval may be null.
        reference: a value to compare with, as a dashed line.
        first: style number of the first series.
    """
    rows(axes, names)
    if reference is not None:
        axes.axvline(reference, color=DARK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for number, (label, estimates) in enumerate(series.items()):
        shift = (number - (len(series) - 1) / 2) * 0.7 / len(series)
        places = np.arange(len(names)) + shift
        values, low, high = (_column(estimates, what) for what in ("value", "low", "high"))
        look = style(first + number)
        axes.hlines(places, low, high, color=look["color"], linewidth=1.4, alpha=0.75)
        axes.plot(
            values,
            places,
            linestyle="none",
            marker=MARKS[number % len(MARKS)],
            markersize=4.5,
            color=look["color"],
            label=label,
        )


def _column(estimates: Sequence[Estimate], what: str) -> npt.NDArray[np.float64]:
    """One field of the estimates; NaN where unknown."""
    return np.array([np.nan if (value := one[what]) is None else value for one in estimates], dtype=np.float64)


def heat_map(
    axes: Axes,
    names: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    low: float,
    high: float,
    digits: int = 2,
    diverging: bool = True,
    bold: Sequence[Sequence[bool]] | None = None,
) -> Any:
    """A table of values: each cell has its value and a colour.

    Args:
        axes: to draw on.
        names: row names.
        columns: column names.
        values: by row and column; None leaves the cell empty.
        low: value at the low end of the colours.
        high: value at the high end.
        digits: decimal digits of the numbers.
        diverging: whether the middle is white; otherwise the low end is.
        bold: which numbers are bold, by row and column.

    Returns:
        The image, for a colour bar.
    """
    table = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
    colours = mpl.colormaps["RdBu" if diverging else "Blues"]
    image = axes.imshow(table, vmin=low, vmax=high, cmap=colours, aspect="auto")
    for row, column in np.ndindex(table.shape):
        value = table[row, column]
        if np.isnan(value):
            continue
        red, green, blue, _ = colours((value - low) / (high - low))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        is_bold = bold is not None and bold[row][column]
        axes.text(
            column,
            row,
            f"{value:.{digits}f}",
            ha="center",
            va="center",
            color="white" if dark else "#1b1f24",
            fontsize=7.5,
            fontweight="bold" if is_bold else "normal",
        )
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", va="top", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return image


def curves(axes: Axes, lines: Mapping[str, tuple[Sequence[float], Sequence[float | None]]]) -> None:
    """Lines over steps; a single step is a mark, an unknown value a gap.

    Args:
        axes: to draw on.
        lines: label -> steps and values. The order of the labels decides their styles.
    """
    for number, (label, (steps, values)) in enumerate(lines.items()):
        look = style(number)
        known = [np.nan if value is None else value for value in values]
        mark = look["marker"] if len(steps) < 3 else "none"
        axes.plot(steps, known, color=look["color"], linestyle=look["linestyle"], marker=mark, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def bars(
    axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]], colours: Mapping[str, str] | None = None
) -> None:
    """Stacked bars, one per name.

    Args:
        axes: to draw on.
        names: row names.
        parts: label -> the length of the part in each row.
        colours: label -> colour; None for the palette.
    """
    rows(axes, names)
    start = np.zeros(len(names))
    for number, (label, lengths) in enumerate(parts.items()):
        colour = colours[label] if colours else style(number)["color"]
        axes.barh(range(len(names)), lengths, 0.72, start, color=colour, label=label, edgecolor="white", linewidth=0.6)
        start += np.asarray(lengths, dtype=float)


def legend(drawn: Figure, axes: Axes, columns: int = 4) -> None:
    """One legend below the whole figure, for the series on one of its axes."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        drawn.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))
