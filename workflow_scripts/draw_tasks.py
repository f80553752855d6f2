"""Draw the results of `evaluate_tasks` for all policies."""

from pathlib import Path

from pydantic import BaseModel, Field

from salmon import artifacts, border, figures, provenance, script


class Policy(BaseModel):
    """A measured policy."""

    name: str = Field(description="name of its run, or of the initial policy")
    measured: Path = Field(description="folder of evaluate_tasks")


class Arguments(script.Arguments):
    """Draw the benchmarks of all policies."""

    policies: script.JsonList[Policy] = Field(min_length=1, description="JSON list of policies with their measurements")
    output: Path = Field(description="folder to write: tasks.svg, table.html, manifest.json")


def main(arguments: Arguments) -> None:
    """Read the numbers, draw, write the folder."""
    policies = arguments.policies
    found = {one.name: border.read_json(one.measured / "tasks.json", "", figures.AGAIN) for one in policies}
    origin = provenance.draw_tasks([one.model_dump() for one in policies])
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        figures.tasks(found).write(folder)
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), {"policies": len(found)}))


if __name__ == "__main__":
    script.run(main, Arguments)
