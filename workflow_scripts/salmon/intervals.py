"""Means and shares with confidence intervals.

An interval says how much a number depends on the random choice of prompts. The interval of a mean is a bootstrap's: it
draws prompts with all their rows, because rows of one prompt are not independent. With few prompts, or few that differ
from the rest, such draws say nothing: a mean over fewer than `FEW` prompts has no interval, and shares have Wilson's
where `share` says so.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from salmon.randomness import rng

DRAWS = 2000
HELD = 2_000_000  # maximum numbers in a block of draws
LEVEL = 0.95
FEW = 10  # prompts; with fewer, a bootstrap's interval is too narrow, and with one it has no width
INTERVALS = (
    f"Means have bootstrap intervals, from draws of whole prompts; a mean of fewer than {FEW} prompts has none. A "
    "share has Wilson's interval if each prompt gives one row that is yes or no. It also has Wilson's interval, with "
    f"prompts as rows, if fewer than {FEW} prompts have a row that differs from the most common result; that interval "
    "is wider than necessary."
)
"""Explanation of the intervals, for reports."""
Estimate = dict[str, float | int | None]
"""`value`, `low` and `high` of its interval, and `number` of rows; null without rows."""
Values = Sequence[float] | npt.NDArray[Any]
"""Values of rows; NaN for a row without one."""


def estimate(values: Values, groups: Sequence[str], seed: int) -> Estimate:
    """Mean of some rows, with the percentile interval of a bootstrap by group; null below `FEW` groups.

    Args:
        values: values of the rows, [N]; rows with NaN are left out.
        groups: prompt of each row, [N].
        seed: seed of the draws.
    """
    column = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(column)
    if not known.any():
        return {"value": None, "low": None, "high": None, "number": 0}
    found: Estimate = {"value": float(column[known].mean()), "low": None, "high": None, "number": int(known.sum())}
    _, index = np.unique(np.asarray(groups, dtype=object)[known].astype(str), return_inverse=True)
    sums, sizes = np.bincount(index, weights=column[known]), np.bincount(index)
    if len(sizes) >= FEW:
        parts = [(drawn @ sums) / (drawn @ sizes) for drawn in _resampled(len(sizes), seed)]
        low, high = np.quantile(np.concatenate(parts), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found |= {"low": float(low), "high": float(high)}
    return found


def share(values: Values, groups: Sequence[str], seed: int) -> Estimate:
    """Share of rows for which something holds.

    The interval is Wilson's if each group is one row with 1 or 0. It is also Wilson's, with the number of groups in
    place of the number of rows, if fewer than `FEW` groups have a row that differs from the most common value: too wide
    rather than too narrow. Otherwise it is the bootstrap's (`estimate`).

    Args:
        values: values of the rows, [N]: 1, 0, or in between if undecided; NaN for a row without one.
        groups: prompt of each row, [N].
        seed: seed of the draws.
    """
    column = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(column)
    rows, number = column[known], len({group for group, is_known in zip(groups, known, strict=True) if is_known})
    plain = number == len(rows) and np.isin(rows, (0, 1)).all()
    if not number:
        return estimate(values, groups, seed)
    # With four wins and otherwise only halves, or one loss and otherwise only wins, a bootstrap would be too certain.
    found, counts = np.unique(rows, return_counts=True)
    differs = known & (column != found[counts.argmax()])
    if plain or len({group for group, is_one in zip(groups, differs, strict=True) if is_one}) < FEW:
        low, high = wilson(float(rows.mean()), number)
        return {"value": float(rows.mean()), "low": low, "high": high, "number": len(rows)}
    return estimate(values, groups, seed)


def wilson(value: float, number: int) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        value: the share.
        number: number of independent rows, at least 1.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = value + z**2 / (2 * number)
    half = z * math.sqrt(value * (1 - value) / number + z**2 / (4 * number**2))
    whole = 1 + z**2 / number
    # A bound at 0 or 1 may miss it by rounding.
    return max(0.0, min(value, (middle - half) / whole)), min(1.0, max(value, (middle + half) / whole))


def _resampled(groups: int, seed: int) -> Iterable[npt.NDArray[np.float64]]:
    """How often each group is drawn, in `DRAWS` draws of as many groups as exist: blocks of [draws, groups]."""
    if groups * DRAWS <= HELD:
        return (_drawn(groups, seed),)
    generator, block = rng("bootstrap", seed), max(1, HELD // groups)
    sizes = [min(block, DRAWS - start) for start in range(0, DRAWS, block)]
    return (_draw(generator, groups, size) for size in sizes)


@lru_cache(maxsize=8)  # many numbers share the same prompts
def _drawn(groups: int, seed: int) -> npt.NDArray[np.float64]:
    return _draw(rng("bootstrap", seed), groups, DRAWS)


def _draw(generator: np.random.Generator, groups: int, draws: int) -> npt.NDArray[np.float64]:
    return generator.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(np.float64)
