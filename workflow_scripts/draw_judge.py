"""Draw the results of `evaluate_judge`; without them, what the judgements alone show."""

from pathlib import Path

from pydantic import Field

from salmon import artifacts, border, checked, figures, provenance, script
from salmon import evaluation as measure
from salmon.config import Evaluation
from salmon.errors import UserError
from salmon.tables import JUDGEMENTS


class Arguments(script.Arguments):
    """Draw the measurements of the judge."""

    measured: Path | None = Field(None, description="folder of evaluate_judge")
    preferences: Path | None = Field(None, description="judgements (parquet), used without that folder")
    output: Path = Field(description="folder to write: pictures, table.html, manifest.json")
    evaluation: Evaluation = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read the numbers, draw, write the folder."""
    if arguments.measured:
        found = border.read_json(arguments.measured / "judge.json", "", figures.AGAIN)
    elif arguments.preferences:
        judgements = checked.read(arguments.preferences, JUDGEMENTS).collect()
        found = measure.judge(judgements, arguments.evaluation.seed)
    else:
        raise UserError("set either --measured or --preferences")
    origin = provenance.draw_judge(arguments.measured, arguments.preferences, evaluation=arguments.evaluation)
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        figures.judge(found).write(folder)
        counts = {"principles": len(found["principles"])}
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts))


if __name__ == "__main__":
    script.run(main, Arguments)
