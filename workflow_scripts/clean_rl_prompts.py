"""Prompts of the RL stage (SALMON step 3): public questions of many kinds, cleaned, distinct, of 2 to 256 tokens.

Writes the table `tables.RL_PROMPTS`.
"""

from pathlib import Path

from pydantic import Field

from salmon import artifacts, prompts, provenance, script
from salmon.config import Model, RlPrompts
from salmon.tables import RL_PROMPTS
from salmon.tokenizers import load_tokenizer


class Arguments(script.Arguments):
    """Write the prompts of the RL stage. Of the model, only the tokenizer is used."""

    output: Path = Field(description="RL prompts (parquet); their manifest is written next to them")
    rl_prompts: RlPrompts = Field(description="section of the configuration")
    model: Model = Field(description="section of the configuration; only its tokenizer is loaded")


def main(arguments: Arguments) -> None:
    """Read the sources and write the table."""
    settings, model = arguments.rl_prompts, arguments.model
    tokenizer = load_tokenizer(model)
    table, counts = prompts.collect_rl_prompts(settings, tokenizer)
    origin = provenance.clean_rl_prompts(settings, model)
    manifest = origin.manifest(origin.identify(), counts)
    artifacts.write_table(table, arguments.output, RL_PROMPTS, manifest)


if __name__ == "__main__":
    script.run(main, Arguments)
