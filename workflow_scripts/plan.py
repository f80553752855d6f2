"""Say what the runs will cost: `snakemake --profile … plan`.

Rows, tokens, passes, GPU hours, memory of a GPU and disk of each stage. See `salmon/workload.py` for what is counted,
`salmon/cost.py` for what it takes, and docs/cost.md.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from salmon import configuration, price, script, shipped
from salmon.errors import UserError
from salmon.plan import Plan


class Arguments(script.Arguments):
    """Say what the runs will cost. By hand, from the folder that paths start from."""

    configfile: script.JsonList[Path] = Field([], description="JSON list: files that are read over config.yaml")
    configuration: dict[str, Any] | None = Field(
        None, description="the whole configuration, as Snakemake holds it; without it, config.yaml and configfile"
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
        raise UserError("nothing that the targets need takes a GPU: name others, targets: [policies]")
    sys.stdout.write("".join(f"{line}\n" for line in price.report(found, plan.runs["default"].plan)))


if __name__ == "__main__":
    script.run(main, Arguments)
