"""Measures judge, reward models and policies by judgements, scores and answers."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from salmon import language
from salmon.intervals import INTERVALS, LEVEL, Estimate, estimate, share
from salmon.preference_data import opening
from salmon.text import join_instruction

BINS = 10


def judge(judgements: pl.DataFrame, seed: int) -> dict[str, Any]:
    """Measures of the judge that need judgements only, not which outputs are better.

    Args:
        judgements: `tables.JUDGEMENTS`.
        seed: seed of the intervals.

    Returns:
        `principles`: for each, in the order of the table, `agree`: how often both orders prefer the same output;
        `first`: how often they prefer output 1, if both orders agree; `bias`: mean of (s12 - s21) / 2, the advantage of
        the output that is read first; `margin`: mean of |s12 + s21| / 2; `zeros`: how often a score is 0.
        `correlation`: Pearson's correlation between principles of the mean of both orders, over the pairs; null if one
        is constant.
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
        found[name] = {
            what: (estimate if what in ("bias", "margin") else share)(values, groups, seed)
            for what, values in measured.items()
        }
        columns.append((s12 + s21) / 2)
    return {"principles": found, "correlation": _correlation(np.stack(columns))}


def labelled(
    judgements: pl.DataFrame, sources: pl.DataFrame, about: Mapping[str, Sequence[str] | None], seed: int
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """How often the judge agrees with people. Output 1 is the one that people prefer.

    Args:
        judgements: `tables.JUDGEMENTS`.
        sources: `prompt_id`, `source` and `instruction` of each pair; pairs with the same `opening` are one cluster.
        about: source -> names of the principles that its preferences concern; None: all.
        seed: seed of the intervals.

    Returns:
        Source -> principle -> `agree`: how often both orders prefer the same output; `right`: how often that output is
        the people's choice, a half if the orders disagree; `mean_right`: how often the mean of both orders is right.
    """
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    of_pairs = judgements.join(sources, on="prompt_id", how="inner", maintain_order="left")
    for (source, name), rows in of_pairs.group_by("source", "dimension", maintain_order=True):
        if name not in (about.get(str(source)) or [name]):
            continue
        s12, s21 = rows["s12"].to_numpy(), rows["s21"].to_numpy()
        measured = {"agree": s12 * s21 > 0, "right": preferred(rows), "mean_right": correct(s12 + s21)}
        groups = [opening(text) for text in rows["instruction"]]
        found.setdefault(str(source), {})[str(name)] = {
            what: share(values, groups, seed) for what, values in measured.items()
        }
    return dict(sorted(found.items()))


def preferred(judgements: pl.DataFrame) -> npt.NDArray[np.float64]:
    """Which output the judge prefers: 1 for output 1, 0 for output 2, a half where its two orders disagree."""
    s12, s21 = judgements["s12"].to_numpy(), judgements["s21"].to_numpy()
    return np.where((s12 > 0) & (s21 > 0), 1.0, np.where((s12 < 0) & (s21 < 0), 0.0, 0.5))


def _correlation(rows: npt.NDArray[np.float64]) -> list[list[float | None]]:
    """Pearson's correlation of rows, [R, N] -> R lists of R."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    norms = np.sqrt((centred**2).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        matrix = centred @ centred.T / np.outer(norms, norms)
    return [[None if np.isnan(value) else float(value) for value in row] for row in matrix]


def correct(margins: Sequence[float] | npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Whether the margins of preferred over other outputs are right: 1, 0, or a half for a tie."""
    column = np.asarray(margins, dtype=np.float64)
    return np.where(column == 0, 0.5, column > 0)


def calibration(margins: Sequence[float] | npt.NDArray[Any], labels: Sequence[int]) -> dict[str, Any]:
    """How well a reward model's probabilities (Bradley-Terry) match the observed shares.

    Args:
        margins: reward of output 1 minus reward of output 2, [N].
        labels: 1 or 2: the preferred output, [N].

    Returns:
        `bins` of equal width of sigmoid(margin): mean probability of output 1 (`expected`), share in which it is
        preferred (`observed`), `number`; empty bins are left out. `error`: the mean absolute difference between the
        two, weighted by number (ECE); null without records.
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
    """Records with one principle reversed and the others unchanged: one record for each principle shown.

    Args:
        records: `tables.PREFERENCE_RECORDS`.
        opposite: principle -> its definition and its negative definition.

    Returns:
        The same columns, plus `record`: row in `records`; `turned`: name of the reversed principle.
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
    clean: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """Measures of a reward model on records that it was not trained on.

    Args:
        records: `tables.PREFERENCE_RECORDS`, N rows.
        margins: reward of output 1 minus reward of output 2, [N].
        variants: from `turned`, M rows.
        turned_margins: the margins of the variants, [M].
        seed: seed of the intervals.
        clean: which records have labels without noise, [N]; None if unknown.

    Returns:
        `accuracy` (equal rewards count half) and `calibration` of all records; `deciding`: for each deciding principle,
        `plain` and `negated`, the accuracy on records that show it in that form, and `turned`: how often the reward
        model prefers the record's other output when only this principle is reversed; `calibration` of the first two
        together, and `calibration_error` of each of the three. `flips`: for each principle shown, how often the reward
        model changes its preference when that principle is reversed. If known, also `clean`, for all records and for
        each deciding principle: the accuracy on records whose labels have no noise.
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
        return share(values[rows], [owners[row] for row in rows], seed)

    def calibrated(rows: Sequence[int]) -> dict[str, Any]:
        return calibration(margins[rows], [labels[row] for row in rows])

    def calibrated_reversed(rows: npt.NDArray[np.intp]) -> dict[str, Any]:
        return calibration(turned_margins[rows], [3 - labels[row] for row in of[rows]])

    def of_clean(rows: Sequence[int]) -> dict[str, Estimate]:
        return {} if clean is None else {"clean": of_rows(right, [row for row in rows if clean[row]], groups)}

    variant_groups = variants["prompt_id"].to_list()
    return {
        **of_clean(range(len(records))),
        "accuracy": share(right, groups, seed),
        "calibration": calibration(margins, labels),
        "deciding": {
            name: {
                **{way: of_rows(right, rows, groups) for way, rows in ways.items()},
                **of_clean(sorted([*ways["plain"], *ways["negated"]])),
                "calibration": calibrated(sorted([*ways["plain"], *ways["negated"]])),
                "calibration_error": {
                    **{way: calibrated(rows)["error"] for way, rows in ways.items()},
                    "turned": calibrated_reversed(np.flatnonzero((names == name) & is_deciding))["error"],
                },
                "turned": of_rows(other, np.flatnonzero((names == name) & is_deciding), variant_groups),
            }
            for name, ways in sorted(decided.items())
        },
        "flips": {
            name: of_rows(changed, np.flatnonzero(names == name), variant_groups)
            for name in sorted({*variants["turned"]})
        },
    }


BySource = dict[str, Estimate]
"""Source of pairs, or subset of one -> its measurements."""


def agreement(records: pl.DataFrame, margins: npt.NDArray[np.float64], seed: int) -> BySource:
    """How often a reward model agrees with people, by source of the pairs.

    Args:
        records: `tables.PMP_RECORDS`, N rows.
        margins: reward of output 1 minus reward of output 2, [N].
        seed: seed of the intervals.
    """
    sign = np.where(np.asarray(records["preference"].to_list()) == 1, 1.0, -1.0)
    right = correct(margins * sign)
    found = {}
    for (source,), rows in records.with_row_index().group_by("source", maintain_order=True):
        index = rows["index"].to_numpy()
        found[str(source)] = share(right[index], rows["prompt_id"].to_list(), seed)
    return dict(sorted(found.items()))


def agreement_by_subset(records: pl.DataFrame, margins: npt.NDArray[np.float64], seed: int) -> dict[str, BySource]:
    """The same by subset, for each source that has subsets, such as RewardBench.

    Args:
        records: `tables.EVALUATION_PAIRS`, N rows.
        margins: reward of output 1 minus reward of output 2, [N].
        seed: seed of the intervals.
    """
    known = records["subset"].is_not_null().to_numpy()
    rows = records.filter(known)
    found = {}
    for (source,), here in rows.with_row_index().group_by("source", maintain_order=True):
        index = here["index"].to_numpy()
        found[str(source)] = agreement(here.drop("index").with_columns(source="subset"), margins[known][index], seed)
    return dict(sorted(found.items()))


REFUSAL = re.compile(r"\b(?:i cannot|i can't|i won't|i(?:'m| am) (?:sorry, but|unable)|as an ai)\b")
"""Whole words, in lower case, that signal a refusal. An answer with any of them in its first 200 characters counts as a
refusal. This is a proxy, and knows English only."""


SHARES = ("finished", "language_kept", "refusals")
"""The measures of `behaviour` that are yes or no for each answer."""


def behaviour(answers: pl.DataFrame, seed: int) -> dict[str, Estimate]:
    """Measures of answers that need no model.

    Args:
        answers: `tables.ANSWERS`.
        seed: seed of the intervals.

    Returns:
        Means over the answers: `kl`: log of the ratio of an answer's probabilities under the policy and under the
        initial policy, whose mean is the KL divergence; `tokens` and `words`; `finished`: share that ended by itself;
        `language_kept`: share in the language of the instruction, among answers with both languages known;
        `refusals`: share (`REFUSAL`); `distinct_1` to `distinct_3`: share of distinct words, word pairs and triples
        among all in an answer that has any, which falls with the length. The other two do not depend on the length:
        `window_distinct_1` to `_3`: the same within every `WINDOW` consecutive words of an answer that is long enough;
        `corpus_distinct_1` to `_3`: the expected share in `SAMPLE` draws from all answers, without an interval.
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
        "refusals": [float(REFUSAL.search(text[:200].lower().replace("\u2019", "'")) is not None) for text in texts],
    }
    for size in (1, 2, 3):
        measured[f"distinct_{size}"] = [_distinct(row, size) for row in words]
    for size in (1, 2, 3):
        measured[f"window_distinct_{size}"] = [_distinct_in_windows(row, size) for row in words]
    found = {name: (share if name in SHARES else estimate)(values, groups, seed) for name, values in measured.items()}
    for size in (1, 2, 3):
        value, number = _distinct_of_all(words, size)
        found[f"corpus_distinct_{size}"] = {"value": value, "low": None, "high": None, "number": number}
    return found


