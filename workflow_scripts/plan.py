"""Estimate the cost of the runs: `snakemake --profile … plan`.

It shows rows, tokens, passes, GPU hours, memory of a GPU and disk of each stage. See `salmon/workload.py` for the
counts, `salmon/cost.py` for time and memory, and docs/cost.md.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from salmon import configuration, price, script, shipped
from salmon.errors import UserError
from salmon.plan import Plan


class Arguments(script.Arguments):
    """Estimate the cost of the runs. By hand, start it in the folder to which paths refer."""

    configfile: script.JsonList[Path] = Field([], description="JSON list: files that override config.yaml")
    configuration: dict[str, Any] | None = Field(
        None, description="the complete configuration, from Snakemake; without it, config.yaml and configfile"
    )
    resources: dict[str, dict[str, Any]] = Field(
        {}, description="JSON: rule -> its resources, such as nodes, ranks, tokens_per_pass; without it, one GPU"
    )


def main(arguments: Arguments) -> None:
    """Count, and print the tables."""
    raw = arguments.configuration
    if raw is None:
        raw = configuration.read([shipped.CHECKOUT / "config.yaml", *arguments.configfile])
    plan = Plan(configuration.load(raw, Path.cwd()))
    found = [*price.stages(plan, arguments.resources)]
    if not found:
        raise UserError("no stage of the targets needs a GPU: set other targets, such as targets: [policies]")
    sys.stdout.write("".join(f"{line}\n" for line in price.report(found, plan.runs["default"].plan)))


if __name__ == "__main__":
    script.run(main, Arguments)
