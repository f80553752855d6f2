"""Pictures and tables of the report, made from the files of each stage.

The functions take the contents of JSON files and manifests; only `write` touches files: it writes a part to a folder.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from salmon import drawing
from salmon.pages import Cell, Estimate, Table, page

NOTHING: Estimate = {"value": None, "low": None, "high": None, "number": 0}
AGAIN = "move its folder away, so that it is built again"
"""Advice for a file that cannot be read."""
INTERVALS = "In brackets: 95% intervals, from a bootstrap that draws whole prompts, or Wilson's."


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        title: title of the page with its tables.
        tables: the page's tables.
        pictures: file name -> picture.
    """

    title: str
    tables: Sequence[Table]
    pictures: Mapping[str, Figure] = field(default_factory=dict)

    def __add__(self, other: "Part") -> "Part":
        """Both parts together, under the title of the first."""
        return Part(self.title, [*self.tables, *other.tables], {**self.pictures, **other.pictures})

    def write(self, folder: Path) -> None:
        """Write the pictures, and the tables as `table.html`, into a folder."""
        for name, picture in self.pictures.items():
            drawing.save(picture, folder / f"{name}.svg")
        (folder / "table.html").write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """The tables as an HTML page."""
        return page(self.title, self.tables)


# ---- From raw data to records


@dataclass(frozen=True)
class Step:
    """Numbers of rows read, kept, and left out, by reason.

    Attributes:
        stage: the table's name.
        source: the source of the rows; empty if there is only one.
        run: the first run that has the table.
        rows: rows read.
        kept: rows kept.
        left_out: reason -> rows left out.
    """

    stage: str
    source: str
    run: str
    rows: int
    kept: int
    left_out: Mapping[str, int]

    @property
    def label(self) -> str:
        """The label of the step, on one line."""
        run = "" if self.run == "default" else f" ({self.run})"
        return f"{self.stage}{': ' if self.source else ''}{self.source}{run}"


TITLES = {
    "sft_data": "SFT examples",
    "prompts": "prompts",
    "response0": "first responses",
    "response1": "second responses",
    "preferences": "judged pairs",
    "reward_data": "reward model's records",
    "pmp_data": "PMP records",
    "rl_prompts": "RL prompts",
    "evaluation_prompts": "evaluation prompts",
    "evaluation_pairs": "evaluation pairs",
    "initial_answers": "initial policy's answers",
    "answers": "policy's answers",
    "judged_pairs": "people's pairs, judged",
    "answer_judgements": "answers judged against the initial policy's",
    "run_judgements": "answers judged against another run's",
}
"""Tables whose manifests count rows, in the order in which they are made."""
JUDGED = ("preferences", "judged_pairs", "answer_judgements", "run_judgements")


def steps(name: str, run: str, counts: Mapping[str, int]) -> Iterator[Step]:
    """The steps that led to a table, from the counts in its manifest.

    Args:
        name: the table's name, one of `TITLES`.
        run: the first run that has it.
        counts: the counts in its manifest.
    """
    title = TITLES[name]

    def step(source: str, kept: int, left_out: Mapping[str, int], rows: int | None = None) -> Step:
        found = {reason.replace("_", " "): number for reason, number in left_out.items() if number}
        return Step(title, source, run, kept + sum(found.values()) if rows is None else rows, kept, found)

    if name in ("response0", "response1"):
        too_long = counts.get("prompt_too_long", 0)
        yield step("", counts["rows"] - too_long, {"prompt too long": too_long}, counts["rows"])
    elif name in JUDGED:
        reasons = ("prompt_too_long", "too_short", "no_room", "not_answered_by_both")
        left_out = {reason: counts.get(reason, 0) for reason in reasons}
        yield step("", counts["judged"], left_out, counts["pairs"])
    elif name == "reward_data":
        not_judged = counts["pairs_not_judged"]
        yield step("pairs", counts["pairs"] - not_judged, {"not judged": not_judged}, counts["pairs"])
        skipped = {key.removeprefix("skipped_"): n for key, n in counts.items() if key.startswith("skipped_")}
        yield step("draws of principles", counts["records"], skipped)
    elif name in ("initial_answers", "answers"):
        too_long = counts["longer_than_query_length"]
        yield step("", counts["answers"], {"longer than query length": too_long}, counts["prompts"])
    else:
        sources: dict[str, dict[str, int]] = {}
        for key, number in counts.items():
            source, _, what = key.rpartition(": ")
            sources.setdefault(source, {})[what] = number
        for source, here in sources.items():
            kept, rows = here.pop("kept", 0), here.pop("rows", None)
            yield step(source, kept, here, rows)


