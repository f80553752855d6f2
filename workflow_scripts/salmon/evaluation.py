"""How good judge, reward models and policies are: numbers with confidence intervals, from judgements and from scores.

An interval says how far a number depends on the prompts that happened to be drawn: prompts are drawn anew, with all
rows of each, since rows of one prompt are not independent.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from salmon import language
from salmon.randomness import rng
from salmon.text import join_instruction

DRAWS = 2000
LEVEL = 0.95
BINS = 10
Estimate = dict[str, float | int | None]
"""`value`, `low` and `high` of its interval, and `number` of rows; null where there are none."""


def estimate(values: Sequence[float] | npt.NDArray[Any], groups: Sequence[str], seed: int) -> Estimate:
    """Mean of some rows, with the percentile interval of a bootstrap by group.

    Args:
        values: of the rows, [N]; NaN where a row has none, which is then left out.
        groups: prompt of each row, [N].
        seed: of the draws.
    """
    column = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(column)
    if not known.any():
        return {"value": None, "low": None, "high": None, "number": 0}
    _, index = np.unique(np.asarray(groups, dtype=object)[known].astype(str), return_inverse=True)
    sums, sizes = np.bincount(index, weights=column[known]), np.bincount(index)
    generator = rng("bootstrap", seed)
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        drawn = generator.integers(len(sizes), size=len(sizes))
        means[draw] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(column[known].mean()), "low": float(low), "high": float(high), "number": int(known.sum())}


def judge(judgements: pl.DataFrame, seed: int) -> dict[str, Any]:
    """What judgements say of the judge, without knowing which outputs are better.

    Args:
        judgements: `tables.JUDGEMENTS`.
        seed: of the intervals.

    Returns:
        `principles`: for each, in the order of the table, `agree`: how often both orders prefer the same output;
        `first`: where both orders agree, how often they prefer output 1; `bias`: mean of (s12 - s21) / 2, by how much
        the output that is read first is liked better; `margin`: mean of |s12 + s21| / 2; `zeros`: how often a score is
        0. `correlation`: of the principles' means of both orders over the pairs, Pearson's, null where one does not
        vary.
    """
    names = judgements["dimension"].unique(maintain_order=True).to_list()
    found: dict[str, Any] = {}
    columns = []
    for name in names:
        rows = judgements.filter(pl.col("dimension") == name).sort("prompt_id")
        groups = rows["prompt_id"].to_list()
        s12, s21 = rows["s12"].to_numpy(), rows["s21"].to_numpy()
        agree = (s12 > 0) & (s21 > 0) | (s12 < 0) & (s21 < 0)
        measured = {
            "agree": agree,
            "first": np.where(agree, s12 > 0, np.nan),
            "bias": (s12 - s21) / 2,
            "margin": np.abs(s12 + s21) / 2,
            "zeros": (s12 == 0) | (s21 == 0),
        }
        found[name] = {what: estimate(values, groups, seed) for what, values in measured.items()}
        columns.append((s12 + s21) / 2)
    return {"principles": found, "correlation": _correlation(np.stack(columns))}


def _correlation(rows: npt.NDArray[np.float64]) -> list[list[float | None]]:
    """Pearson's correlation of rows, [R, N] -> R lists of R."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred**2).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        matrix = centred @ centred.T / np.outer(norms, norms)
    return [[None if np.isnan(value) else float(value) for value in row] for row in matrix]


