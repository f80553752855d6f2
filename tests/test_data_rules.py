"""The benchmark of the data rules runs, both ways."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "data_rules.py"


def test_a_rule_is_measured_both_ways() -> None:
    options = ["--scale", "0.002", "--times", "1", "--rules", "gather_judgements", "pmp"]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heading, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.strip().split("\n")
    ]
    assert heading[:3] == ["rule", "reads", "rows"]
    assert [(line[0], line[2]) for line in lines] == [("gather_judgements", "196"), ("pmp", "698")]
    for line in lines:
        for seconds, memory in (line[4:6], line[6:8]):
            assert float(seconds.split()[0]) > 0
            assert float(memory.removesuffix(" GB")) > 0
