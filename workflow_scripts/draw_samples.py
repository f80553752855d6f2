"""Show answers of all policies side by side, to prompts whose texts may be shown."""

from pathlib import Path

import polars as pl
from pydantic import BaseModel, Field

from salmon import artifacts, checked, figures, provenance, script
from salmon.tables import ANSWERS
from salmon.text import join_instruction

NUMBER = 20  # prompts shown


class Policy(BaseModel):
    """A policy's answers."""

    name: str = Field(description="name of its run")
    answers: Path = Field(description="its answers (parquet)")


class Arguments(script.Arguments):
    """Show answers of all policies side by side."""

    policies: script.JsonList[Policy] = Field(min_length=1, description="JSON list of policies with their answers")
    sources: script.JsonList[str] = Field(min_length=1, description="sources of the prompts that may be shown")
    output: Path = Field(description="folder to write: table.html, manifest.json")


def main(arguments: Arguments) -> None:
    """Read the answers, choose prompts, write the folder."""
    columns = ("prompt_id", "source", "instruction", "input", "response")
    tables = {
        policy.name: checked.read(policy.answers, ANSWERS, columns)
        .filter(pl.col("source").is_in(arguments.sources))
        .sort("prompt_id")
        .head(NUMBER)
        .collect()
        for policy in arguments.policies
    }
    asked = pl.concat(tables.values()).unique("prompt_id").sort("prompt_id").head(NUMBER)
    answers = {}
    for name, table in tables.items():  # a policy with another template may have left out some
        known = dict(table.select("prompt_id", "response").iter_rows())
        answers[name] = [known.get(prompt, "") for prompt in asked["prompt_id"]]
    prompts = [join_instruction(*row) for row in asked.select("instruction", "input").iter_rows()]
    origin = provenance.draw_samples([one.model_dump() for one in arguments.policies], arguments.sources)
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        figures.samples(prompts, answers).write(folder)
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), {"prompts": len(prompts)}))


if __name__ == "__main__":
    script.run(main, Arguments)
