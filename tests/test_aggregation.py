"""Aggregation: the rules against a slow, plain reference, draws against their distributions, and faulty inputs."""

import ast
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic_settings import CliApp

import aggregate_preferences
from salmon import language, randomness
from salmon.aggregation import Drawn, Traits, aggregate, count_probabilities, draw_record, scaled_scores
from salmon.artifacts import hash_path
from salmon.config import Aggregation
from salmon.errors import UserError
from salmon.principles import JudgedPrinciple
from salmon.tables import PRINCIPLE_RECORDS
from salmon.text import cut_at_markers
from tests import forks

SCRIPTS = Path(__file__).parents[1] / "workflow_scripts"
NAMES = ["Clear", "Kind", "Short", "Exact", "Lively"]
PRINCIPLES = [
    JudgedPrinciple(dimension=n, definition=f"{n}!", negative_definition=f"Not {n}!") for n in [*NAMES, "Spare"]
]
MARKERS = ["\n### User\n"]
ENGLISH = "Certainly, here is a simple recipe that you can cook at home with tomatoes, onions and some garlic."
GERMAN = "Natürlich, hier ist ein einfaches Rezept, das Sie zu Hause mit Tomaten, Zwiebeln und Knoblauch kochen können."
FRENCH = "Bien sûr, voici une recette simple que vous pouvez préparer à la maison avec des tomates et des oignons."
REFUSAL = "As an AI language model, I cannot taste food, but I can tell you how other people like to prepare it."
UNKNOWN = "12345 67890 12345"
PLAIN = Traits((False, False), None, (None, None))


def settings(**changes: Any) -> Aggregation:
    return Aggregation(**({"dimensions": NAMES} | changes))


class Inputs:
    """Three consistent tables, which a test may change before they are written."""

    def __init__(self, folder: Path, pairs: int = 60) -> None:
        rng = np.random.default_rng(5)
        self.folder = folder
        ids = [f"p{number:03d}" for number in range(pairs)]
        texts = [ENGLISH, GERMAN, REFUSAL, ENGLISH + "\n### User\n" + GERMAN, UNKNOWN + " {0} ### User", FRENCH]
        asked = [ENGLISH, GERMAN, UNKNOWN]

        def pick(options: list[str]) -> list[str]:
            return [options[index] for index in rng.integers(len(options), size=pairs)]

        common = {"prompt_id": ids, "instruction": pick(asked), "input": [""] * pairs}
        self.response0 = pl.DataFrame({**common, "response": pick(texts), "n_tokens": range(pairs)})
        self.response1 = pl.DataFrame({**common, "response": pick(texts), "n_tokens": range(pairs)})
        self.preferences = pl.DataFrame(
            {
                "prompt_id": np.repeat(ids, len(NAMES) + 1),
                "dimension": [*NAMES, "Spare"] * pairs,
                "s12": rng.normal(0, 2, pairs * (len(NAMES) + 1)) + 0.7,
                "s21": rng.normal(0, 2, pairs * (len(NAMES) + 1)) - 0.7,
            }
        )

    def write(self) -> tuple[Path, Path, Path]:
        self.folder.mkdir(exist_ok=True)
        paths = []
        for name in ("preferences", "response0", "response1"):
            paths.append(self.folder / f"{name}.parquet")
            getattr(self, name).write_parquet(paths[-1])
        return paths[0], paths[1], paths[2]

    def aggregate(self, **changes: Any) -> tuple[pl.DataFrame, dict[str, int]]:
        paths = self.write()
        with tempfile.TemporaryDirectory() as folder:
            table, counts = aggregate(
                *paths, principles=PRINCIPLES, settings=settings(**changes), turn_markers=MARKERS, folder=Path(folder)
            )
            return table.collect(), counts


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path / "in")