WINDOW = 20  # words: few answers are shorter, and repetitions usually fall within this window
SAMPLE = 500  # n-grams


def _grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _distinct(words: Sequence[str], size: int) -> float:
    """Share of distinct n-grams; NaN if there are none."""
    grams = _grams(words, size)
    return len(set(grams)) / len(grams) if grams else math.nan


def _distinct_in_windows(words: Sequence[str], size: int) -> float:
    """Mean share of distinct n-grams over all windows of `WINDOW` words; NaN for a shorter text."""
    shares = [_distinct(words[at : at + WINDOW], size) for at in range(len(words) - WINDOW + 1)]
    return float(np.mean(shares)) if shares else math.nan


def _distinct_of_all(texts: Sequence[Sequence[str]], size: int) -> tuple[float | None, int]:
    """Expected share of distinct n-grams among `SAMPLE` drawn without replacement from the n-grams of all texts.

    An n-gram that occurs c times among N is in the sample with probability 1 - C(N - c, SAMPLE) / C(N, SAMPLE)
    (rarefaction: Hurlbert, 1971).

    Returns:
        The share, null if there are fewer; and N.
    """
    often = Counter(Counter(gram for words in texts for gram in _grams(words, size)).values())
    number = sum(count * grams for count, grams in often.items())
    if number < SAMPLE:
        return None, number

    def absent(count: int) -> float:
        left = number - count
        if left < SAMPLE:
            return 0.0
        terms = ((left, 1), (number - SAMPLE, 1), (left - SAMPLE, -1), (number, -1))
        return math.exp(sum(sign * math.lgamma(term + 1) for term, sign in terms))

    return sum(grams * (1 - absent(count)) for count, grams in often.items()) / SAMPLE, number


