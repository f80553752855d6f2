"""The sampling benchmark runs with a tiny model."""

import sys

import pytest

from benchmarks import sampling

OPTIONS = "--tiny --rows 8 --batch 2 --cap 90 --rounds 1"


def test_all_ways_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sampling.py", *OPTIONS.split()])
    sampling.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    found = {name: (int(calls), float(share)) for name, _, _, calls, share in rows[2:]}
    assert list(found) == ["padded", "generate", "continuous", sampling.STATIC, "ours, refill 0.25"]
    # Without refill a batch takes as many calls as its longest row has tokens, whichever method samples.
    assert found["padded"] == found["generate"] == found[sampling.STATIC]
    assert found["ours, refill 0.25"][0] < found[sampling.STATIC][0]
    assert all(0 < share <= 1 for _, share in found.values())