def slow_reference(inputs: Inputs, chosen: Aggregation) -> list[dict[str, Any]]:
    """Reference step 2 in plain loops over rows; shares nothing with the code but the order of random draws."""
    judged = {(row["prompt_id"], row["dimension"]): row for row in inputs.preferences.iter_rows(named=True)}
    first = {row["prompt_id"]: row for row in inputs.response0.iter_rows(named=True)}
    second = {row["prompt_id"]: row for row in inputs.response1.iter_rows(named=True)}
    variance = {}
    for name in NAMES:
        pooled = [row[order] for key, row in judged.items() if key[1] == name for order in ("s12", "s21")]
        centre = sum(pooled) / len(pooled)
        variance[name] = sum((score - centre) ** 2 for score in pooled) / len(pooled)
    records = []
    for key in sorted(first):
        if (key, NAMES[0]) not in judged:
            continue
        texts = [row["response"].split(MARKERS[0])[0] for row in (first[key], second[key])]
        looked_at = [first[key]["instruction"], *texts] if chosen.language_rule else []
        asked, *spoken = language.detect(looked_at) or [None] * 3
        for number in range(chosen.passes):
            rng = randomness.rng("aggregation", chosen.seed, number, key)
            largest = min(chosen.max_principles, len(NAMES))
            chances = [chosen.geometric_p * (1 - chosen.geometric_p) ** (k - 1) for k in range(1, largest + 1)]
            count = 1 + rng.choice(largest, p=np.array(chances) / sum(chances))
            dimensions = [NAMES[index] for index in rng.choice(len(NAMES), size=count, replace=False)]
            negated = [draw < chosen.negation_probability for draw in rng.random(count)]
            refusal_draw, noise_draw, order_draw = rng.random(3)

            scores = []
            for name, turned in zip(dimensions, negated, strict=True):
                s12, s21 = judged[key, name]["s12"], judged[key, name]["s21"]
                counts = s12 * s21 > 0 or chosen.agreement == "mean"
                score = (s12 + s21) / 2 / variance[name] if counts else 0.0
                scores.append(-score if turned else score)
            decider = max(range(count), key=lambda index: abs(scores[index]))
            value = scores[decider] if chosen.decision == "dominant" else sum(scores)
            if value == 0:
                continue
            better, rule = (0 if value > 0 else 1), None
            refusing = [chosen.refusal_phrase in text for text in texts]
            if sum(refusing) == 1 and refusal_draw < chosen.refusal_probability:
                better, rule = (1 if refusing[0] else 0), "refusal"
            fits = [asked is None or spoken[i] is None or spoken[i] == asked for i in (0, 1)]
            if chosen.language_rule and sum(fits) == 0:
                continue
            if chosen.language_rule and sum(fits) == 1:
                better, rule = (0 if fits[0] else 1), "language"
            flipped = noise_draw < (chosen.label_noise if rule is None else chosen.rule_label_noise)
            if flipped:
                better = 1 - better
            order = [1, 0] if order_draw < 0.5 else [0, 1]
            records.append(
                {
                    "record_id": f"{key}-{number}",
                    "prompt_id": key,
                    "instruction": first[key]["instruction"],
                    "input": "",
                    "output_1": texts[order[0]],
                    "output_2": texts[order[1]],
                    "preference": 1 + order.index(better),
                    "dimensions": dimensions,
                    "negated": negated,
                    "definitions": [f"Not {n}!" if t else f"{n}!" for n, t in zip(dimensions, negated, strict=True)],
                    "scores": [score if order == [0, 1] else -score for score in scores],
                    "deciding": dimensions[decider] if rule is None and chosen.decision == "dominant" else None,
                    "rule": rule,
                    "flipped": flipped,
                    "swapped": order == [1, 0],
                    "instruction_language": asked,
                    "output_1_language": spoken[order[0]],
                    "output_2_language": spoken[order[1]],
                }
            )
    return records


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decision": "sum"},
        {"agreement": "mean"},
        {"language_rule": False, "seed": 7},
        {"passes": 1, "max_principles": 2, "geometric_p": 1.0},
    ],
)
def test_records_are_those_of_the_slow_reference(inputs: Inputs, changes: dict[str, Any]) -> None:
    inputs.preferences = inputs.preferences.filter(pl.col("prompt_id") != "p007")  # too short to be judged
    expected = slow_reference(inputs, settings(**changes))
    table, counts = inputs.aggregate(**changes)
    assert dict(table.schema) == PRINCIPLE_RECORDS.schema
    found = table.to_dicts()
    assert [row["record_id"] for row in found] == [row["record_id"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("scores") == pytest.approx(theirs.pop("scores"), rel=1e-12)
        assert ours == theirs
    # The inputs hold every case, so that agreement means something.
    assert {True, False} == set(table["swapped"]) == set(table["flipped"])
    assert set(table["rule"]) == {None, "refusal", "language"} - ({"language"} if "language_rule" in changes else set())
    assert counts["pairs"] == 60
    assert counts["pairs_not_judged"] == 1
    skipped = sum(number for name, number in counts.items() if name.startswith("skipped_"))
    assert counts["records"] + skipped == 59 * settings(**changes).passes
    assert counts["records"] == sum(number for name, number in counts.items() if name.startswith("decided_by_"))


def test_order_of_rows_changes_nothing(inputs: Inputs) -> None:
    """Reference, defects 1, 5, 18: neither order, nor an earlier call, nor a shared state decides anything."""
    before, counts = inputs.aggregate()
    for seed, name in enumerate(("preferences", "response0", "response1")):
        setattr(inputs, name, getattr(inputs, name).sample(fraction=1, shuffle=True, seed=seed))
    after, counts_after = inputs.aggregate()
    assert after.equals(before)
    assert counts_after == counts


def test_exchanged_response_files_and_judgements_prefer_the_same_texts(inputs: Inputs) -> None:
    """Reference, defect 1: a label belongs to a text, not to the place of a file in a list."""

    def preferred(table: pl.DataFrame) -> list[tuple[str, str]]:
        return [(row["record_id"], row[f"output_{row['preference']}"]) for row in table.iter_rows(named=True)]

    before, _ = inputs.aggregate()
    inputs.response0, inputs.response1 = inputs.response1, inputs.response0
    inputs.preferences = inputs.preferences.with_columns(s12=-pl.col("s21"), s21=-pl.col("s12"))
    after, _ = inputs.aggregate()
    assert preferred(after) == preferred(before)


def test_other_rows_change_no_draw_and_another_seed_changes_them(inputs: Inputs) -> None:
    drawn = ["record_id", "dimensions", "negated", "flipped", "swapped", "output_1"]
    whole, _ = inputs.aggregate()
    kept = [f"p{number:03d}" for number in range(0, 60, 3)]
    for name in ("preferences", "response0", "response1"):
        setattr(inputs, name, getattr(inputs, name).filter(pl.col("prompt_id").is_in(kept)))
    part, _ = inputs.aggregate()
    assert part.select(drawn).equals(whole.filter(pl.col("prompt_id").is_in(kept)).select(drawn))
    other, _ = inputs.aggregate(seed=43)
    assert not other.select(drawn).equals(part.select(drawn))


def test_passes_differ_and_do_not_depend_on_their_number(inputs: Inputs) -> None:
    two, _ = inputs.aggregate(passes=2)
    four, _ = inputs.aggregate(passes=4)
    assert two.equals(four.filter(pl.col("record_id").str.slice(-1).is_in(["0", "1"])))
    assert (
        four.filter(pl.col("record_id").str.ends_with("-2"))["swapped"].to_list()[:20]
        != (four.filter(pl.col("record_id").str.ends_with("-3"))["swapped"].to_list()[:20])
    )


def test_texts_are_data(inputs: Inputs) -> None:
    """Reference, defect 17, and braces: no text is evaluated or formatted."""
    nasty = "__import__('os').abort() {Output} %s \\1 \x00 \u2028"
    inputs.response0 = inputs.response0.with_columns(instruction=pl.lit(nasty), response=pl.lit(nasty))
    inputs.response1 = inputs.response1.with_columns(instruction=pl.lit(nasty), response=pl.lit(nasty))
    table, _ = inputs.aggregate()
    assert set(table["instruction"]) == set(table["output_1"]) == {nasty}


def test_no_source_evaluates_or_unpickles() -> None:
    """Reference, defect 17."""
    for file in SCRIPTS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), file
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "cloudpickle"} & set(names), file


