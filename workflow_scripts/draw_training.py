"""Draw PPO's curves of all runs together."""

import json
from pathlib import Path

from pydantic import BaseModel, Field

from salmon import artifacts, border, figures, provenance, script


class Run(BaseModel):
    """A run with a trained policy."""

    name: str = Field(description="name of the run")
    policy: Path = Field(description="its folder")


class Arguments(script.Arguments):
    """Draw PPO's curves of all runs together."""

    runs: script.JsonList[Run] = Field(min_length=1, description="JSON list of runs with their policies")
    output: Path = Field(description="folder to write: training.svg, table.html, manifest.json")


def main(arguments: Arguments) -> None:
    """Read the metrics, draw, write the folder."""
    found = {}
    for run in arguments.runs:
        file = run.policy / "metrics.jsonl"
        lines = border.read_text(file, "", figures.AGAIN).splitlines()
        with border.reading(file, figures.AGAIN):
            found[run.name] = [json.loads(line) for line in lines]
    origin = provenance.draw_training([run.model_dump() for run in arguments.runs])
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        figures.training(found).write(folder)
        counts = {"runs": len(found), "steps": sum(map(len, found.values()))}
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts))


if __name__ == "__main__":
    script.run(main, Arguments)
