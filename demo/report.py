"""The demo's measurements as tables and pictures, from one run or from several with different seeds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from salmon import drawing, figures, pages

STEERED = ("Concise", "Comprehensive", "Methodical")


@dataclass(frozen=True, slots=True)
class Target:
    """A number that the demo measures, and its bound.

    Attributes:
        name: the number's name in `headline`.
        label: its description.
        bound: bound: for its mean over seeds: a minimum (for the control run: a maximum of the absolute value); None if
            it is only for comparison.
        loose: the same for one seed in the tests, which allows for chance.
        kind: its format: a share, a ratio, or points of 100.
    """

    name: str
    label: str
    bound: float | None
    loose: float | None
    kind: str = "{:.2f}"

    @property
    def control(self) -> bool:
        """Whether the number belongs to the control run, and must stay within its bound."""
        return self.name.startswith("gain_control")

    def reached(self, value: float, bound: float) -> bool:
        """Whether the value is on the right side of a bound."""
        return abs(value) < bound if self.control else value >= bound

    def demand(self) -> str:
        """The bound in words; empty for a number that is only for comparison."""
        if self.bound is None:
            return ""
        if self.control:
            return f"within {self.bound:.0f} of 0"
        return f"at least {self.kind.format(self.bound)}"


RATIO, POINTS = "{:.2f} x", "{:+.0f}"
TARGETS = (
    Target("judge_mean", "judge: right where both orders agree, mean over the dimensions", 0.90, 0.85),
    Target("judge_worst", "the same, worst dimension", 0.75, 0.70),
    Target("orders_agree", "to compare: how often both orders agree, mean over the dimensions", None, None),
    Target("pmp_plain", "reward model after PMP, before the judge's records: right by a principle", None, None),
    Target("pmp_negated", "the same: right by a negated principle", None, None),
    Target("reward_plain", "reward model: right by a principle", 0.85, 0.80),
    Target("reward_negated", "reward model: right by a negated principle", 0.85, 0.80),
    Target("reward_flips", "reward model: changes its mind when the one principle shown is negated", 0.85, 0.75),
    Target("drawn_flips", "the same for the deciding one, among up to two others that stay", None, None),
    Target("summed_judgements_flips", "to compare: the judge's scores of these principles, added up", None, None),
    Target("summed_oracles_flips", "to compare: the oracles' differences, added up", None, None),
    Target("length_ratio", "mean length, policy `comprehensive` over `concise`", 1.8, 1.5, RATIO),
    Target("gain_concise", "policy `concise`: points of conciseness won", 20, 15, POINTS),
    Target("gain_comprehensive", "policy `comprehensive`: points of comprehensiveness won", 20, 5, POINTS),
    Target("gain_methodical", "policy `methodical`: points of order won", 20, 15, POINTS),
    Target("gain_control_concise", "policy `control`, no principles: points of conciseness won", 10, 25, POINTS),
    Target("gain_control_comprehensive", "the same: points of comprehensiveness won", 10, 25, POINTS),
    Target("gain_control_methodical", "the same: points of order won", 10, 25, POINTS),
    Target("least_over_control", "least of what the three won in their own dimension over `control`", 10, 5, POINTS),
)


def headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The measured numbers of `TARGETS`, from the results of `evaluate_demo`."""
    judge = list(results["judge"].values())
    right = [numbers["right"] for numbers in judge]
    values = {"judge_mean": statistics.mean(right), "judge_worst": min(right)}
    values["orders_agree"] = statistics.mean(numbers["orders_agree"] for numbers in judge)
    for stage, prefix in (("pmp", "pmp"), ("reward_model", "reward")):
        for kind in ("plain", "negated"):
            if stage in results:
                values[f"{prefix}_{kind}"] = statistics.mean(numbers[kind] for numbers in results[stage].values())
    if "sign_flips" in results:
        values["reward_flips"] = statistics.mean(numbers["flips"] for numbers in results["reward_model"].values())
        values["drawn_flips"] = results["sign_flips"]["flips"]
        values["summed_judgements_flips"] = results["sign_flips"]["flips_of_summed_judgements"]
        values["summed_oracles_flips"] = results["sign_flips"]["flips_of_summed_oracles"]
    policies = results.get("policies", {})
    if {"concise", "comprehensive"} <= set(policies):
        values["length_ratio"] = policies["comprehensive"]["mean_words"] / policies["concise"]["mean_words"]
    for dimension in STEERED:
        own = dimension.lower()
        for run, name in ((own, f"gain_{own}"), ("control", f"gain_control_{own}")):
            if run in policies:
                values[name] = policies[run]["oracles"][dimension] - policies["initial"]["oracles"][dimension]
    over = [
        values[f"gain_{d.lower()}"] - values[f"gain_control_{d.lower()}"]
        for d in STEERED
        if f"gain_{d.lower()}" in values
    ]
    if "control" in policies and len(over) == len(STEERED):
        values["least_over_control"] = min(over)
    return values