# ---- one record: scores, signs, rules --------------------------------------------------------------------------


def record(
    scores: list[float], traits: Traits = PLAIN, *, number: int = 0, key: str = "k", **changes: Any
) -> Drawn | str:
    quiet = {"label_noise": 0, "rule_label_noise": 0, "refusal_probability": 1}
    return draw_record(key, number, scores, traits, principles=PRINCIPLES[:-1], settings=settings(**(quiet | changes)))


def winner(drawn: Drawn | str) -> int:
    """0 where response0 is preferred, 1 where response1 is."""
    assert isinstance(drawn, Drawn)
    return (drawn.preference - 1) ^ drawn.swapped


def plain_scores(s12: list[float], s21: list[float]) -> list[float]:
    """Scores from the formula, one number at a time: mean of both orders over the variance of all pooled scores."""
    pooled = [*s12, *s21]
    center = sum(pooled) / len(pooled)
    variance = sum((score - center) ** 2 for score in pooled) / len(pooled)
    pairs = list(zip(s12, s21, strict=True))
    return [(a + b) / 2 / variance if min(a, b) > 0 or max(a, b) < 0 else 0.0 for a, b in pairs]


def test_scores_are_means_over_pooled_variance_and_zero_where_orders_disagree() -> None:
    s12, s21 = [1.0, -2.0, 3.0, 0.0, -1.0], [3.0, -4.0, -1.0, 2.0, 1.0]
    variance = sum((score - 0.2) ** 2 for score in s12 + s21) / 10
    assert scaled_scores(np.array(s12), np.array(s21)) == pytest.approx([2 / variance, -3 / variance, 0, 0, 0])
    rng = np.random.default_rng(3)
    for shift in (0.0, 5.0):  # the judge's bias for the first place
        s12, s21 = (rng.normal(sign * shift, 2, 50).tolist() for sign in (1, -1))
        assert scaled_scores(np.array(s12), np.array(s21)) == pytest.approx(plain_scores(s12, s21))


