"""Print the contents of a finished run: path and size of each artifact, and the oracles' measurements."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow_scripts")]

from demo import report  # noqa: E402
from salmon.configuration import TARGETS  # noqa: E402


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def lines(results: Path) -> list[tuple[str, str, str]]:
    """Target, path and a short description of each artifact."""
    artifacts = []
    for name, target in TARGETS.items():
        table = results / target.artifact
        # Not every run needs every table: the demo has no supervised fine-tuning.
        if table.suffix != ".parquet" or not table.exists():
            continue
        counts = read(table.with_suffix(".manifest.json"))["counts"]
        rows = (
            counts.get("records") or counts.get("rows") or sum(n for key, n in counts.items() if key.endswith("kept"))
        )
        artifacts.append((name, str(table), f"{rows} rows"))
    for name in ("pmp", "reward_model"):
        folder = results / TARGETS[name].artifact
        evaluation = read(folder / "metrics.json")["evaluation"]
        words = f"{evaluation['accuracy']:.0%} of {evaluation['number']} held-out pairs right"
        artifacts.append((name, f"{folder}/", words))
    for policy in sorted(results.glob("runs/*/policy")):
        steps = [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()]
        first, last = steps[0], steps[-1]
        words = (
            f"{len(steps)} steps: reward {first['reward']:.2f} to {last['reward']:.2f}, KL {last['kl_sequence']:.2f}"
        )
        artifacts.append((f"policy {policy.parent.name}", f"{policy}/", words))
    return artifacts


def main() -> int:
    """Print the artifacts of a results folder, and the measurements of all folders together."""
    parser = argparse.ArgumentParser(description="Print contents and measurements of finished runs of the demo.")
    parser.add_argument("results", type=Path, nargs="+", help="folders of results; several: runs with different seeds")
    parser.add_argument("--check", action="store_true", help="fail if a number misses its bound")
    arguments = parser.parse_args()
    rows = lines(arguments.results[0])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    sys.stdout.write("\nAll of SALMON ran. Its artifacts:\n\n")
    for row in rows:
        sys.stdout.write(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
        )
    sys.stdout.write("\nA manifest next to each table and in each model's folder records its inputs and settings.\n\n")
    evaluations = [read(folder / "demo_evaluation" / "evaluation.json") for folder in arguments.results]
    evaluations = [{**evaluation, "headline": report.headline(evaluation)} for evaluation in evaluations]
    sys.stdout.write(report.markdown(evaluations))
    if (page := arguments.results[0] / "report.html").exists():
        sys.stdout.write(f"\nPictures and tables of every stage, for a browser: {page}\n")
    if not arguments.check:
        return 0
    findings = report.missed(evaluations)
    sys.stdout.write("".join(f"missed: {finding}\n" for finding in findings))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