REASONS = 6  # reasons with a separate colour
LIMIT, OTHERS = "over the limit", "other reasons"


def funnel(found: Sequence[Step]) -> Part:
    """Rows from raw data to records: how many were kept, and why the others were not.

    The judgements of two runs are in the table only, because there may be dozens of them.
    """
    every, found = found, [one for one in found if one.stage != TITLES["run_judgements"]]
    totals: defaultdict[str, float] = defaultdict(float)
    for one in found:
        for reason, number in one.left_out.items():
            totals[reason] += number / max(1, one.rows)
    by_size = sorted(totals.items(), key=lambda pair: (-pair[1], pair[0]))
    named = [reason for reason, _ in by_size if reason != LIMIT][:REASONS]
    parts = {what: [0.0] * len(found) for what in ("kept", *named, OTHERS, LIMIT)}
    for row, one in enumerate(found):
        parts["kept"][row] = one.kept / max(1, one.rows)
        for reason, number in one.left_out.items():
            parts[reason if reason in parts else OTHERS][row] += number / max(1, one.rows)
    colours = dict(zip(("kept", *named), drawing.PALETTE, strict=False))
    colours |= {OTHERS: drawing.GREY, LIMIT: drawing.LIGHT}
    parts = {what: shares for what, shares in parts.items() if any(shares)}
    drawn = drawing.figure(9.5, 1.1 + drawing.ROW * len(found))
    axes = drawn.subplots()
    labels = [one.label for one in found]
    drawing.bars(axes, labels, parts, colours)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlim=(0, 1), xlabel="share of the rows read")
    axes.xaxis.set_major_formatter("{x:.0%}")
    for row, one in enumerate(found):
        axes.text(1.01, row, f"{one.kept:,} of {one.rows:,}", va="center", fontsize=8.5)
    drawing.legend(drawn, axes)
    columns = ["table", "source", "run", "rows", "kept", "left out", "why"]
    rows: list[list[Cell]] = [
        [one.stage, one.source, one.run, one.rows, one.kept, one.rows - one.kept, _reasons(one)] for one in every
    ]
    note = "From the manifest of each table. A run has a separate row if no earlier run has the same table."
    return Part("From raw data to records", [Table("", columns, rows, note)], {"funnel": drawn})