Wins = dict[str, dict[str, Estimate]]
"""Policy -> another policy -> how often the first one's answer is preferred."""
OfScores = dict[str, dict[str, dict[str, Any]]]
"""Reward model -> principle -> `plain` and `negated` -> the measurements."""


def score_means(scores: Mapping[str, pl.DataFrame], seed: int) -> OfScores:
    """Mean score of each policy's answers.

    Args:
        scores: policy -> `tables.SCORES` of its answers.
        seed: seed of the intervals.
    """
    return _of_scores(
        scores,
        lambda columns, prompts: {name: estimate(column, prompts, seed) for name, column in columns.items()},
    )


def score_wins(scores: Mapping[str, pl.DataFrame], seed: int) -> OfScores:
    """How often a policy's answers score higher than another policy's to the same prompts, for all pairs (`Wins`).

    Args:
        scores: policy -> `tables.SCORES` of its answers.
        seed: seed of the intervals.
    """

    def wins(columns: Mapping[str, npt.NDArray[np.float64]], prompts: Sequence[str]) -> Wins:
        found: Wins = {name: {} for name in columns}
        for name, other in itertools.combinations(columns, 2):
            margins = columns[name] - columns[other]
            won = np.where(np.isnan(margins), np.nan, correct(margins))
            found[name][other] = share(won, prompts, seed)
            found[other][name] = _lost(found[name][other])
        return found

    return _of_scores(scores, wins)


