"""The GPU benchmark runs on a CPU with a tiny model."""

import json
import sys
from pathlib import Path

from tests import forks

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
OPTIONS = "--shapes tiny --device cpu --batches 4 --rounds 2 --cap 12 --rollouts 4 --tokens-per-pass 200 --minutes 1"


def test_all_cells_are_measured(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    line = [sys.executable, SCRIPT, *OPTIONS.split(), "--output", output]
    done = forks.run(line)
    assert done.returncode == 0, done.stderr
    cells = json.loads(output.read_text())["cells"]
    errors = [cell["error"] for cell in cells if "error" in cell]
    assert errors == []
    precisions = ["bf16", "nf4"]
    sampled = [cell for cell in cells if cell["table"] == "sampling"]
    assert [(cell["precision"], cell["engine"], cell["rows"]) for cell in sampled] == [
        (precision, engine, 8) for precision in precisions for engine in ("ours", "transformers")
    ]
    assert len({cell["tokens"] for cell in sampled}) == 1
    assert all(0 < cell["useful share"] <= 1 for cell in sampled)
    parts = [(cell["precision"], cell["part"].split(",")[0]) for cell in cells if cell["table"] == "ppo"]
    assert parts == [
        (precision, part)
        for precision in precisions
        for part in ("measure", "score", "update", "update with checkpointing")
    ]
    assert "### PPO\n\n| model | precision | part |" in done.stdout
