"""Draws depend only on their key."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from salmon import randomness
from salmon.text import cut_at_markers

SCRIPTS = Path(__file__).parents[1] / "workflow_scripts"


def test_seed_has_63_bits_and_depends_on_every_part() -> None:
    keys = [("a", 1), ("a", 2), ("b", 1), ("a", "1"), ("a", 1.0), ("a", 1, None), ("a, 1",), ("a\0", 1), ("a", "\0", 1)]
    seeds = [randomness.seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_is_the_same_in_another_process() -> None:
    code = "from salmon.randomness import seed_of; print(seed_of('x', 42, 'ä', True))"
    # Another hash seed: Python's own hash of a string would differ.
    environment = {"PYTHONPATH": str(SCRIPTS), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(other.stdout) == randomness.seed_of("x", 42, "ä", True)


def test_numpy_scalars_count_as_python_values() -> None:
    assert randomness.seed_of(np.int64(3), np.float64(0.5)) == randomness.seed_of(3, 0.5)


def test_parts_without_a_lasting_repr_are_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        randomness.seed_of(object())


def test_generators_of_a_key_draw_the_same_and_not_from_a_shared_state() -> None:
    first = randomness.rng("x", 1)
    first.random(10)
    assert randomness.rng("x", 1).random(5).tolist() == randomness.rng("x", 1).random(5).tolist()


def test_generators_of_neighbouring_keys_are_uniform_together() -> None:
    n = 4000
    draws = np.array([randomness.rng("x", 42, number).random() for number in range(n)])
    assert abs(draws.mean() - 0.5) < 5 / np.sqrt(12 * n)  # the variance of a uniform draw is 1/12
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize(
    ("text", "markers", "expected"),
    [
        ("answer\n### User\nmore", ["\n### User\n"], "answer"),
        ("one\n### Heading\ntwo", ["\n### User\n"], "one\n### Heading\ntwo"),  # reference, defect 13
        ("x ABC", ["BC", "AB"], "x "),  # the one that begins first, though the other is found first
        ("a.b*c", [".*"], "a.b*c"),  # literal, no pattern
        ("a\nb", [], "a\nb"),
        ("", ["x"], ""),
    ],
)
def test_cut_at_markers(text: str, markers: list[str], expected: str) -> None:
    assert cut_at_markers(text, markers) == expected


def test_empty_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        cut_at_markers("text", ["x", ""])
