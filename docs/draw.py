"""Draw the pictures of docs/how_it_works.md (`make docs-pictures`); a test fails where a file differs from its picture.

Places are in tenths of an inch, from the upper left corner.
"""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

from salmon.drawing import DARK, GREY, LIGHT, PALETTE, save  # noqa: E402

FOLDER = ROOT / "docs" / "pictures"
WIDTH = 80.0
BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = PALETTE


def tint(colour: str, share: float = 0.25) -> str:
    """A colour mixed with white."""
    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))


class Sheet:
    """A page to draw on."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH / 10, height / 10), facecolor="white")
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, **options: Any) -> None:
        """Words around a place."""
        style: dict[str, Any] = {
            "ha": "center",
            "va": "center" if "\n" in words else "center_baseline",
            "fontsize": 9,
            "color": BLACK,
        }
        style["linespacing"] = 1.25
        self.axes.text(x, y, words, **(style | options))

    def title(self, x: float, y: float, words: str) -> None:
        """The heading of a part."""
        self.text(x, y, words, ha="left", fontweight="bold", fontsize=9.5)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str = "",
        colour: str = "white",
        *,
        edge: str = DARK,
        dashed: bool = False,
        **options: Any,
    ) -> None:
        """A box with words in it."""
        patch = FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.6",
            facecolor=colour,
            edgecolor=edge,
            linewidth=0.9,
            linestyle=(0, (3, 2)) if dashed else "-",
        )
        self.axes.add_patch(patch)
        self.text(x + width / 2, y + height / 2, words, **options)

    def cell(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str = "",
        colour: str = "white",
        *,
        edge: str = "white",
        **options: Any,
    ) -> None:
        """One of many boxes in a row."""
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge, linewidth=1.2))
        self.text(x + width / 2, y + height / 2, words, **options)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], *, bend: float = 0, **options: Any) -> None:
        """An arrow from one place to another."""
        style: dict[str, Any] = {
            "arrowstyle": "-|>",
            "mutation_scale": 9,
            "linewidth": 1.1,
            "color": DARK,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        if bend:
            style["connectionstyle"] = f"arc3,rad={bend}"
        self.axes.add_patch(FancyArrowPatch(start, end, **(style | options)))

    def line(self, *places: tuple[float, float], **options: Any) -> None:
        """A line through places."""
        style: dict[str, Any] = {"color": DARK, "linewidth": 1.0}
        self.axes.plot(*zip(*places, strict=True), **(style | options))

    def brace(self, left: float, right: float, y: float, words: str, **options: Any) -> None:
        """A bracket below a part of a row, with words below it."""
        self.line((left, y), (left, y + 0.8), (right, y + 0.8), (right, y))
        self.text((left + right) / 2, y + 1.4, words, va="top", **options)


PROMPT, FIRST, SECOND, SHOWN = LIGHT, tint(SKY, 0.55), tint(ORANGE, 0.5), tint(GREEN, 0.35)
END = BLUE


def sampling() -> Figure:
    """Two responses per prompt, and what counts for their length."""
    sheet = Sheet(29.5)
    sheet.box(1, 4.5, 15, 6, "prompt", PROMPT)
    sheet.box(28, 3.5, 18, 8, "initial policy\ntemperature 0.7, top-p 1", "white")
    sheet.arrow((16, 7.5), (28, 7.5))
    for top, seed, name, colour in ((3, 42, "response0", FIRST), (9, 43, "response1", SECOND)):
        sheet.arrow((46, 7.5), (61, top + 1.5))
        sheet.text(53.5, 2.8 if top == 3 else 12, f"seed {seed}", fontsize=8.5)
        sheet.box(61, top, 18, 3, name, colour)
    y = 17.5
    parts = (
        (1, 23, "preamble … ### User", tint(GREY, 0.25)),
        (24, 14, "instruction", PROMPT),
        (38, 14, "### Dromedary", PROMPT),
        (52, 21, "response", FIRST),
    )
    sheet.title(1, y - 1.6, "One row")
    for x, width, words, colour in parts:
        sheet.cell(x, y, width, 4, words, colour)
    sheet.cell(73, y, 6, 4, "end", END, color="white", fontweight="bold")
    sheet.brace(1.2, 23.8, y + 4.4, "all prompts begin with this:\nnot counted")
    sheet.brace(24.2, 78.8, y + 4.4, "at most sampling.max_length tokens (768)")
    sheet.text(
        24.2,
        y + 9.7,
        "end: the end token (eos), or the tokens of a stop string (stop);\nnone where no room is left (length)",
        fontsize=8.5,
        ha="left",
    )
    return sheet.figure


def judging() -> Figure:
    """Both orders of a pair under one principle, and what the two scores say."""
    sheet = Sheet(52)
    for x, name, outputs in ((1, "order 12", (0, 1)), (24, "order 21", (1, 0))):
        sheet.title(x, 1.5, name)
        rows: list[tuple[str, str]] = [("instruction", PROMPT)]
        for letter, output in zip("ab", outputs, strict=True):
            rows.append((f"Output ({letter}): response{output}", (FIRST, SECOND)[output]))
        rows += [("Concise: its definition", SHOWN), ("“… the more Concise\noutput is Output (”", "white")]
        y = 3.5
        for words, colour in rows:
            height = 4.6 if "\n" in words else 3.4
            sheet.cell(x, y, 20, height, words, colour, edge=GREY)
            y += height
        sheet.arrow((x + 10, y), (x + 10, y + 2.6))
        sheet.text(x + 10, y + 4, "next token: logit(a), logit(b)", fontsize=8.5)
        formula = "$s_{12}$ = logit(a) − logit(b)" if name == "order 12" else "$s_{21}$ = logit(b) − logit(a)"
        sheet.box(x, y + 5.8, 20, 3.4, formula, "white")
    _plane(sheet.figure.add_axes((0.62, 0.40, 0.355, 0.545)))
    sheet.title(1, 35.5, "One row of the computation: a pair in one order, under all principles")
    y = 38
    sheet.cell(1, y, 30, 4, "head: instruction, Output (a), Output (b)", PROMPT)
    for number, x in enumerate((31, 43, 55, 67)):
        words = ("tail: Concise", "tail: Ethical", "…", "tail: Creative")[number]
        sheet.cell(x, y, 12, 4, words, SHOWN, fontsize=8.5)
        if number != 2:
            sheet.arrow((x + 11.4, y + 6.6), (x + 11.4, y + 4.1))
            sheet.text(x + 11.4, y + 7.6, "a, b", fontsize=8.5, ha="right" if number == 3 else "center")
    sheet.brace(1.2, 30.8, y + 4.4, "computed once")
    sheet.text(
        40,
        y + 11.6,
        "A tail sees the head and itself, and not the other tails. The two logits are read after its last token.",
        fontsize=8.5,
    )
    return sheet.figure


def _plane(axes: Axes) -> None:
    """The two scores of a pair as a point."""
    quadrants = ((0.0, 0.0, FIRST), (-1.0, -1.0, SECOND), (-1.0, 0.0, tint(GREY)), (0.0, -1.0, tint(GREY)))
    for x, y, colour in quadrants:
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5, zorder=0))
    axes.plot([-1, 1], [-1, 1], color=DARK, linewidth=1, linestyle=(0, (4, 3)))
    words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "color": BLACK, "linespacing": 1.25}
    axes.text(0.58, 0.22, "response0\npreferred", **words)
    axes.text(-0.58, -0.22, "response1\npreferred", **words)
    for x, y, first in ((-0.5, 0.6, "second"), (0.5, -0.6, "first")):
        axes.text(x, y, f"no preference:\nthe output shown\n{first} wins", **(words | {"fontsize": 8.5}))
    axes.text(0.62, 0.71, "no position bias", rotation=45, rotation_mode="anchor", **(words | {"fontsize": 8}))
    axes.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[0], yticks=[0], xlabel="$s_{12}$", ylabel="$s_{21}$")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


@dataclass(frozen=True)
class Drawn:
    """A principle of the example of `aggregation`: its scaled score, and whether it is negated."""

    name: str
    score: float
    negated: bool

    @property
    def shown(self) -> float:
        """The score as the record has it."""
        return -self.score if self.negated else self.score


EXAMPLE = (Drawn("Concise", -1.2, True), Drawn("Ethical", 0.4, False), Drawn("Comprehensive", -0.7, False))
DIMENSIONS = (
    "Concise",
    "Honest and Accurate",
    "Ethical",
    "Specific",
    "Educational and Engaging",
    "Methodical",
    "Creative",
    "Comprehensive",
)


def aggregation() -> Figure:
    """The record of one pair in one pass."""
    sheet = Sheet(49)
    sheet.title(1, 1.8, "1. Draw principles")
    drawn = {one.name for one in EXAMPLE}
    for number, name in enumerate(DIMENSIONS):
        chosen = name in drawn
        sheet.cell(1, 4 + 2.9 * number, 20, 2.7, name, SHOWN if chosen else tint(GREY, 0.2), fontsize=8.5)
    sheet.text(
        1, 29, "how many: Geometric(0.2), at most 8;\nwhich: evenly, without replacement", ha="left", fontsize=8.5
    )
    sheet.title(24, 1.8, "2. Negate each with probability 0.5; the largest |score| decides")
    for x, words in ((41.5, "score"), (51.5, "negated"), (66, "score as shown")):
        sheet.text(x, 4.8, words, fontsize=8.5, color=DARK)
    largest = max(EXAMPLE, key=lambda one: abs(one.shown))
    for number, one in enumerate(EXAMPLE):
        y = 6.6 + 5 * number
        sheet.cell(24, y, 13, 3.4, one.name, SHOWN, fontsize=8.5)
        sheet.text(41.5, y + 1.7, f"{one.score:+.1f}".replace("-", "−"))
        sheet.text(51.5, y + 1.7, "yes" if one.negated else "no")
        length = 8 * one.shown
        colour = FIRST if one.shown > 0 else SECOND
        sheet.cell(66 + min(0, length), y + 0.2, abs(length), 3, "", colour, edge=DARK if one is largest else "white")
        beyond = 66 + length + (2.6 if length > 0 else -2.6)
        weight = "bold" if one is largest else "normal"
        sheet.text(beyond, y + 1.7, f"{one.shown:+.1f}".replace("-", "−"), fontweight=weight)
    sheet.line((66, 6), (66, 20.8))
    sheet.text(65, 22.6, "← response1", ha="right", fontsize=8.5)
    sheet.text(67, 22.6, "response0 →", ha="left", fontsize=8.5)
    sheet.text(
        30,
        27.8,
        "The negated Concise decides: response0, the longer answer, wins.\n"
        "A score is 0 where the judge's two orders disagree;\n"
        "where all are 0, there is no record.",
        ha="left",
        fontsize=8.5,
    )
    sheet.title(1, 33.6, "3. Rules, noise, order")
    steps = (
        ("refusal:\nif one answer refuses,\nthe other wins (p = 0.5)", 19),
        ("language:\nonly one in the prompt's,\nit wins; none, no record", 19.5),
        ("label noise:\nflipped (p = 0.1,\nafter a rule 0.25)", 14.5),
        ("order:\nresponse1 becomes\noutput_1 (p = 0.5)", 17),
    )
    x = 1.0
    for words, width in steps:
        sheet.box(x, 35.6, width, 7, words, "white", fontsize=8.5)
        x += width
        if words != steps[-1][0]:
            sheet.arrow((x, 39.1), (x + 2.6, 39.1))
        x += 2.66
    sheet.text(
        1,
        46.2,
        "Record: instruction, output_1, output_2, preference (1 or 2), and the sentences shown: the negative\n"
        "definition of Concise, the plain definitions of Ethical and Comprehensive.",
        ha="left",
        fontsize=8.5,
    )
    return sheet.figure


def reward_model() -> Figure:
    """The texts of a pair, the head, the loss, and the order of the trainings."""
    sheet = Sheet(44)
    sheet.title(1, 1.8, "A record is two texts that differ in the output alone")
    for y, name, output, padding, colour in (
        (4, "output_1", 15.0, 9.0, FIRST),
        (10.5, "output_2", 24.0, 0.0, SECOND),
    ):
        x = 1.0
        for words, width, fill in (
            (name, output, colour),
            ("instruction", 10.0, PROMPT),
            ("principles shown", 14.0, SHOWN),
            ("“The quality of\nthe output is”", 12.0, "white"),
        ):
            sheet.cell(x, y, width, 4, words, fill, edge=GREY, fontsize=8.5)
            x += width
        if padding:
            sheet.cell(x, y, padding, 4, "padding", "white", edge=GREY, fontsize=8, color=DARK)
        sheet.line((x - 0.7, y + 4), (x - 0.7, y + 5.2), (62.5, y + 5.2), color=BLUE)
        sheet.arrow((62.5, y + 5.2), (65, y + 5.2), color=BLUE)
        sheet.box(65, y + 3.7, 14, 3, f"$r_{name[-1]}$ = $w$ · $h$", tint(BLUE, 0.15), edge=BLUE)
    sheet.text(
        1,
        19.4,
        "$h$: last layer's state at the last token of the text; $w$: the head, one row, no bias.\n"
        "Loss of the pair: −log sigmoid( $r$(preferred) − $r$(other) ).",
        ha="left",
        fontsize=8.5,
    )
    sheet.title(1, 24.6, "One backbone, one kind of text, two trainings; RL begins with two copies")
    boxes = (
        (1.0, 15.0, "base model, frozen\n+ new LoRA\n+ new head $w$", "white"),
        (21.0, 17.0, "PMP (models/pmp)\npeople's preferences,\nfixed questions\nas the guideline", tint(GREY, 0.25)),
        (43.0, 17.0, "reward model\nthe judge's records,\ndrawn principles\nas the guideline", SHOWN),
    )
    for x, width, words, fill in boxes:
        sheet.box(x, 27, width, 9, words, fill, fontsize=8.5)
    sheet.arrow((16, 31.5), (21, 31.5))
    sheet.arrow((38, 31.5), (43, 31.5))
    sheet.box(66, 25.6, 13, 5, "reward in RL:\nfrozen", "white", fontsize=8.5)
    sheet.box(66, 32.4, 13, 5, "value in RL:\ntrained", "white", fontsize=8.5)
    sheet.arrow((60, 30.3), (66, 28.1))
    sheet.arrow((60, 32.7), (66, 34.9))
    sheet.text(
        1,
        41.4,
        "LoRA and head are trained and saved, and pass from one training to the next. The base model is the policy's,\n"
        "so that RL holds it once. With reward_model.init: base the middle box is left out.",
        ha="left",
        fontsize=8.5,
    )
    return sheet.figure


STEPS = (
    ("1. sample", "queries\n→ responses"),
    ("2. measure", "log π, log π$_{ref}$, V\nof each token"),
    ("3. score", "principles drawn,\nresponses scored"),
    ("4. estimate", "rewards, GAE,\nwhitening"),
    ("5. update", "clipped losses,\n4 minibatches"),
)
USES = (  # of steps 1 to 5: "" not used, "read" without and "train" with gradients
    ("policy", "trained, from the initial policy", ("read", "read", "", "", "train")),
    ("reference", "frozen: the initial policy", ("", "read", "", "", "")),
    ("value + head", "trained, from the reward model", ("", "read", "", "", "train")),
    ("reward + head", "frozen: the reward model", ("", "", "read", "", "")),
)


def ppo_step() -> Figure:
    """What happens in one step, and which adapter each part uses."""
    sheet = Sheet(43)
    left, width, gap = 20.0, 10.6, 1.5
    centres = [left + number * (width + gap) + width / 2 for number in range(len(STEPS))]
    for number, ((name, words), centre) in enumerate(zip(STEPS, centres, strict=True)):
        sheet.box(centre - width / 2, 2, width, 9, f"\n{words}", "white", fontsize=8)
        sheet.text(centre, 4, name, fontweight="bold")
        if number:
            sheet.arrow((centre - width / 2 - gap, 6.5), (centre - width / 2, 6.5), mutation_scale=7)
    sheet.text(1, 6.5, "576 prompts per step,\neach with its own\nprinciples", ha="left", fontsize=8.5)
    sheet.line((centres[-1], 11), (centres[-1], 13.8), (centres[0], 13.8))
    sheet.arrow((centres[0], 13.8), (centres[0], 11))
    sheet.text((centres[0] + centres[-1]) / 2, 12.5, "next step, with the new policy", fontsize=8.5)
    sheet.title(1, 17, "Four adapters on one base")
    for number, (name, words, uses) in enumerate(USES):
        y = 19.2 + 4.4 * number
        sheet.cell(1, y, 78, 3.9, "", tint(GREY, 0.15))
        sheet.text(1.8, y + 1.25, name, ha="left", fontweight="bold", fontsize=8.5)
        sheet.text(1.8, y + 2.9, words, ha="left", fontsize=8)
        for centre, use in zip(centres, uses, strict=True):
            if use:
                face = RED if use == "train" else "white"
                self_edge = RED if use == "train" else BLUE
                sheet.axes.plot(
                    [centre], [y + 1.95], "o", markersize=9, markerfacecolor=face, markeredgecolor=self_edge, mew=1.8
                )
    y = 19.2 + 4.4 * len(USES)
    sheet.box(1, y, 78, 3, "base model: frozen, in 4 bits, held once", PROMPT)
    for x, face, edge, words in (
        (22, "white", BLUE, "forward pass, no gradient"),
        (48, RED, RED, "forward and backward pass"),
    ):
        sheet.axes.plot([x], [y + 5], "o", markersize=8, markerfacecolor=face, markeredgecolor=edge, mew=1.6)
        sheet.text(x + 1.4, y + 5, words, ha="left", fontsize=8.5)
    return sheet.figure


@dataclass(frozen=True)
class Row:
    """A row of the batch of `positions`: tokens of query and response, and whether the response ended by itself."""

    query: int
    response: int
    ended: bool

    def before(self, step: int) -> int:
        """The position at which response token `step` is predicted and its value is read."""
        return self.query - 1 + step


BATCH = (Row(4, 4, ended=True), Row(3, 6, ended=False))
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def positions() -> Figure:
    """A batch of two rollouts: tokens, where logits and values are read, and the tensors of the responses."""
    sheet = Sheet(78)
    _texts(sheet, 1.6)
    _tensors(sheet, 29.6)
    y = 68.6
    sheet.title(1, y, "The reward model reads its own text; its score is part of S")
    x = 1.0
    parts = (
        ("response as text, without thinking", 24.0, FIRST),
        ("instruction", 10.0, PROMPT),
        ("fixed lines and principles drawn", 21.0, SHOWN),
        ("“… output is”", 9.0, "white"),
    )
    for words, part, colour in parts:
        sheet.cell(x, y + 2.2, part, HIGH, words, colour, edge=GREY, fontsize=8.5)
        x += part
    sheet.line((x - 0.6, y + 5.4), (x - 0.6, y + 6.8), (68, y + 6.8), color=BLUE)
    sheet.arrow((67.5, y + 6.8), (70, y + 6.8), color=BLUE)
    sheet.box(70, y + 5.3, 9, 3, "score", tint(BLUE, 0.15), edge=BLUE)
    return sheet.figure


LEFT, WIDE, HIGH = 20.0, 6.4, 3.2


def _texts(sheet: Sheet, y: float) -> None:
    """Tokens of the batch by position, and where what is computed of them is read."""
    length = max(row.query + row.response for row in BATCH)
    sheet.title(1, y, "Texts: query and response, padded on the right")
    sheet.text(1, y + 2.8, "position", ha="left", color=DARK)
    for place in range(length):
        sheet.text(LEFT + (place + 0.5) * WIDE, y + 2.8, str(place), color=DARK)
    y += 4.4
    for number, row in enumerate(BATCH):
        sheet.text(1, y + HIGH / 2, f"row {number}: tokens", ha="left")
        sheet.text(1, y + HIGH + 4, "logits and values\nare read here", ha="left", fontsize=8.5)
        for place in range(length):
            step = place - row.query
            words, colour, style = ".", "white", {"color": DARK}  # padding
            if step < 0:
                words, colour, style = f"q{place}".translate(SUBSCRIPTS), PROMPT, {}
            elif step < row.response:
                is_end = row.ended and step == row.response - 1
                words = f"r{step}".translate(SUBSCRIPTS) + (" = E" if is_end else "")
                colour, style = (END, {"color": "white"}) if is_end else (FIRST, {})
            sheet.cell(LEFT + place * WIDE, y, WIDE, HIGH, words, colour, edge=GREY, **style)
        for step in range(row.response):
            x = LEFT + (row.before(step) + 0.5) * WIDE
            sheet.text(x, y + HIGH + 4, f"π(r{step}|…)\nV{step}".translate(SUBSCRIPTS), fontsize=8.5)
            sheet.arrow((x, y + HIGH + 2.2), (x + WIDE - 0.4, y + HIGH + 0.15), bend=0.25, mutation_scale=7)
        y += 10.6


def _tensors(sheet: Sheet, y: float) -> None:
    """What PPO knows of each response token."""
    longest = max(row.response for row in BATCH)
    sheet.title(1, y, "Tensors [B, R]: response token t in column t, however long the query")
    sheet.text(1, y + 3, "t", ha="left", color=DARK)
    for step in range(longest):
        sheet.text(LEFT + (step + 0.5) * WIDE, y + 3, str(step), color=DARK)
    y += 4.8
    first = BATCH[0]

    def cells(pattern: str, last: str | None = None) -> list[str]:
        """Words of the first row, `#` being the number of the token."""
        patterns = [pattern] * (first.response - 1) + [last or pattern] + ["."] * (longest - first.response)
        return [each.replace("#", str(step).translate(SUBSCRIPTS)) for step, each in enumerate(patterns)]

    ends = {True: "its end included", False: "has no end: ppo.response_length\nwas reached"}
    lines: list[tuple[str, Sequence[str], str, str]] = [
        (
            f"row {number}: mask",
            [str(int(step < row.response)) for step in range(longest)],
            tint(GREY, 0.2),
            ends[row.ended],
        )
        for number, row in enumerate(BATCH)
    ]
    lines += [
        ("row 0: log π", cells("ℓ#"), FIRST, "at the temperature of sampling;\nlog π$_{ref}$ likewise"),
        ("value", cells("V#"), FIRST, "of the tokens before r$_t$"),
        ("KL", cells("k#"), FIRST, "k$_t$ = log π − log π$_{ref}$"),
        ("reward", cells("−βk#", "−βk#+S"), tint(RED, 0.35), "S: reward of the response,\nat its last token"),
        ("advantage", cells("A#"), tint(RED, 0.35), "the value after the last token is 0"),
        ("return", cells("A#+V#"), tint(RED, 0.35), "of A before it is whitened"),
    ]
    for number, (name, words, colour, note) in enumerate(lines):
        if number == len(BATCH):
            y += 1.2
        sheet.text(1, y + HIGH / 2, name, ha="left")
        for step, word in enumerate(words):
            is_masked = word in (".", "0")
            look = {"fontsize": 8.5, "color": DARK if is_masked else BLACK}
            sheet.cell(LEFT + step * WIDE, y, WIDE, HIGH, word, "white" if is_masked else colour, edge=GREY, **look)
        sheet.text(LEFT + longest * WIDE + 1, y + HIGH / 2, note, ha="left", fontsize=8)
        y += 3.7


PICTURES: dict[str, Callable[[], Figure]] = {
    one.__name__: one for one in (sampling, judging, aggregation, reward_model, ppo_step, positions)
}


def svg(name: str) -> bytes:
    """A picture as it is in its file."""
    stream = io.BytesIO()
    save(PICTURES[name](), stream)
    return stream.getvalue()


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name in PICTURES:
        (FOLDER / f"{name}.svg").write_bytes(svg(name))
    sys.stdout.write(f"wrote {', '.join(PICTURES)} to {FOLDER.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
