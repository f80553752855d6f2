"""Measure the CPU time of a dry run with many shards, by origin: `python benchmarks/dry_run.py`."""

import argparse
import os
import pstats
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def line(shards: int, profile: str | None) -> list[str]:
    """Arguments of Snakemake."""
    where = [
        "--snakefile",
        str(ROOT / "Snakefile"),
        *(["--profile", str(ROOT / "profiles" / profile)] if profile else []),
    ]
    return [*where, "-n", "--config", f"sampling={{shards: {shards}}}", f"judge={{shards: {shards}}}"]


def seconds(command: list[str], folder: str) -> float:
    """CPU time of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def owner(file: str) -> str:
    """The origin of a function, from its file."""
    if (
        file.startswith(str(ROOT / "rules"))
        or file.startswith(str(ROOT / "workflow_scripts"))
        or file == str(ROOT / "Snakefile")
    ):
        return "this workflow's own functions"
    return "Snakemake and its plugins" if f"{os.sep}snakemake" in file else "libraries and Python itself"


def main() -> None:
    """Print the CPU time, and the shares according to cProfile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1000, help="shards of sampling (twice) and of judging")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for profile in (None, "slurm"):
            words = line(arguments.shards, profile)
            took = seconds([sys.executable, "-m", "snakemake", *words], folder)
            print(f"{3 * arguments.shards} jobs, profile {profile or 'none'}: {took:.1f} s of CPU")
        file = f"{folder}/profile"
        seconds([sys.executable, "-m", "cProfile", "-o", file, "-m", "snakemake", *words], folder)
        shares: Counter[str] = Counter()
        functions = pstats.Stats(file).stats  # type: ignore[attr-defined]
        for (source, _, _), (_, _, own, _, _) in functions.items():
            shares[owner(source)] += own
        whole, rules = sum(shares.values()), functions[(str(ROOT / "Snakefile"), 1, "<module>")][3]
    for name, share in shares.most_common():
        print(f"  {share / whole:6.1%} {name}")
    print(f"  {rules / whole:6.1%} for reading Snakefile, rules and configuration, imports included")


if __name__ == "__main__":
    main()
