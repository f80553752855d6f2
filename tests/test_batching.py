"""The division of rows into passes of a model, and among ranks."""

import numpy as np
import pytest

from salmon.batching import halves, passes, right_pad


def costs(parts: list[list[list[int]]], lengths: list[int]) -> np.ndarray:
    """Tokens of each rank's rectangle, [passes, ranks]."""
    return np.array([[len(part) * max((lengths[row] for row in part), default=0) for part in each] for each in parts])


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_in_one_part_within_the_budget(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 200, random.integers(1, 60)).tolist()
    budget, ranks = int(random.integers(1, 3000)), int(random.integers(1, 9))
    found = passes(lengths, budget, ranks)
    assert sorted(row for each in found for part in each for row in part) == list(range(len(lengths)))
    assert all(len(each) == ranks for each in found)
    assert costs(found, lengths).max() <= max(budget, *lengths)
    empty = sum(not part for each in found for part in each)
    assert empty == 0 or empty == len(found) * ranks - len(lengths)
    # No more passes than if batches of similar lengths were filled one after another.
    ordered, batches = sorted(lengths, reverse=True), 0
    while ordered:
        ordered, batches = ordered[max(budget, *lengths) // ordered[0] :], batches + 1
    assert len(found) == -(-batches // ranks)


def test_no_rows_are_no_passes() -> None:
    assert passes([], 100, 2) == []


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    assert passes([3, 50, 4, 60], 10, 1) == [[[3]], [[1]], [[2, 0]]]


def test_the_longest_comes_first() -> None:
    assert costs(passes([5, 9, 100, 7, 8], 30, 1), [5, 9, 100, 7, 8]).tolist() == [[100], [36]]


@pytest.mark.parametrize("ranks", [8, 48])
def test_ranks_do_not_wait_long_for_each_other(ranks: int) -> None:
    """A minibatch of the paper's size with lengths like OASST1's: log-normal, cut at the response's length."""
    random = np.random.default_rng(1)
    lengths = (300 + np.clip(random.lognormal(4.9, 0.9, 288), 4, 1024)).astype(int).tolist()
    found = costs(passes(lengths, 8192, ranks), lengths)
    assert found.max(axis=1).sum() < 1.15 * found.sum() / ranks
    assert found.sum() < 1.1 * sum(lengths)  # little of it is padding


@pytest.mark.parametrize("seed", range(20))
def test_two_rectangles_with_the_least_padding(seed: int) -> None:
    """No other division has fewer tokens; a second rectangle that saves too little is not made."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 30, random.integers(1, 9)).tolist()
    longer, shorter = halves(lengths)
    assert sorted(longer + shorter) == list(range(len(lengths)))
    assert lengths[longer[0]] == max(lengths)

    def area(rows: list[int]) -> int:
        return len(rows) * max((lengths[row] for row in rows), default=0)

    every = range(2 ** len(lengths))
    divisions = ([[row for row in range(len(lengths)) if bits >> row & 1 == side] for side in (0, 1)] for bits in every)
    least = area(longer) + area(shorter)
    assert least == min(area(one) + area(other) for one, other in divisions)
    saved = area([*longer, *shorter]) - least
    assert bool(shorter) == (saved > 0)
    assert halves(lengths, saving=saved)[1] == []
    if saved:
        assert halves(lengths, saving=saved - 1) == halves(lengths, least=least) == (longer, shorter)
        assert halves(lengths, least=least + 1)[1] == []


def test_halves_of_no_rows() -> None:
    assert halves([]) == ([], [])


def test_ranks_compute_alike_where_rectangles_do_not_say_what_a_row_costs() -> None:
    """A row has a cost of its own, up to its rectangle's; the parts of a pass cost about the same."""
    random = np.random.default_rng(1)
    rows = random.integers(100, 1200, 64)
    true = (rows * random.uniform(0.5, 1.0, 64)).astype(int).tolist()

    def cost(part: list[int]) -> int:
        return sum(true[row] for row in part)

    def waited_for(found: list[list[list[int]]]) -> int:
        return sum(max(map(cost, each)) for each in found)

    plain, dealt = passes(rows.tolist(), 2048, 8), passes(rows.tolist(), 2048, 8, cost=cost)
    assert sorted(row for each in dealt for part in each for row in part) == list(range(64))
    assert costs(dealt, rows.tolist()).max() <= 2048
    assert len(dealt) == len(plain)
    # The least possible for these parts: the costliest eight in one pass, and so on.
    least = sum(sorted((cost(part) for each in dealt for part in each), reverse=True)[::8])
    assert waited_for(dealt) == least < waited_for(plain)


def test_padding_on_the_right() -> None:
    assert right_pad([[5, 6], [7], [8, 9, 1]]).tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 1]]