def tables(evaluations: Sequence[Mapping[str, Any]]) -> list[pages.Table]:
    """The numbers with bounds and the policies: means over the runs, with their range."""
    several = f"mean of {len(evaluations)} seeds (range)" if len(evaluations) > 1 else "measured"
    rows = []
    for target in TARGETS:
        values = [evaluation["headline"].get(target.name) for evaluation in evaluations]
        if None not in values:
            rows.append([target.label, target.demand(), _spread(values, target.kind)])
    numbers = pages.Table("Numbers to reach", ["on held-out instructions", "demanded", several], rows)
    policies = ["initial", *sorted(name for name in evaluations[0]["policies"] if name != "initial")]
    dimensions = sorted(evaluations[0]["policies"]["initial"]["oracles"])
    rows = []
    for name in policies:
        measured = [evaluation["policies"][name] for evaluation in evaluations]
        cells = [_spread([one[key] for one in measured], "{:.1f}") for key in ("mean_words", "kl")]
        cells += [_spread([one["oracles"][dimension] for one in measured], "{:.0f}") for dimension in dimensions]
        rows.append([name, *cells])
    return [numbers, pages.Table("Policies, by the oracles (of 100)", ["policy", "words", "KL", *dimensions], rows)]


def markdown(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The same in Markdown."""
    return "\n".join(map(pages.markdown, tables(evaluations)))


def _spread(values: Sequence[float], kind: str) -> str:
    """A number, or the mean of several and their range."""
    mean = kind.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({kind.format(min(values))} to {kind.format(max(values))})"


def missed(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Missed bounds, one per line: of the means of several seeds, or of one seed, with looser bounds."""
    lines = []
    for target in TARGETS:
        bound = target.bound if len(evaluations) > 1 else target.loose
        values = [evaluation["headline"].get(target.name) for evaluation in evaluations]
        if bound is None:
            continue
        if None in values or not target.reached(statistics.mean(values), bound):
            lines.append(f"{target.label}: {values}, but the bound is {bound:g}")
    return lines


def part(evaluation: Mapping[str, Any]) -> figures.Part:
    """The demo's part of the report: accuracy by dimension and, if there are policies, their lengths and scores."""
    pictures = {"accuracy": _accuracy(evaluation)}
    if len(evaluation["policies"]) > 1:
        pictures |= {"lengths": _lengths(evaluation["policies"]), "scores": _scores(evaluation["policies"])}
    return figures.Part("The demo, measured by its oracles", tables([evaluation]), pictures)


def _accuracy(evaluation: Mapping[str, Any]) -> Figure:
    names = list(evaluation["judge"])
    series = {"judge": [_point(evaluation["judge"][name]["right"]) for name in names]}
    if "reward_model" in evaluation:
        for key in ("plain", "negated"):
            series[f"reward model, {key}"] = [_point(evaluation["reward_model"][name][key]) for name in names]
    drawn = drawing.figure(7, 1.2 + 1.3 * drawing.ROW * len(names))
    axes = drawn.subplots()
    drawing.dots(axes, names, series, reference=drawing.CHANCE)
    axes.set(xlim=(-0.02, 1.02), xlabel="right, by the oracle", title="Judge and reward model")
    drawing.legend(drawn, axes)
    return drawn


def _point(value: float) -> pages.Estimate:
    """A number without an interval."""
    return {"value": value, "low": None, "high": None, "number": 1}


def _lengths(policies: Mapping[str, Any]) -> Figure:
    drawn = drawing.figure(7, 1.0 + 1.6 * drawing.ROW * len(policies))
    axes = drawn.subplots()
    drawing.rows(axes, list(policies))
    words = [numbers["words"] for numbers in policies.values()]
    violins: dict[str, Any] = axes.violinplot(
        words, range(len(policies)), orientation="horizontal", showmeans=True, widths=0.8
    )
    for body in violins["bodies"]:
        body.set(facecolor=drawing.PALETTE[0], alpha=0.35)
    for line in ("cmeans", "cmins", "cmaxes", "cbars"):
        violins[line].set(color=drawing.PALETTE[0], linewidth=1.2)
    axes.set(xlabel="words", xlim=(0, None), title="Length of the answers")
    return drawn


def _scores(policies: Mapping[str, Any]) -> Figure:
    dimensions = list(policies["initial"]["oracles"])
    values = [[policies[name]["oracles"][dimension] for name in policies] for dimension in dimensions]
    drawn = drawing.figure(3.2 + 0.62 * len(policies), 1.5 + 1.2 * drawing.ROW * len(dimensions))
    axes = drawn.subplots()
    image = drawing.heat_map(axes, dimensions, list(policies), values, low=0, high=100, digits=0, diverging=False)
    axes.set_title("Score by the oracles, of 100")
    drawn.colorbar(image, ax=axes)
    return drawn
