"""Intervals: their widths are those of theory, for shares and means of prompts."""

import math

import numpy as np
import pytest

from salmon import intervals


def test_an_interval_does_not_depend_on_how_much_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws in blocks are different draws from the same distribution."""
    values = np.random.default_rng(0).random(300) < 0.3
    groups = [f"p{number}" for number in range(300)]
    whole = intervals.estimate(values, groups, 0)
    monkeypatch.setattr(intervals, "HELD", 7_000)
    parts = intervals.estimate(values, groups, 0)
    assert parts["low"] == pytest.approx(whole["low"], abs=0.01)
    assert parts["high"] == pytest.approx(whole["high"], abs=0.01)


def test_an_interval_is_that_of_prompts_and_not_of_rows() -> None:
    """If all rows of a prompt are equal, the mean's interval is as wide as theory says, for any number of rows."""
    generator = np.random.default_rng(0)
    values = generator.random(200) < 0.3
    groups = [f"p{number}" for number in range(200)]
    once = intervals.estimate(values, groups, 0)
    often = intervals.estimate(np.repeat(values, 5), np.repeat(groups, 5).tolist(), 0)
    share = values.mean()
    width = 2 * 1.96 * math.sqrt(share * (1 - share) / 200)
    for found in (once, often):
        assert found["value"] == pytest.approx(share)
        assert found["high"] - found["low"] == pytest.approx(width, rel=0.1)
    assert (once["number"], often["number"]) == (200, 1000)
    assert intervals.estimate(values, groups, 0) == once
    assert intervals.estimate([math.nan], ["p"], 0) == {"value": None, "low": None, "high": None, "number": 0}
    assert intervals.estimate([1.0, math.nan], ["p", "q"], 0)["number"] == 1


def test_no_interval_has_the_width_of_nothing() -> None:
    """Shares of 0 and 1, few prompts, and many rows of a few prompts all have intervals of some width."""
    names = [f"p{number}" for number in range(40)]
    for value in (0.0, 0.5, 1.0):
        for groups in (names, names[:3], [*"ab"] * 20, ["a"], [*names, *names]):
            found = intervals.share([value] * len(groups), groups, 0)
            low, high = found["low"], found["high"]
            assert low is not None
            assert high is not None
            assert 0 <= low <= value <= high <= 1
            assert high - low > 0.08
            assert (found["value"], found["number"]) == (value, len(groups))
    few = intervals.estimate([1.0, 2.0, 4.0], [*"abc"], 0)
    assert few == {"value": pytest.approx(7 / 3), "low": None, "high": None, "number": 3}
    assert intervals.share([], [], 0)["value"] is None
    won = [1.0, 0.5, 0.0, 1.0] * 10  # halves: not a plain share
    assert intervals.share(won, names, 0) == intervals.estimate(won, names, 0)
    # Four decided prompts, all won: chance gives so clear a result one time in eight.
    rare = intervals.share([1.0] * 4 + [0.5] * 28, names[:32], 0)
    assert rare["low"] < 0.5 < rare["high"]
    # One of many rows of some prompts differs from the rest: as wide as if each prompt were one row.
    rare = intervals.share([1.0] + [0.0] * 37, [*names[:18] * 2, *names[:2]], 0)
    assert (rare["low"], rare["high"]) == intervals.wilson(1 / 38, 18)


@pytest.mark.parametrize(("prompts", "rows", "truth"), [(12, 3, 0.9), (18, 2, 0.1), (30, 2, 0.1), (60, 3, 0.05)])
def test_an_interval_of_prompts_with_several_rows_contains_the_truth(prompts: int, rows: int, truth: float) -> None:
    """In about 95 of 100 draws, or in more, also where few prompts differ; rows of a prompt are mostly alike."""
    generator, groups = np.random.default_rng(0), np.repeat(np.arange(prompts), rows).astype(str).tolist()
    hits = []
    for _ in range(400):
        own, common = (generator.random((prompts, number)) < truth for number in (rows, 1))
        values = np.where(generator.random((prompts, rows)) < 0.7, common, own).ravel()
        found = intervals.share(values.astype(float), groups, 0)
        hits.append(found["low"] <= truth <= found["high"])
    assert np.mean(hits) > 0.93


def test_wilsons_interval_holds_what_it_says() -> None:
    """Its ends are the shares under which the observed one is just 1.96 standard errors away (Wilson, 1927)."""
    for value, number in ((0.3, 20), (0.9, 50), (0.02, 100)):
        for end in intervals.wilson(value, number):
            assert abs(value - end) / math.sqrt(end * (1 - end) / number) == pytest.approx(1.959964)
    assert intervals.wilson(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    names = [f"p{number}" for number in range(50)]
    values = np.arange(50) < 15
    found = intervals.share(values, names, 0)
    assert (found["low"], found["high"]) == intervals.wilson(0.3, 50)