def _of_scores(
    scores: Mapping[str, pl.DataFrame],
    measure: Callable[[Mapping[str, npt.NDArray[np.float64]], Sequence[str]], dict[str, Any]],
) -> OfScores:
    """Apply a measure to every reward model and principle, given the policies' scores (NaN where one is missing)."""
    found: OfScores = {}
    key = ["reward_model", "dimension", "opposite"]
    table = pl.concat(rows.with_columns(policy=pl.lit(name)) for name, rows in scores.items())
    for (model, principle, opposite), rows in table.group_by(key, maintain_order=True):
        wide = rows.pivot("policy", index="prompt_id", values="score").sort("prompt_id")
        columns = {name: wide[name].cast(pl.Float64).fill_null(math.nan).to_numpy() for name in wide.columns[1:]}
        ways = found.setdefault(str(model), {}).setdefault(str(principle), {})
        ways["negated" if opposite else "plain"] = measure(columns, wide["prompt_id"].to_list())
    return found


def _lost(won: Estimate) -> Estimate:
    """The same share of wins, seen from the other policy."""
    turned = {"value": won["value"], "low": won["high"], "high": won["low"]}
    return {name: None if value is None else 1 - value for name, value in turned.items()} | {"number": won["number"]}


def judge_wins(judgements: pl.DataFrame, seed: int) -> dict[str, Estimate]:
    """How often the judge prefers output 1, by principle. A pair counts half if the two orders disagree.

    Args:
        judgements: `tables.JUDGEMENTS`.
        seed: seed of the intervals.
    """
    return {
        str(name): share(preferred(rows), rows["prompt_id"].to_list(), seed)
        for (name,), rows in judgements.group_by("dimension", maintain_order=True)
    }


