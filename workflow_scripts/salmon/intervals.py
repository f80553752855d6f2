"""Means and shares with confidence intervals.

An interval says how far a number depends on the prompts that happened to be drawn. That of a mean is a bootstrap's:
prompts are drawn anew, with all rows of each, since rows of one prompt are not independent. Draws of few prompts, or of
rows that are all alike, say nothing: a mean of less than `FEW` prompts has no interval, and shares have Wilson's where
`share` says so.
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
HELD = 2_000_000  # numbers of a block of draws, at most
LEVEL = 0.95
FEW = 10  # prompts; of less, a bootstrap's interval is too narrow, and of one it has no width
INTERVALS = (
    f"A mean's is a bootstrap's that draws whole prompts, and a mean of less than {FEW} prompts has none. A share of "
    "prompts without halves has Wilson's interval, as has every share that is 0 or 1, or of which less than "
    f"{FEW} prompts are decided: that is wider than it need be."
)
"""What intervals are, for reports."""
Estimate = dict[str, float | int | None]
"""`value`, `low` and `high` of its interval, and `number` of rows; null where there are none."""
Values = Sequence[float] | npt.NDArray[Any]
"""Of rows; NaN where a row has none."""


def estimate(values: Values, groups: Sequence[str], seed: int) -> Estimate:
    """Mean of some rows, with the percentile interval of a bootstrap by group; null below `FEW` groups.

    Args:
        values: of the rows, [N]; NaN where a row has none, which is then left out.
        groups: prompt of each row, [N].
        seed: of the draws.
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
    """Share of some rows for which something holds.

    Its interval is Wilson's where each group is one row that is 1 or 0. It is also Wilson's, of as many rows as there
    are groups, where less than `FEW` groups have a row that is decided (no half), or all rows are alike: too wide
    rather than too narrow. Else it is the bootstrap's (`estimate`).

    Args:
        values: of the rows, [N]: 1, 0, or in between for what is undecided; NaN where a row has none.
        groups: prompt of each row, [N].
        seed: of the draws.
    """
    column = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(column)
    rows, number = column[known], len({group for group, is_known in zip(groups, known, strict=True) if is_known})
    plain = number == len(rows) and np.isin(rows, (0, 1)).all()
    # Of four wins and nothing but halves besides, a bootstrap would be sure.
    decided = len({group for group, is_one in zip(groups, known & (column != 0.5), strict=True) if is_one})
    if number and (plain or decided < FEW or (rows == rows[0]).all()):
        low, high = wilson(float(rows.mean()), number)
        return {"value": float(rows.mean()), "low": low, "high": high, "number": len(rows)}
    return estimate(values, groups, seed)


def wilson(value: float, number: int) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        value: the share.
        number: of rows that are independent of each other, at least 1.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = value + z**2 / (2 * number)
    half = z * math.sqrt(value * (1 - value) / number + z**2 / (4 * number**2))
    whole = 1 + z**2 / number
    # What is 0 or 1 is so but for rounding.
    return max(0.0, min(value, (middle - half) / whole)), min(1.0, max(value, (middle + half) / whole))


def _resampled(groups: int, seed: int) -> Iterable[npt.NDArray[np.float64]]:
    """How often each group is drawn, in `DRAWS` draws of as many groups as there are: blocks of [draws, groups]."""
    if groups * DRAWS <= HELD:
        return (_drawn(groups, seed),)
    generator, block = rng("bootstrap", seed), max(1, HELD // groups)
    sizes = [min(block, DRAWS - start) for start in range(0, DRAWS, block)]
    return (_draw(generator, groups, size) for size in sizes)


@lru_cache(maxsize=8)  # many numbers are of the same prompts
def _drawn(groups: int, seed: int) -> npt.NDArray[np.float64]:
    return _draw(rng("bootstrap", seed), groups, DRAWS)


def _draw(generator: np.random.Generator, groups: int, draws: int) -> npt.NDArray[np.float64]:
    return generator.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(np.float64)