def test_a_principle_decided_by_position_seldom_dominates() -> None:
    """With equal means, it has the larger variance, and so the smaller scores."""
    means = np.array([1.0, -1.0, 2.0, -2.0])
    for bias in (1.5, 5.0):
        fair, biased = scaled_scores(means, means), scaled_scores(means + bias, means - bias)
        agreeing = biased != 0
        assert agreeing.sum() == (np.abs(means) > bias).sum()
        assert (np.abs(biased[agreeing]) < np.abs(fair[agreeing]) / 1.9).all()


def test_the_mean_of_both_orders_keeps_what_a_judge_of_positions_means() -> None:
    """It likes the first output, and the better one slightly more: the two orders hardly ever agree."""
    rng = np.random.default_rng(5)
    better = rng.choice([-1.0, 1.0], 500)
    s12, s21 = 0.5 * better + 4 + rng.normal(0, 0.1, 500), 0.5 * better - 4 + rng.normal(0, 0.1, 500)
    assert not scaled_scores(s12, s21).any()
    kept = scaled_scores(s12, s21, "mean")
    assert (np.sign(kept) == better).all()
    assert kept == pytest.approx((s12 + s21) / 2 / np.var([s12, s21]))


@pytest.mark.parametrize("values", [[], [1.0], [0.1, 0.1, 0.1]])
def test_scores_without_variance_have_no_scale(values: list[float]) -> None:
    with pytest.raises(ValueError, match="variance"):
        scaled_scores(np.array(values), np.array(values))


@pytest.mark.parametrize(("score", "expected"), [(2.0, 0), (-2.0, 1)])
def test_a_positive_score_prefers_response0_and_negation_turns_it(score: float, expected: int) -> None:
    for number in range(20):
        assert winner(record([score] * 5, number=number, negation_probability=0)) == expected
        turned = record([score] * 5, number=number, negation_probability=1)
        assert winner(turned) == 1 - expected
        assert isinstance(turned, Drawn)
        assert all(turned.negated)
        assert all("Not " in text for text in turned.definitions)