def correct(margins: Sequence[float] | npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Whether margins of preferred over other outputs are right: 1, 0, or a half where they are equal."""
    column = np.asarray(margins, dtype=np.float64)
    return np.where(column == 0, 0.5, column > 0)


def calibration(margins: Sequence[float] | npt.NDArray[Any], labels: Sequence[int]) -> dict[str, Any]:
    """Whether a reward model's probabilities are the shares that come true (Bradley-Terry).

    Args:
        margins: reward of output 1 less that of output 2, [N].
        labels: 1 or 2, which output is preferred, [N].

    Returns:
        `bins` of equal width of sigmoid(margin): mean probability of output 1 (`expected`), share in which it is
        preferred (`observed`), `number`; empty ones are left out. `error`: their mean difference, weighted by number
        (ECE); null of nothing.
    """
    probabilities = 1 / (1 + np.exp(-np.asarray(margins, dtype=np.float64)))
    first = np.asarray(labels) == 1
    place = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    bins = [
        {
            "expected": float(probabilities[place == number].mean()),
            "observed": float(first[place == number].mean()),
            "number": int((place == number).sum()),
        }
        for number in range(BINS)
        if (place == number).any()
    ]
    error = sum(one["number"] * abs(one["expected"] - one["observed"]) for one in bins) / max(1, len(first))
    return {"bins": bins, "error": float(error) if bins else None}


def turned(records: pl.DataFrame, opposite: Mapping[str, tuple[str, str]]) -> pl.DataFrame:
    """Records with one of their principles reversed and the others unchanged: one for each principle shown.

    Args:
        records: `tables.PREFERENCE_RECORDS`.
        opposite: principle -> its definition and its negative definition.

    Returns:
        The same columns, and `record`: row in `records`; `turned`: name of the principle.
    """
    rows = []
    for number, row in enumerate(records.iter_rows(named=True)):
        for place, name in enumerate(row["dimensions"]):
            negated = [flag != (place == other) for other, flag in enumerate(row["negated"])]
            definitions = [*row["definitions"]]
            definitions[place] = opposite[name][negated[place]]
            rows.append({**row, "negated": negated, "definitions": definitions, "record": number, "turned": name})
    return pl.DataFrame(rows, schema={**records.schema, "record": pl.Int64, "turned": pl.String})


def held_out(
    records: pl.DataFrame,
    margins: npt.NDArray[np.float64],
    variants: pl.DataFrame,
    turned_margins: npt.NDArray[np.float64],
    seed: int,
) -> dict[str, Any]:
    """How a reward model does on records that it was not trained on.

    Args:
        records: N of them, `tables.PREFERENCE_RECORDS`.
        margins: reward of output 1 less that of output 2, [N].
        variants: from `turned`, M of them.
        turned_margins: likewise, [M].
        seed: of the intervals.

    Returns:
        `accuracy` (equal rewards count half) and `calibration` of all; `deciding`: for each principle that decided,
        `plain` and `negated`, the accuracy where it is shown so, and `turned`: where it alone is reversed, how
        often the reward model prefers the other output of the record. `flips`: for each principle shown, how often the
        reward model changes its mind when that one is reversed.
    """
    labels, groups = records["preference"].to_list(), records["prompt_id"].to_list()
    sign = np.where(np.asarray(labels) == 1, 1.0, -1.0)
    right = correct(margins * sign)
    decided: dict[str, dict[str, list[int]]] = {}
    for number, row in enumerate(records.iter_rows(named=True)):
        if row["deciding"] is not None:
            way = "negated" if row["negated"][row["dimensions"].index(row["deciding"])] else "plain"
            decided.setdefault(row["deciding"], {"plain": [], "negated": []})[way].append(number)
    of, names = variants["record"].to_numpy().astype(int), np.asarray(variants["turned"].to_list(), dtype=object)
    is_deciding = np.asarray([row == name for row, name in zip(variants["deciding"], names, strict=True)], dtype=bool)
    changed = (margins[of] * turned_margins < 0).astype(float)
    other = correct(-turned_margins * sign[of])

    def of_rows(values: npt.NDArray[np.float64], rows: Any, owners: Sequence[str]) -> Estimate:
        return estimate(values[rows], [owners[row] for row in rows], seed)

    variant_groups = variants["prompt_id"].to_list()
    return {
        "accuracy": estimate(right, groups, seed),
        "calibration": calibration(margins, labels),
        "deciding": {
            name: {
                **{way: of_rows(right, rows, groups) for way, rows in ways.items()},
                "turned": of_rows(other, np.flatnonzero((names == name) & is_deciding), variant_groups),
            }
            for name, ways in sorted(decided.items())
        },
        "flips": {
            name: of_rows(changed, np.flatnonzero(names == name), variant_groups)
            for name in sorted({*variants["turned"]})
        },
    }


def agreement(records: pl.DataFrame, margins: npt.NDArray[np.float64], seed: int) -> dict[str, Estimate]:
    """How often a reward model agrees with people, by source of the pairs.

    Args:
        records: `tables.PMP_RECORDS`, N of them.
        margins: reward of output 1 less that of output 2, [N].
        seed: of the intervals.
    """
    sign = np.where(np.asarray(records["preference"].to_list()) == 1, 1.0, -1.0)
    right = correct(margins * sign)
    found = {}
    for (source,), rows in records.with_row_index().group_by("source", maintain_order=True):
        index = rows["index"].to_numpy()
        found[str(source)] = estimate(right[index], rows["prompt_id"].to_list(), seed)
    return dict(sorted(found.items()))


REFUSALS = (
    "i cannot",
    "i can't",
    "i'm sorry, but",
    "i am sorry, but",
    "i am unable",
    "i'm unable",
    "as an ai",
    "i won't",
)
"""Beginnings of sentences, in lower case, by which a model refuses; an answer that has one in its first 200 characters
counts as a refusal. A proxy: it knows English only."""


def behaviour(answers: pl.DataFrame, seed: int) -> dict[str, Estimate]:
    """What answers are like, without a model.

    Args:
        answers: `tables.ANSWERS`.
        seed: of the intervals.

    Returns:
        Means over the answers: `kl`: log of how much more probable an answer is than under the initial policy, whose
        mean is the KL divergence; `tokens` and `words`; `finished`: share that ended by itself; `language_kept`: share
        in the language of the instruction, of those where both are known; `refusals`: share (`REFUSALS`); `distinct_1`
        to `distinct_3`: distinct words, pairs and triples of words, of all in an answer that has any.
    """
    texts, groups = answers["response"].to_list(), answers["prompt_id"].to_list()
    asked = language.detect(
        [join_instruction(*row) for row in answers.select("instruction", "input").iter_rows()],
    )
    spoken = language.detect(texts)
    words = [text.lower().split() for text in texts]
    measured: dict[str, list[float]] = {
        "kl": answers["kl"].to_list(),
        "tokens": answers["response_tokens"].cast(pl.Float64).to_list(),
        "words": [float(len(row)) for row in words],
        "finished": [float(reason in ("eos", "stop")) for reason in answers["finish_reason"]],
        "language_kept": [
            float(one == other) if one and other else math.nan for one, other in zip(asked, spoken, strict=True)
        ],
        "refusals": [
            float(any(phrase in text[:200].lower().replace("\u2019", "'") for phrase in REFUSALS)) for text in texts
        ],
    }
    for size in (1, 2, 3):
        measured[f"distinct_{size}"] = [_distinct(row, size) for row in words]
    return {name: estimate(values, groups, seed) for name, values in measured.items()}


def _distinct(words: Sequence[str], size: int) -> float:
    """Share of distinct n-grams; NaN where there are none."""
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def score_wins(scores: pl.DataFrame, before: pl.DataFrame, seed: int) -> dict[str, dict[str, dict[str, Estimate]]]:
    """How often a policy's answers have higher scores than those of another policy to the same prompts.

    Args:
        scores: `tables.SCORES`, of the policy.
        before: the same, of the other one.
        seed: of the intervals.

    Returns:
        Reward model -> principle -> `plain` and `negated`: share of prompts (equal scores count half).
    """
    key = ["reward_model", "dimension", "opposite", "prompt_id"]
    both = scores.join(before, on=key, suffix="_before", validate="1:1")
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for (model, name, opposite), rows in both.group_by(key[:3], maintain_order=True):
        right = correct((rows["score"] - rows["score_before"]).to_numpy())
        way = found.setdefault(str(model), {}).setdefault(str(name), {})
        way["negated" if opposite else "plain"] = estimate(right, rows["prompt_id"].to_list(), seed)
    return found


def judge_wins(judgements: pl.DataFrame, seed: int) -> dict[str, Estimate]:
    """How often the judge prefers output 1, by principle: 1, 0, or a half where its two orders disagree.

    Args:
        judgements: `tables.JUDGEMENTS`.
        seed: of the intervals.
    """
    found = {}
    for (name,), rows in judgements.group_by("dimension", maintain_order=True):
        s12, s21 = rows["s12"].to_numpy(), rows["s21"].to_numpy()
        preferred = np.where((s12 > 0) & (s21 > 0), 1.0, np.where((s12 < 0) & (s21 < 0), 0.0, 0.5))
        found[str(name)] = estimate(preferred, rows["prompt_id"].to_list(), seed)
    return found


def policies_markdown(found: Mapping[str, Any]) -> str:
    """Tables of what `evaluate_policies` found: behaviours, and principles x runs by reward models and judge."""

    def shown(one: Estimate, digits: int) -> str:
        if one["value"] is None:
            return ""
        return f"{one['value']:.{digits}f} ({one['low']:.{digits}f} to {one['high']:.{digits}f})"

    def table(heading: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
        lines = [f"| {heading} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()), ""]

    runs = list(found)
    lines = ["# Policies", "", f"Means with {LEVEL:.0%} intervals (bootstrap by prompt).", "", "## How they answer", ""]
    names = list(found[runs[0]]["behaviour"])
    lines += table(
        "run",
        names,
        {run: [shown(found[run]["behaviour"][name], 2) for name in names] for run in runs}
        | {f"{run}, before": [shown(found[run]["initial_behaviour"][name], 2) for name in names] for run in runs[:1]},
    )
    for model in found[runs[0]]["scores"]:
        lines += [f"## Prompts on which the score is higher than before, by the reward model of `{model}`", ""]
        principles = found[runs[0]]["scores"][model]
        lines += table(
            "principle",
            runs,
            {
                name if way == "plain" else f"{name}, negated": [
                    shown(found[run]["scores"][model][name][way], 2) for run in runs
                ]
                for name in principles
                for way in ("plain", "negated")
            },
        )
    lines += ["## Prompts on which the judge prefers the answer to that before", ""]
    judged = list(found[runs[0]]["judge"])
    lines += table("principle", runs, {name: [shown(found[run]["judge"][name], 2) for run in runs] for name in judged})
    return "\n".join(lines)