def verdict_wins(verdicts: pl.DataFrame, seed: int) -> dict[str, dict[str, Estimate]]:
    """How a model behind an endpoint compares a policy's answers with the initial policy's.

    Args:
        verdicts: `tables.VERDICTS`; comparisons that were not judged in both orders are left out.
        seed: seed of the intervals.

    Returns:
        Kind -> `won`: how often both orders prefer the policy's answer, a half if they disagree or tie; `agree`: how
        often both orders say the same, among comparisons in which at least one prefers an answer; `first`: how often
        the answer shown first is preferred, among the verdicts other than ties.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for (kind,), rows in verdicts.drop_nulls("preferred").group_by("kind", maintain_order=True):
        wide = rows.pivot("policy_first", index="prompt_id", values="preferred").drop_nulls()
        if {"true", "false"} <= {*wide.columns}:
            first, second = (np.asarray(wide[order].to_list(), dtype=object) for order in ("true", "false"))
            won = np.select(
                [(first == "policy") & (second == "policy"), (first == "initial") & (second == "initial")],
                [1.0, 0.0],
                0.5,
            )
            shown = [np.where(first == "tie", math.nan, first == "policy")]
            shown += [np.where(second == "tie", math.nan, second == "initial")]
            prompts = wide["prompt_id"].to_list()
            found[str(kind)] = {
                "won": share(won, prompts, seed),
                "agree": share(
                    np.where((first == "tie") & (second == "tie"), math.nan, first == second), prompts, seed
                ),
                "first": share(np.concatenate(shown).astype(float), [*prompts, *prompts], seed),
            }
    return found


def policies(
    answers: Mapping[str, pl.DataFrame],
    scores: Mapping[str, pl.DataFrame],
    judgements: Mapping[tuple[str, str], pl.DataFrame],
    seed: int,
    verdicts: Mapping[tuple[str, str], pl.DataFrame] | None = None,
    versus: Mapping[tuple[str, str], pl.DataFrame] | None = None,
) -> dict[str, Any]:
    """The comparison of policies.

    Args:
        answers: policy -> `tables.ANSWERS`, initial policies first.
        scores: the same -> `tables.SCORES`.
        judgements: policy and its initial policy -> `tables.JUDGEMENTS` of their answers.
        seed: seed of the intervals.
        verdicts: the same pairs -> `tables.VERDICTS`.
        versus: policy and another run's policy -> `tables.JUDGEMENTS` of their answers.

    Returns:
        `names` of the policies; `initial`: run -> the policy that it starts from; `behaviour` of each policy; `scores`
        (`score_means`); `wins` (`score_wins`); `judge`: principle -> policy -> initial policy -> how often the judge
        prefers the policy's answer; `versus`: the same against another run's policy; and `endpoint`: policy -> initial
        policy -> `verdict_wins`.
    """

    def judged(tables: Mapping[tuple[str, str], pl.DataFrame]) -> dict[str, Wins]:
        found: dict[str, Wins] = {}
        for (name, other), table in tables.items():
            for principle, won in judge_wins(table, seed).items():
                found.setdefault(principle, {}).setdefault(name, {})[other] = won
        return found

    return {
        "names": list(answers),
        "initial": dict(judgements.keys()),
        "behaviour": {name: behaviour(table, seed) for name, table in answers.items()},
        "scores": score_means(scores, seed),
        "wins": score_wins(scores, seed),
        "judge": judged(judgements),
        "versus": judged(versus or {}),
        "endpoint": {name: {other: verdict_wins(table, seed)} for (name, other), table in (verdicts or {}).items()},
    }


def policies_markdown(found: Mapping[str, Any]) -> str:
    """The results of `policies` as tables: behaviour, and principles x runs by reward models and judge."""
    initial: Mapping[str, str] = found["initial"]

    def shown(one: Estimate | None) -> str:
        if one is None or one["value"] is None:
            return ""
        if one["low"] is None:
            return f"{one['value']:.2f}"
        return f"{one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f})"

    def table(heading: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
        lines = [f"| {heading} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()), ""]

    def lines_of(principles: Mapping[str, Any], cells: Callable[[Any], Sequence[str]]) -> dict[str, Sequence[str]]:
        return {
            name + ", negated" * (way == "negated"): cells(measured)
            for name, ways in principles.items()
            for way, measured in ways.items()
        }

    lines = ["# Policies", "", f"Means with {LEVEL:.0%} intervals. {INTERVALS}", "", "## How they answer", ""]
    quantities = list(next(iter(found["behaviour"].values())))
    lines += table(
        "policy",
        quantities,
        {name: [shown(found["behaviour"][name][what]) for what in quantities] for name in found["names"]},
    )
    runs = [name for name in found["names"] if name in initial]
    for model in found["wins"]:
        lines += [f"## Answers with a higher score than the initial policy's, by the reward model of `{model}`", ""]
        cells = lambda wins: [shown(wins[run].get(other)) for run, other in initial.items()]  # noqa: E731
        lines += table("principle", list(initial), lines_of(found["wins"][model], cells))
        if len(runs) > 1:
            lines += [f"## Answers with a higher score than another run's, by the reward model of `{model}`", ""]
            pairs = [(one, other) for one in runs for other in runs if one != other]
            against = lambda wins: [shown(wins[one].get(other)) for one, other in pairs]  # noqa: B023, E731
            columns = [f"{one} against {other}" for one, other in pairs]
            lines += table("principle", columns, lines_of(found["wins"][model], against))
        lines += [f"## Mean score, by the reward model of `{model}`", ""]
        means = lambda scores: [shown(scores[name]) for name in found["names"]]  # noqa: E731
        lines += table("principle", found["names"], lines_of(found["scores"][model], means))
    lines += ["## Answers that the judge prefers to the initial policy's", ""]
    judged = {
        principle: [shown(wins.get(run, {}).get(other)) for run, other in initial.items()]
        for principle, wins in found["judge"].items()
    }
    lines += table("principle", list(initial), judged)
    if found["versus"]:
        lines += ["## Answers that the judge prefers to another run's", ""]
        rows = {
            f"{principle}, {run} against {other}": [shown(one)]
            for principle, wins in found["versus"].items()
            for run, of_others in wins.items()
            for other, one in of_others.items()
        }
        lines += table("principle", ["share"], rows)
    if found["endpoint"]:
        lines += ["## Answers that the model behind the endpoint prefers to the initial policy's", ""]
        lines += table(
            "run",
            ["against", "share", "both orders agree", "prefers the first answer"],
            {
                f"{run}, {kind}": [other, *(shown(one[what]) for what in ("won", "agree", "first"))]
                for run, of_others in found["endpoint"].items()
                for other, kinds in of_others.items()
                for kind, one in kinds.items()
            },
        )
    return "\n".join(lines)