def test_the_largest_score_decides_or_the_sum() -> None:
    scores = [3.0, -2.0, -2.0, 0.5, 0.0]
    everything: dict[str, Any] = {"negation_probability": 0, "geometric_p": 1e-9}
    decided: Counter[str] = Counter()
    for number in range(200):
        one = record(scores, number=number, **everything)
        total = record(scores, number=number, decision="sum", **everything)
        if not isinstance(one, Drawn) or len(one.dimensions) < 5:
            continue
        assert one.deciding == "Clear"
        assert winner(one) == 0
        assert isinstance(total, Drawn)
        assert total.deciding is None
        assert winner(total) == 1
        decided["all"] += 1
    assert decided["all"] > 10


def test_written_scores_favour_output_1_where_positive() -> None:
    for number in range(40):
        drawn = record([1.0, -2.0, 3.0, -4.0, 5.0], number=number)
        assert isinstance(drawn, Drawn)
        top = max(drawn.scores, key=abs)
        assert drawn.preference == (1 if top > 0 else 2)
        assert drawn.deciding == drawn.dimensions[drawn.scores.index(top)]


def test_no_preference_is_skipped_even_where_a_rule_would_decide() -> None:
    assert record([0.0] * 5) == "no_preference"
    assert record([0.0] * 5, decision="sum") == "no_preference"
    assert record([0.0] * 5, Traits((True, False), None, (None, None))) == "no_preference"


@pytest.mark.parametrize(
    ("refuses", "probability", "expected", "rule"),
    [
        ((True, False), 1, 1, "refusal"),
        ((False, True), 1, 0, "refusal"),
        ((True, True), 1, 0, None),
        ((False, False), 1, 0, None),
        ((True, False), 0, 0, None),
    ],
)
def test_refusal_rule(refuses: tuple[bool, bool], probability: float, expected: int, rule: str | None) -> None:
    traits = Traits(refuses, None, (None, None))
    drawn = record([1.0] * 5, traits, negation_probability=0, refusal_probability=probability)
    assert winner(drawn) == expected
    assert isinstance(drawn, Drawn)
    assert drawn.rule == rule
    assert (drawn.deciding is None) == (rule is not None)


@pytest.mark.parametrize(
    ("asked", "answers", "expected"),
    [
        ("en", ("en", "en"), 0),
        ("en", ("de", "en"), 1),
        ("en", ("en", "de"), 0),
        ("en", ("de", "fr"), "language"),
        ("en", (None, "de"), 0),
        ("en", ("de", None), 1),
        (None, ("de", "fr"), 0),
    ],
)
def test_language_rule(asked: str | None, answers: tuple[str | None, str | None], expected: int | str) -> None:
    drawn = record([1.0] * 5, Traits((False, False), asked, answers), negation_probability=0)
    assert (drawn if isinstance(drawn, str) else winner(drawn)) == expected
    off = record([1.0] * 5, Traits((False, False), asked, answers), negation_probability=0, language_rule=False)
    assert winner(off) == 0
    assert isinstance(off, Drawn)
    assert off.rule is None


def test_language_outranks_refusal_and_follows_the_outputs() -> None:
    traits = Traits((True, False), "en", ("en", "de"))
    drawn = [record([1.0] * 5, traits, number=number) for number in range(20)]
    for one in drawn:
        assert isinstance(one, Drawn)
        assert one.rule == "language"
        assert winner(one) == 0
        written = (one.output_1_language, one.output_2_language)
        assert written == (("de", "en") if one.swapped else ("en", "de"))
    assert len({one.swapped for one in drawn if isinstance(one, Drawn)}) == 2


def test_a_rules_setting_changes_no_other_draw() -> None:
    for number in range(20):
        one = record([1.0] * 5, number=number)
        other = record([1.0] * 5, Traits((True, False), "en", ("de", "en")), number=number, label_noise=1)
        assert isinstance(one, Drawn)
        assert isinstance(other, Drawn)
        assert (one.dimensions, one.negated, one.swapped) == (other.dimensions, other.negated, other.swapped)


