"""Prompts of the synthetic preferences (SALMON step 1): the root messages of OASST1, or of the sources set.

Writes the table `tables.PROMPTS`.
"""

from pathlib import Path

from pydantic import Field

from salmon import artifacts, prompts, provenance, script
from salmon.config import Prompts
from salmon.tables import PROMPTS


class Arguments(script.Arguments):
    """Options of the command line."""

    output: Path = Field(description="prompts (parquet); the manifest is written beside them")
    prompts: Prompts = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read the sources and write the table."""
    table, counts = prompts.collect_prompts(arguments.prompts)
    origin = provenance.clean_prompts(arguments.prompts)
    manifest = origin.manifest(origin.identify(), counts)
    artifacts.write_table(table, arguments.output, PROMPTS, manifest)


if __name__ == "__main__":
    script.run(main, Arguments)
