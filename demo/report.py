"""What the demo measured, as a table and as pictures; from one run or from several with other seeds."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "salmon"  # so that the same numbers give the same file
from matplotlib import pyplot  # noqa: E402

STEERED = ("Concise", "Comprehensive", "Methodical")


@dataclass(frozen=True, slots=True)
class Target:
    """A number that the demo measures, and what it has to reach.

    Attributes:
        name: of the number, in `headline`.
        label: what it is.
        bound: what its mean over seeds has to reach (for the control run: stay below, in either direction); None where
            it is there to compare with.
        loose: the same for one seed in the tests, where chance has its part.
        kind: how it is written: a share, a ratio, or points of 100.
    """

    name: str
    label: str
    bound: float | None
    loose: float | None
    kind: str = "{:.2f}"

    @property
    def control(self) -> bool:
        """Whether the number is one of the control run, which has to stay within its bound."""
        return self.name.startswith("gain_control")

    def reached(self, value: float, bound: float) -> bool:
        """Whether the value is on the right side of a bound."""
        return abs(value) < bound if self.control else value >= bound

    def demand(self) -> str:
        """The bound in words; nothing is demanded of a number that is there to compare with."""
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
    """The numbers of `TARGETS`, as far as they were measured, from the results of `evaluate_demo`."""
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


def markdown(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Tables of the numbers to reach and of the policies: means over the runs, with their range."""
    several = f"mean of {len(evaluations)} seeds (range)" if len(evaluations) > 1 else "measured"
    lines = [f"| on held-out instructions | demanded | {several} |", "| --- | --- | --- |"]
    for target in TARGETS:
        values = [evaluation["headline"].get(target.name) for evaluation in evaluations]
        if None not in values:
            lines.append(f"| {target.label} | {target.demand()} | {_spread(values, target.kind)} |")
    policies = ["initial", *sorted(name for name in evaluations[0]["policies"] if name != "initial")]
    dimensions = sorted(evaluations[0]["policies"]["initial"]["oracles"])
    header = ["policy", "words", "KL", *dimensions]
    lines += ["", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for name in policies:
        measured = [evaluation["policies"][name] for evaluation in evaluations]
        cells = [_spread([one[key] for one in measured], "{:.1f}") for key in ("mean_words", "kl")]
        cells += [_spread([one["oracles"][dimension] for one in measured], "{:.0f}") for dimension in dimensions]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], kind: str) -> str:
    """A number, or the mean of several and their range."""
    mean = kind.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({kind.format(min(values))} to {kind.format(max(values))})"


def missed(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not reached, a line each: by the means of several seeds, or by one seed, which has looser bounds."""
    lines = []
    for target in TARGETS:
        bound = target.bound if len(evaluations) > 1 else target.loose
        values = [evaluation["headline"].get(target.name) for evaluation in evaluations]
        if bound is None:
            continue
        if None in values or not target.reached(statistics.mean(values), bound):
            lines.append(f"{target.label}: {values}, but the bound is {bound:g}")
    return lines


def draw(evaluation: Mapping[str, Any], steps: Mapping[str, Sequence[Mapping[str, float]]], folder: Path) -> None:
    """Pictures (SVG): accuracy by dimension, and where there are policies, their lengths, scores and training."""
    _draw_accuracy(evaluation, folder / "accuracy.svg")
    if len(evaluation["policies"]) > 1:
        _draw_lengths(evaluation["policies"], folder / "lengths.svg")
        _draw_scores(evaluation["policies"], folder / "scores.svg")
        _draw_steps(steps, folder / "training.svg")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _draw_accuracy(evaluation: Mapping[str, Any], path: Path) -> None:
    dimensions = list(evaluation["judge"])
    series = {"judge": [evaluation["judge"][name]["right"] for name in dimensions]}
    if "reward_model" in evaluation:
        for key in ("plain", "negated"):
            series[f"reward model, {key}"] = [evaluation["reward_model"][name][key] for name in dimensions]
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    width = 0.8 / len(series)
    for place, (label, values) in enumerate(series.items()):
        axes.bar([x + place * width for x in range(len(dimensions))], values, width, label=label)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(dimensions))], dimensions, rotation=25, ha="right")
    axes.set(ylim=(0, 1), ylabel="right, by the oracle")
    axes.legend(loc="lower right", fontsize="small")
    _save(figure, path)


def _draw_lengths(policies: Mapping[str, Any], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    axes.violinplot([numbers["words"] for numbers in policies.values()], showmeans=True, widths=0.8)
    axes.set_xticks(range(1, len(policies) + 1), list(policies))
    axes.set(ylabel="words of an answer", ylim=(0, None))
    _save(figure, path)


def _draw_scores(policies: Mapping[str, Any], path: Path) -> None:
    dimensions = list(policies["initial"]["oracles"])
    values = [[numbers["oracles"][name] for name in dimensions] for numbers in policies.values()]
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for row, numbers in enumerate(values):
        for column, value in enumerate(numbers):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
    axes.set_xticks(range(len(dimensions)), dimensions, rotation=25, ha="right")
    axes.set_yticks(range(len(policies)), list(policies))
    figure.colorbar(image, label="oracle's score")
    _save(figure, path)


def _draw_steps(steps: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    figure, panels = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    names = {"score": "reward model's score", "kl_sequence": "KL to the initial policy", "response_tokens": "tokens"}
    for axes, (key, label) in zip(panels, names.items(), strict=True):
        for run, entries in steps.items():
            axes.plot([entry["step"] for entry in entries], [entry[key] for entry in entries], label=run)
        axes.set(xlabel="PPO step", ylabel=label)
    panels[0].legend(fontsize="small")
    _save(figure, path)