# ---- distributions of the draws: five standard deviations ------------------------------------------------------


def assert_frequency(hits: int, n: int, probability: float) -> None:
    assert abs(hits / n - probability) <= 5 * sqrt(probability * (1 - probability) / n)


def draws(n: int, traits: Traits = PLAIN, **changes: Any) -> list[Drawn]:
    found = [
        draw_record(f"k{i}", 0, [1.0, 2, -3, 4, -5], traits, principles=PRINCIPLES[:-1], settings=settings(**changes))
        for i in range(n)
    ]
    return [one for one in found if isinstance(one, Drawn)]


def test_number_of_principles_is_geometric_redrawn_while_too_large() -> None:
    p, largest = 0.2, 8
    assert count_probabilities(p, largest) == pytest.approx(
        [p * (1 - p) ** (k - 1) / (1 - (1 - p) ** largest) for k in range(1, largest + 1)]
    )
    assert count_probabilities(1.0, 3).tolist() == [1, 0, 0]
    n = 4000
    seen = Counter(len(one.dimensions) for one in draws(n))  # five principles: redrawn while larger than five
    assert set(seen) == {1, 2, 3, 4, 5}
    for k in range(1, 6):
        assert_frequency(seen[k], n, p * (1 - p) ** (k - 1) / (1 - (1 - p) ** 5))
    assert {len(one.dimensions) for one in draws(500, max_principles=3)} == {1, 2, 3}


def test_principles_are_drawn_evenly_without_replacement() -> None:
    found = draws(3000)
    assert all(len(set(one.dimensions)) == len(one.dimensions) for one in found)
    firsts = Counter(one.dimensions[0] for one in found)
    for name in NAMES:
        assert_frequency(firsts[name], len(found), 1 / 5)


def test_negation_noise_and_order_have_their_probabilities() -> None:
    found = draws(6000)
    turned = [flag for one in found for flag in one.negated]
    assert_frequency(sum(turned), len(turned), 0.5)
    assert_frequency(sum(one.swapped for one in found), len(found), 0.5)
    assert_frequency(sum(one.flipped for one in found), len(found), 0.1)
    # Independent: noise does not prefer an order, the order does not leak the label.
    both = sum(one.flipped and one.swapped for one in found)
    assert_frequency(both, len(found), 0.05)
    assert_frequency(sum(one.preference == 1 for one in found), len(found), 0.5)
    negated = draws(500, negation_probability=0.0)
    assert not any(flag for one in negated for flag in one.negated)


def test_rules_have_their_probability_and_their_noise() -> None:
    n = 6000
    refusing = draws(n, Traits((True, False), None, (None, None)))
    ruled = [one for one in refusing if one.rule]
    assert_frequency(len(ruled), n, 0.5)
    assert_frequency(sum(one.flipped for one in ruled), len(ruled), 0.25)
    free = [one for one in refusing if not one.rule]
    assert_frequency(sum(one.flipped for one in free), len(free), 0.1)
    # After noise, the answer that does not refuse wins in 3 of 4 records that the rule decided.
    assert_frequency(sum(winner(one) == 1 for one in ruled), len(ruled), 0.75)
    spoken = draws(n, Traits((False, False), "en", ("de", "en")))
    assert all(one.rule == "language" for one in spoken)
    assert_frequency(sum(one.flipped for one in spoken), n, 0.25)


# ---- languages -------------------------------------------------------------------------------------------------


def test_languages_are_named_only_with_confidence() -> None:
    assert language.detect([ENGLISH, GERMAN, FRENCH, REFUSAL]) == ["en", "de", "fr", "en"]
    unclear = ["", " ", "42", "3.14159 * 2 = 6.28318", "OK", "Paris", "!!! ???", "$\\frac{1}{2}$", "for i in x: i += 1"]
    assert language.detect(unclear) == [None] * len(unclear)
    assert language.detect([]) == []


