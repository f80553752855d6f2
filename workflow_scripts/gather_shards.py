"""Gather the shards of a table of responses or judgements into one table.

The rows are sorted by `prompt_id`, which is a hash, and keep their order within a prompt. Therefore the number of
shards does not affect the result.
"""

from pathlib import Path

from pydantic import Field

from salmon import artifacts, script, shards


class Arguments(script.Arguments):
    """Gather the shards of a table of responses or judgements into one table."""

    shards: script.JsonList[Path] = Field(min_length=1, description="JSON list: the shards (parquet), in any order")
    output: Path = Field(description="the whole table (parquet); its manifest is written next to it")


def main(arguments: Arguments) -> None:
    """Check the shards, write the table and its manifest."""
    with artifacts.scratch(arguments.output) as folder:
        table, manifest = shards.gather_shards(arguments.shards, folder / "sorted")
        artifacts.write_table(table, arguments.output, manifest=manifest)


if __name__ == "__main__":
    script.run(main, Arguments)
