"""Prompts of the synthetic preferences (SALMON step 1): the root messages of OASST1, or of the sources set.

Writes one row a prompt: prompt_id, source, instruction, input.
"""

from pathlib import Path

from salmon import artifacts, prompts, script, sources
from salmon.config import Prompts


class Arguments(script.Arguments):
    """Options of the command line."""

    output: Path
    prompts: Prompts


def main(arguments: Arguments) -> None:
    """Read the sources and write the table."""
    table, counts = prompts.read_prompts(arguments.prompts)
    artifacts.write_table(table, arguments.output)
    manifest = artifacts.manifest(
        {"prompts": arguments.prompts}, sources.describe_sources(arguments.prompts.sources), counts
    )
    artifacts.write_json(artifacts.manifest_path(arguments.output), manifest)


if __name__ == "__main__":
    script.run(main, Arguments)