def test_long_texts_are_looked_at_up_to_a_length() -> None:
    code = "".join(f"x{number} = {number} + y[{number}]\n" for number in range(100))
    assert len(code) > language.PREFIXES[0]
    assert language.detect([ENGLISH * 10 + GERMAN * 100, code + ENGLISH * 20]) == ["en", "en"]
    assert language.detect([code * 3 + ENGLISH * 20]) == [None]
    started = time.process_time()
    language.detect([ENGLISH * 100_000])  # a minute, if it read all of it
    assert time.process_time() - started < 5


def test_no_language_is_detected_for_a_rule_that_is_off(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise AssertionError("a text was looked at")

    monkeypatch.setattr(language, "detect", refuse)
    table, _ = inputs.aggregate(language_rule=False)
    assert table.height
    for name in ("instruction_language", "output_1_language", "output_2_language"):
        assert table[name].null_count() == table.height


def test_progress_is_told(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        inputs.aggregate()
    assert "60/60" in caplog.text
    assert "pairs" in caplog.text


def test_responses_are_cut_before_anything_looks_at_them(inputs: Inputs) -> None:
    """A refusal or another language after the turn marker is not the answer's."""
    pairs = inputs.response0.height
    behind = ENGLISH + MARKERS[0] + REFUSAL + GERMAN
    inputs.response0 = inputs.response0.with_columns(instruction=pl.lit(ENGLISH), response=pl.lit(behind))
    inputs.response1 = inputs.response1.with_columns(instruction=pl.lit(ENGLISH), response=pl.lit(ENGLISH + "!"))
    table, _ = inputs.aggregate()
    assert table["rule"].null_count() == table.height > pairs
    assert set(table["output_1"]) == set(table["output_2"]) == {cut_at_markers(behind, MARKERS), ENGLISH + "!"}


# ---- errors: nothing partial, and a message with file, key and remedy ------------------------------------------


def broken_constant(inputs: Inputs) -> None:
    constant = pl.col("dimension") == "Kind"
    inputs.preferences = inputs.preferences.with_columns(
        pl.when(constant).then(0.1).otherwise(pl.col(name)).alias(name) for name in ("s12", "s21")
    )


def broken_preferences(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Inputs], None]:
    def apply(inputs: Inputs) -> None:
        inputs.preferences = change(inputs.preferences)

    return apply


def broken_response1(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Inputs], None]:
    def apply(inputs: Inputs) -> None:
        inputs.response1 = change(inputs.response1)

    return apply


def at(key: str, column: str, value: Any) -> pl.Expr:
    return pl.when(pl.col("prompt_id") == key).then(pl.lit(value)).otherwise(pl.col(column)).alias(column)


