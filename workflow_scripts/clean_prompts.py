"""Prompts of the synthetic preferences (SALMON step 1): the root messages of OASST1, or of the configured sources.

Writes the table `tables.PROMPTS`.
"""

from pathlib import Path

from pydantic import Field

from salmon import artifacts, prompts, provenance, script
from salmon.config import Prompts
from salmon.tables import PROMPTS


class Arguments(script.Arguments):
    """Write the prompts of the synthetic preferences."""

    output: Path = Field(description="prompts (parquet); their manifest is written next to them")
    prompts: Prompts = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read the sources and write the table."""
    table, counts = prompts.collect_prompts(arguments.prompts)
    origin = provenance.clean_prompts(arguments.prompts)
    manifest = origin.manifest(origin.identify(), counts)
    artifacts.write_table(table, arguments.output, PROMPTS, manifest)


if __name__ == "__main__":
    script.run(main, Arguments)