def _reasons(one: Step) -> str:
    """The reasons for leaving out rows, the most frequent first."""
    ordered = sorted(one.left_out.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{reason} {number:,}" for reason, number in ordered)


# ---- Judge


def judge(found: Mapping[str, Any]) -> Part:
    """Agreement of both orders, position bias, margins, and how principles correlate (`evaluation.judge`)."""
    measured: Mapping[str, Mapping[str, Estimate]] = found["principles"]
    labelled: Mapping[str, Mapping[str, Mapping[str, Estimate]]] = found.get("labelled") or {}
    names = list(measured)
    drawn = drawing.figure(15 if labelled else 11, 1.0 + drawing.ROW * max(6, len(names)) * 1.1)
    panels = drawn.subplots(1, 4 if labelled else 3, sharey=True)
    left, middle, right = panels[:3]
    drawing.dots(left, names, {"": [measured[name]["agree"] for name in names]})
    left.set(xlim=(-0.02, 1.02), title="Both orders agree", xlabel="share of pairs")
    if labelled:
        people = {
            source: [by_principle.get(name, {}).get("right", NOTHING) for name in names]
            for source, by_principle in labelled.items()
        }
        drawing.dots(panels[3], names, people, reference=drawing.CHANCE)
        panels[3].set(xlim=(-0.02, 1.02), title="Agreement with people", xlabel="share of pairs")
        drawing.legend(drawn, panels[3])
    drawing.dots(middle, names, {"": [measured[name]["bias"] for name in names]}, reference=0)
    middle.set(title="Position bias", xlabel="advantage of the output read first")
    drawing.dots(right, names, {"": [measured[name]["margin"] for name in names]})
    right.set(title="Margin", xlabel="absolute mean of both orders")
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    square = drawing.figure(3.6 + 0.4 * len(names), 2.1 + 0.4 * len(names))
    axes = square.subplots()
    image = drawing.heat_map(axes, names, names, found["correlation"], low=-1, high=1)
    axes.set_title("Correlation of principles over the pairs")
    axes.set_aspect("equal")
    square.colorbar(image, ax=axes, shrink=0.8, label="Pearson's correlation")
    columns = ["principle", "pairs", "orders agree", "prefers output 1", "position bias", "margin", "a score is 0"]
    order = ("agree", "first", "bias", "margin", "zeros")
    rows: list[list[Cell]] = [
        [name, measured[name]["agree"]["number"], *(measured[name][what] for what in order)] for name in names
    ]
    correlations = [[name, *row] for name, row in zip(names, found["correlation"], strict=True)]
    note = (
        "How often both orders prefer the same output; of these, how often output 1; the advantage of the output that "
        f"is read first; the absolute mean of both orders; how often a score is 0. {INTERVALS}"
    )
    tables = [Table("Judgements", columns, rows, note), Table("Correlation", ["principle", *names], correlations)]
    if labelled:
        columns = ["pairs", "principle", "orders agree", "right", "right, by the mean of both orders"]
        rows = [
            [source, name, *(one.get(what) for what in ("agree", "right", "mean_right"))]
            for source, by_principle in labelled.items()
            for name, one in by_principle.items()
        ]
        note = (
            "How often the judge prefers the output that people prefer (a half if its two orders disagree), and how "
            f"often the mean of both orders does. {INTERVALS}"
        )
        tables.append(Table("Pairs that people compared", columns, rows, note))
    return Part("The judge", tables, {"judge": drawn, "correlation": square})


# ---- Trainings with a loss


def model_training(title: str, metrics: Mapping[str, Any]) -> Part:
    """The training of an adapter: its loss, and the measurements on held-out data (metrics.json)."""
    log, held_out = metrics["training"], metrics["evaluation"]
    drawn = drawing.figure(9.5, 3.0)
    left, right = drawn.subplots(1, 2)
    at = [entry["step"] for entry in log]
    drawing.curves(left, {"training": (at, [entry["loss"] for entry in log])})
    if held_out.get("loss") is not None:
        left.axhline(held_out["loss"], color=drawing.PALETTE[1], linestyle="--", label="held out, at the end")
    before = held_out.get("base_model", {}).get("loss")
    if before is not None:
        left.axhline(before, color=drawing.GREY, linestyle="--", label="held out, base model")
    left.set(title="Loss", xlabel="step")
    left.legend()
    drawing.curves(right, {"norm": (at, [entry["grad_norm"] for entry in log])})
    right.set(title="Gradient norm", xlabel="step")
    values = {what: value for what, value in held_out.items() if isinstance(value, int | float)}
    values |= {f"{what}, base model": value for what, value in held_out.get("base_model", {}).items()}
    tables = [Table("Held out", ["", "value"], [[what.replace("_", " "), value] for what, value in values.items()])]
    ends = [("first step", log[0]), ("last step", log[-1])] if log else []
    columns = ["", "step", "loss", "gradient norm", "learning rate"]
    rows: list[list[Cell]] = [
        [label, one["step"], one["loss"], one["grad_norm"], f"{one['learning_rate']:.3g}"] for label, one in ends
    ]
    tables.append(Table("Training", columns, rows, digits=3))
    return Part(title, tables, {"training": drawn})


WAYS = {"plain": "as it is", "negated": "negated", "turned": "reversed in the record"}


def reward_model(title: str, found: Mapping[str, Any]) -> Part:
    """Accuracy on held-out records by principle, calibration, and agreement with people (`evaluate_reward_model`)."""
    pictures: dict[str, Figure] = {}
    tables: list[Table] = []
    if held_out := found.get("held_out"):
        deciding: Mapping[str, Mapping[str, Any]] = held_out["deciding"]
        names = list(deciding)
        drawn = drawing.figure(10.5, 1.9 + drawing.ROW * 1.3 * max(7, len(names)))
        left, right = drawn.subplots(1, 2, width_ratios=[1.35, 1])
        series = {label: [deciding[name][way] for name in names] for way, label in WAYS.items()}
        drawing.dots(
            left,
            [*names, "all records"],
            {
                label: [*rows, held_out["accuracy"] if label == WAYS["plain"] else NOTHING]
                for label, rows in series.items()
            },
            reference=drawing.CHANCE,
        )
        left.set(xlim=(-0.02, 1.02), title="Accuracy, by deciding principle", xlabel="share of held-out records")
        drawing.legend(drawn, left)
        _calibration(right, held_out["calibration"], deciding)
        pictures["accuracy"] = drawn
        columns = ["principle", *WAYS.values(), "changes its mind", "calibration error"]
        columns += [f"calibration error, {label}" for label in WAYS.values()]
        rows: list[list[Cell]] = [
            [
                name,
                *(deciding[name][way] for way in WAYS),
                held_out["flips"].get(name),
                (deciding[name].get("calibration") or {}).get("error"),
                *(deciding[name].get("calibration_error", {}).get(way) for way in WAYS),
            ]
            for name in names
        ]
        none = [None] * len(WAYS)
        rows.append(["all records", held_out["accuracy"], *none, held_out["calibration"]["error"], *none])
        note = (
            "How often the preferred output has the higher reward when the deciding principle is shown plain, and when "
            "it is shown negated; how often the other output has it when only this principle is reversed; and how "
            f"often the higher reward changes sides when a principle is reversed. {INTERVALS}"
        )
        if "clean" in held_out:
            columns.append("clean labels")
            for row, one in zip(rows, [*deciding.values(), held_out], strict=True):
                row.append(one["clean"])
            note += " Clean labels are those that no noise has reversed and on which both orders of the judge agree."
        tables.append(Table("Held-out records", columns, rows, note))
    if people := found.get("people"):
        ways = list(people)
        sources = sorted({source for way in people.values() for source in way})
        drawn = drawing.figure(8.5, 1.4 + drawing.ROW * max(1, 0.5 * len(sources)) * len(ways))
        axes = drawn.subplots()
        by_source = {source: [people[way].get(source, NOTHING) for way in ways] for source in sources}
        drawing.dots(axes, [_shown(way) for way in ways], by_source, reference=drawing.CHANCE)
        axes.set(xlim=(-0.02, 1.02), title="Agreement with people, by the principles shown", xlabel="share of pairs")
        drawing.legend(drawn, axes)
        pictures["people"] = drawn
        rows = [[_shown(way), *(people[way].get(source) for source in sources)] for way in ways]
        note = f"How often the output that people preferred has the higher reward. {INTERVALS}"
        tables.append(Table("Agreement with people", ["principles shown", *sources], rows, note))
    if before := found.get("held_out_of_pmp"):
        note = (
            "How often the output that people preferred has the higher reward, on the pairs that PMP held out, with "
            f"all principles shown. {INTERVALS}"
        )
        rows = [[source, one["number"], one] for source, one in before.items()]
        tables.append(Table("Agreement with people, held out of PMP", ["source", "pairs", "right"], rows, note))
    if subsets := found.get("subsets"):
        rows = [
            [source, subset, one["number"], one] for source, here in subsets.items() for subset, one in here.items()
        ]
        note = f"The same by part of the source, with all principles shown. {INTERVALS}"
        tables.append(Table("Agreement with people, by subset", ["source", "subset", "pairs", "right"], rows, note))
    return Part(title, tables, pictures)


def _shown(way: str) -> str:
    return "all principles" if way == "all" else way


def _calibration(axes: Any, whole: Mapping[str, Any], deciding: Mapping[str, Mapping[str, Any]]) -> None:
    """Probabilities against observed shares: of all records and, in grey, of each principle."""
    axes.plot([0, 1], [0, 1], color=drawing.DARK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    label: str | None = "of one principle"
    for one in deciding.values():
        if bins := (one.get("calibration") or {}).get("bins"):
            axes.plot(*_points(bins), color=drawing.GREY, linewidth=0.8, label=label)
            label = None
    bins = whole["bins"]
    axes.plot(*_points(bins), color=drawing.PALETTE[0], label="all records")
    most = max((one["number"] for one in bins), default=1)
    axes.scatter(*_points(bins), s=[12 + 90 * one["number"] / most for one in bins], color=drawing.PALETTE[0], zorder=3)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", title="Calibration")
    axes.set(xlabel="probability of output 1", ylabel="observed share")
    axes.legend(loc="upper left")


def _points(bins: Iterable[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [one["expected"] for one in bins], [one["observed"] for one in bins]


# ---- PPO

CURVES = {
    "score": "Reward model's score",
    "kl_sequence": "KL to the initial policy",
    "response_tokens": "Tokens of a response",
    "entropy": "Entropy per token",
    "finished": "Share that ends by itself",
    "value_error": "Squared error of the value model",
}
"""Key in metrics.jsonl -> its label."""
SECONDS = {"seconds_sampling": "sampling", "seconds_measuring": "measuring", "seconds_updating": "updating"}
END = 10  # the end is the last of this many parts of the steps


def training(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Part:
    """PPO of all runs: curves over the steps, and the time by part.

    Args:
        runs: run -> entries of its metrics.jsonl, in order.
    """
    drawn = drawing.figure(11, 5.6 + 0.5 * drawing.ROW * len(runs))
    panels = drawn.subplot_mosaic(
        [[*list(CURVES)[:3]], [*list(CURVES)[3:]], ["seconds"] * 3],
        height_ratios=[1, 1, 0.25 + 0.13 * len(runs)],
    )
    for key, title in CURVES.items():
        lines = {run: ([e["step"] for e in entries], [e.get(key) for e in entries]) for run, entries in runs.items()}
        drawing.curves(panels[key], lines)
        panels[key].set(title=title, xlabel="step")
    panels["finished"].set(ylim=(-0.03, 1.03))
    if all(error > 0 for entries in runs.values() for entry in entries for error in (entry.get("value_error") or 0,)):
        panels["value_error"].set_yscale("log")
    drawing.legend(drawn, panels["score"], columns=8)
    spent = {
        label: [sum(entry.get(key, 0.0) for entry in entries) / 60 for entries in runs.values()]
        for key, label in SECONDS.items()
    }
    drawing.bars(panels["seconds"], list(runs), spent, dict(zip(spent, drawing.SHADES, strict=True)))
    panels["seconds"].set(title="Time by part", xlabel="minutes")
    panels["seconds"].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    columns = ["run", "steps", *(f"{title}, {when}" for title in CURVES.values() for when in ("first step", "end"))]
    columns += [f"seconds of {label}" for label in SECONDS.values()]
    rows: list[list[Cell]] = []
    for run, entries in runs.items():
        ends = [value for key in CURVES for value in (entries[0].get(key), _mean_at_end(entries, key))]
        rows.append([run, len(entries), *ends, *(sum(entry.get(key, 0.0) for entry in entries) for key in SECONDS)])
    note = "The end is the mean of the last tenth of the steps. The policy's folder has every step in metrics.jsonl."
    return Part("PPO", [Table("", columns, rows, note)], {"training": drawn})


def _mean_at_end(entries: Sequence[Mapping[str, float]], key: str) -> float | None:
    """Mean over the last tenth of the steps."""
    last = [entry[key] for entry in entries[-max(1, len(entries) // END) :] if entry.get(key) is not None]
    return sum(last) / len(last) if last else None


# ---- Policies

BEHAVIOUR = {
    "words": "Words",
    "finished": "Ends by itself",
    "language_kept": "Language kept",
    "refusals": "Refusals",
    "window_distinct_2": "Distinct pairs in 20 words",
    "kl": "KL to the initial policy",
}
"""Key in policies.json -> its label. The picture shows these; the table shows more."""


def policies(found: Mapping[str, Any]) -> Part:
    """How policies behave, and which principles they serve: principles x runs (`evaluate_policies`)."""
    names: list[str] = found["names"]
    behaviour: Mapping[str, Mapping[str, Estimate]] = found["behaviour"]
    pictures = {"behaviour": _behaviour(names, behaviour)}
    quantities = list(behaviour[names[0]])
    rows: list[list[Cell]] = [[name, *(behaviour[name].get(what) for what in quantities)] for name in names]
    columns = ["policy", *(BEHAVIOUR.get(what, what.replace("_", " ").capitalize()) for what in quantities)]
    tables = [Table("How policies answer", columns, rows, INTERVALS)]
    initial: dict[str, str] = found["initial"]
    runs = list(initial)
    for number, (model, principles) in enumerate(found["wins"].items()):
        whose = "" if len(found["wins"]) == 1 else f" of {model}"
        name = "principles" if len(found["wins"]) == 1 else f"principles_{model}"
        pictures[name] = _principles(initial, principles, found["judge"] if number == 0 else {}, whose)
        heading = f"Answers with a higher score than the initial policy's, by the reward model{whose}"
        note = f"Share of prompts; 0.5 means no difference. {INTERVALS}"
        rows = [
            [label, *((values.get(run) or {}).get(other) for run, other in initial.items())]
            for label, values in _by_principle(principles)
        ]
        tables.append(Table(heading, ["principle", *runs], rows, note))
        heading = f"Mean score, by the reward model{whose}"
        rows = [
            [label, *(values.get(policy) for policy in names)]
            for label, values in _by_principle(found["scores"][model])
        ]
        tables.append(Table(heading, ["principle", *names], rows, INTERVALS))
    if found["judge"]:
        rows = [
            [one, *((of.get(run) or {}).get(other) for run, other in initial.items())]
            for one, of in found["judge"].items()
        ]
        note = f"Share of prompts. A prompt counts half if the judge's two orders disagree. {INTERVALS}"
        tables.append(Table("Answers that the judge prefers to the initial policy's", ["principle", *runs], rows, note))
    others: list[list[Cell]] = [
        [principle, run, other, one]
        for principle, wins in found.get("versus", {}).items()
        for run, of_others in wins.items()
        for other, one in of_others.items()
    ]
    if others:
        note = f"Share of prompts. A prompt counts half if the judge's two orders disagree. {INTERVALS}"
        columns = ["principle", "run", "against", "share"]
        tables.append(Table("Runs against each other, by the judge", columns, others, note))
    if found.get("endpoint"):
        columns = ["run", "against", "answers to", "share", "both orders agree", "prefers the first answer"]
        rows = [
            [run, other, kind, *(one[what] for what in ("won", "agree", "first"))]
            for run, of_others in found["endpoint"].items()
            for other, kinds in of_others.items()
            for kind, one in kinds.items()
        ]
        heading = "Answers that the model behind the endpoint prefers to the initial policy's"
        note = (
            "Share of the prompts that it judged in both orders (a prompt counts half if these disagree or tie); how "
            f"often both say the same; and how often the answer shown first is preferred, if one is. {INTERVALS}"
        )
        tables.append(Table(heading, columns, rows, note))
    for model, principles in found["wins"].items():
        rows = [
            [label, run, other, estimate]
            for label, values in _by_principle(principles)
            for place, run in enumerate(runs)
            for other, estimate in (values.get(run) or {}).items()
            if other in runs[place + 1 :]
        ]
        if rows:
            whose = "" if len(found["wins"]) == 1 else f" of {model}"
            heading = f"Runs against each other, by the reward model{whose}"
            note = f"Share of prompts on which the run scores higher than the other run. {INTERVALS}"
            tables.append(Table(heading, ["principle", "run", "against", "share"], rows, note))
    return Part("Policies", tables, pictures)


def _by_principle(principles: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Principles, plain and negated, with their measurements by policy."""
    for name, ways in principles.items():
        for way, values in sorted(ways.items(), reverse=True):  # plain, then negated
            yield (name if way == "plain" else f"{name}, negated"), values


def _behaviour(names: Sequence[str], behaviour: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    shown = [what for what in BEHAVIOUR if what in behaviour[names[0]]]
    drawn = drawing.figure(11, 2 * (0.95 + drawing.ROW * len(names)))
    panels = drawn.subplots(2, -(-len(shown) // 2), sharey=True, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, what in zip(panels.flat, shown, strict=False):
        drawing.dots(axes, names, {"": [behaviour[name][what] for name in names]})
        axes.set_title(BEHAVIOUR[what])
        if what not in ("words", "kl"):
            axes.set_xlim(-0.03, 1.03)
    for axes in panels[:, 1:].flat:
        axes.tick_params(labelleft=False)
    return drawn


def _principles(
    initial: Mapping[str, str], principles: Mapping[str, Any], judged: Mapping[str, Any], whose: str
) -> Figure:
    """Share of prompts on which a run beats its initial policy, according to reward model and judge."""

    def cells(values: Mapping[str, Any]) -> list[Estimate]:
        return [(values.get(run) or {}).get(other) or NOTHING for run, other in initial.items()]

    names = list(principles)
    tables = {
        f"Reward model{whose}, principle {label}": [cells(ways.get(way) or {}) for ways in principles.values()]
        for way, label in (("plain", "as it is"), ("negated", "negated"))
    }
    if judged:
        tables["Judge"] = [cells(judged.get(one) or {}) for one in names]
    width = max(1.6, 0.37 * len(initial))
    drawn = drawing.figure(2.9 + (width + 0.3) * len(tables), 1.9 + 1.15 * drawing.ROW * len(names))
    panels = drawn.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(panels, tables.items(), strict=True):
        image = drawing.heat_map(
            axes,
            names,
            list(initial),
            [[cell["value"] for cell in row] for row in rows],
            low=0,
            high=1,
            bold=[[_is_clear(cell) for cell in row] for row in rows],
        )
        axes.set_title(drawing.wrapped(title, int(width * 12)))
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    drawn.colorbar(image, ax=list(panels), label="share of prompts, against the initial policy", pad=0.015)
    return drawn


def _is_clear(cell: Estimate) -> bool:
    """Whether the interval excludes 0.5, where neither side wins more often."""
    low, high = cell["low"], cell["high"]
    return low is not None and high is not None and not low <= drawing.CHANCE <= high


# ---- Benchmarks


def tasks(found: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float | int | None]]]]) -> Part:
    """Benchmarks of all policies (`evaluate_tasks`).

    Args:
        found: policy -> task -> metric -> `value`, `low` and `high` of its interval, and `number` of questions.
    """
    asked = list(dict.fromkeys((task, metric) for one in found.values() for task in one for metric in one[task]))
    columns = {
        policy: [one.get(task, {}).get(metric, NOTHING) for task, metric in asked] for policy, one in found.items()
    }
    shares = [row for row in range(len(asked)) if all(_is_share(estimates[row]) for estimates in columns.values())]
    names = [f"{asked[row][0]}, {asked[row][1]}" for row in shares]
    drawn = drawing.figure(9, 1.4 + drawing.ROW * len(names) * max(1, 0.5 * len(found)))
    axes = drawn.subplots()
    drawing.dots(axes, names, {policy: [estimates[row] for row in shares] for policy, estimates in columns.items()})
    axes.set(xlim=(-0.02, 1.02), title="Benchmarks")
    drawing.legend(drawn, axes, columns=6)
    rows: list[list[Cell]] = [
        [task, metric, *(estimates[row] for estimates in columns.values())] for row, (task, metric) in enumerate(asked)
    ]
    note = (
        "In brackets: 95% intervals by question, or plus or minus 1.96 times lm-eval's standard error if a metric is "
        "not a mean over the items. The picture shows the metrics that are shares."
    )
    return Part("Benchmarks", [Table("", ["task", "metric", *columns], rows, note, digits=3)], {"tasks": drawn})


def _is_share(one: Estimate) -> bool:
    return one["value"] is None or 0 <= one["value"] <= 1


# ---- Samples

LONGEST = 2000  # characters shown of an answer


def samples(prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> Part:
    """Answers of all policies side by side.

    Args:
        prompts: the prompts.
        answers: policy -> its answers, in the same order.
    """
    rows = [
        [_cut(prompt), *(_cut(texts[number]) for texts in answers.values())] for number, prompt in enumerate(prompts)
    ]
    return Part("Samples of answers", [Table("", ["prompt", *answers], rows, texts=True)])


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