BROKEN = {
    "response missing": (
        broken_response1(lambda t: t.filter(pl.col("prompt_id") != "p005")),
        "p005 is not in .*response1",
    ),
    "response twice": (broken_response1(lambda t: pl.concat([t, t.head(1)])), "response1.*2 rows of prompt_id p000"),
    "response null": (
        broken_response1(lambda t: t.with_columns(at("p005", "response", None))),
        "response1.*nulls in response.*p005",
    ),
    "key null": (
        broken_response1(lambda t: t.with_columns(at("p005", "prompt_id", None))),
        "response1.*prompt_id None",
    ),
    "other instruction": (
        broken_response1(lambda t: t.with_columns(at("p005", "instruction", "else"))),
        "p005 has a different instruction",
    ),
    "column missing": (broken_response1(lambda t: t.drop("input")), "response1.*lacks columns: input"),
    "judged twice": (
        broken_preferences(lambda t: pl.concat([t, t.head(1)])),
        "preferences.*2 rows of prompt_id p000, dimension Clear",
    ),
    "judged unknown prompt": (
        broken_preferences(lambda t: t.with_columns(pl.col("prompt_id").replace("p005", "q"))),
        "preferences.*prompt_id q .*not in .*response0",
    ),
    "judged in part": (
        broken_preferences(lambda t: t.filter(~((pl.col("prompt_id") == "p005") & (pl.col("dimension") == "Exact")))),
        "p005 has judgements of only one of Clear and Exact",
    ),
    "dimension missing": (
        broken_preferences(lambda t: t.filter(pl.col("dimension") != "Kind")),
        "no rows of the dimension Kind.*aggregation.dimensions",
    ),
    "not a number": (
        broken_preferences(lambda t: t.with_columns(at("p005", "s21", float("nan")))),
        "preferences.*p005, Clear.*must both be finite",
    ),
    "constant": (broken_constant, "Kind has the same score for all 60 pairs"),
    "no preference at all": (
        broken_preferences(lambda t: t.with_columns(s21=-pl.col("s12").sign() * pl.col("s21").abs())),
        "none of 60 pairs yields a record .*no_preference 240",
    ),
    "no judgements": (broken_preferences(lambda t: t.clear()), "no rows of the dimension Clear"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_what_does_not_fit_is_an_error_with_file_key_and_remedy(inputs: Inputs, case: str) -> None:
    change, message = BROKEN[case]
    change(inputs)
    with pytest.raises(UserError, match=f"(?s){message}"):
        inputs.aggregate()


def test_unknown_and_repeated_dimensions_are_errors(inputs: Inputs) -> None:
    with pytest.raises(UserError, match=r"aggregation\.dimensions: Rude not among the principles"):
        inputs.aggregate(dimensions=["Kind", "Rude"])
    with pytest.raises(ValueError, match="Kind named twice"):
        settings(dimensions=["Kind", "Short", "Kind"])


# ---- the script ------------------------------------------------------------------------------------------------


def arguments(inputs: Inputs, output: Path) -> aggregate_preferences.Arguments:
    preferences, response0, response1 = inputs.write()
    principles = inputs.folder / "principles.json"
    principles.write_text(json.dumps([principle.model_dump() for principle in PRINCIPLES]))
    return aggregate_preferences.Arguments(
        preferences=preferences,
        response0=response0,
        response1=response1,
        principles=principles,
        output=output,
        aggregation=settings(),
        turn_markers=MARKERS,
    )


def test_script_writes_table_and_manifest(inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "out" / "principle_preferences.parquet"
    given = arguments(inputs, output)
    aggregate_preferences.main(given)
    expected, counts = inputs.aggregate()
    table = pl.read_parquet(output)
    assert table.equals(expected)
    assert dict(table.schema) == PRINCIPLE_RECORDS.schema
    assert table["record_id"].to_list() == sorted(table["record_id"])
    assert table["record_id"].is_unique().all()
    manifest = json.loads((tmp_path / "out" / "principle_preferences.manifest.json").read_text())
    assert manifest["counts"] == counts
    assert manifest["settings"]["aggregation"]["seed"] == 42
    assert manifest["inputs"][str(given.response1)] == hash_path(given.response1)
    assert {file.name for file in output.parent.iterdir()} == {output.name, "principle_preferences.manifest.json"}


def test_lists_on_the_command_line_keep_line_breaks_and_quotes() -> None:
    paths = [f"--{name}=x" for name in ("preferences", "response0", "response1", "principles", "output")]
    sections = [f"--aggregation={settings().model_dump_json()}"]
    for markers in (MARKERS, ['a"b\\n,c[', "ä"], []):
        parsed = CliApp.run(
            aggregate_preferences.Arguments, cli_args=[*paths, *sections, f"--turn-markers={json.dumps(markers)}"]
        )
        assert parsed.turn_markers == markers


def test_script_fails_with_a_message_and_writes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    """Reference, defect 2: an instruction mismatch must not end with exit status 0."""
    inputs.response1 = inputs.response1.with_columns(at("p005", "instruction", "else"))
    output = tmp_path / "out" / "table.parquet"
    given = arguments(inputs, output)
    options = [
        f"--{name}={getattr(given, name)}" for name in ("preferences", "response0", "response1", "principles", "output")
    ]
    command = [sys.executable, str(SCRIPTS / "aggregate_preferences.py"), *options]
    command.append(f"--aggregation={settings().model_dump_json()}")
    done = forks.run(command)
    assert done.returncode == 1
    assert "p005 has a different instruction" in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.parent.exists() or not any(output.parent.iterdir())
