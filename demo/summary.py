"""Print what a finished run holds: where each artifact is, how much is in it, and how training went."""

import json
import sys
from pathlib import Path
from typing import Any

TABLES = {
    "prompts": "prompts/oasst1",
    "response0": "responses/response0",
    "response1": "responses/response1",
    "preferences": "preferences/preferences",
    "reward_data": "reward_data/principle_preferences",
    "pmp_data": "reward_data/pmp",
    "rl_prompts": "prompts/rl",
}


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def lines(results: Path) -> list[tuple[str, str, str]]:
    """Target, path and a few words on each artifact."""
    found = []
    for target, name in TABLES.items():
        counts = read(results / f"{name}.manifest.json")["counts"]
        rows = (
            counts.get("records") or counts.get("rows") or sum(n for key, n in counts.items() if key.endswith("kept"))
        )
        found.append((target, f"{results / name}.parquet", f"{rows} rows"))
    for target in ("pmp", "reward_model"):
        evaluation = read(results / "models" / target / "metrics.json")["evaluation"]
        words = f"{evaluation['accuracy']:.0%} of {evaluation['number']} held-out pairs right"
        found.append((target, f"{results / 'models' / target}/", words))
    for policy in sorted(results.glob("runs/*/policy")):
        steps = [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()]
        first, last = steps[0], steps[-1]
        words = (
            f"{len(steps)} steps: reward {first['reward']:.2f} to {last['reward']:.2f}, KL {last['kl_sequence']:.2f}"
        )
        found.append((f"policy {policy.parent.name}", f"{policy}/", words))
    return found


def main() -> None:
    """Print the table of the results folder that the command line names."""
    rows = lines(Path(sys.argv[1]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    sys.stdout.write("\nThe whole of SALMON ran. What it made:\n\n")
    for row in rows:
        sys.stdout.write(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
        )
    sys.stdout.write("\nBeside each table and in each model's folder, manifest.json says what it was made of.\n")


if __name__ == "__main__":
    main()
