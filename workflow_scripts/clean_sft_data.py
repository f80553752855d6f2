"""Training data of the initial policy: instructions with answers from the configured sources.

Writes the table `tables.SFT_EXAMPLES`.
"""

from pathlib import Path

from pydantic import Field

from salmon import artifacts, prompts, provenance, script
from salmon.config import SftData
from salmon.tables import SFT_EXAMPLES


class Arguments(script.Arguments):
    """Write the training data of the initial policy."""

    output: Path = Field(description="examples (parquet); their manifest is written next to them")
    sft_data: SftData = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read the sources and write the table."""
    table, counts = prompts.collect_examples(arguments.sft_data)
    origin = provenance.clean_sft_data(arguments.sft_data)
    manifest = origin.manifest(origin.identify(), counts)
    artifacts.write_table(table, arguments.output, SFT_EXAMPLES, manifest)


if __name__ == "__main__":
    script.run(main, Arguments)
