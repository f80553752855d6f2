"""Draw what `evaluate_judge` found."""

from pathlib import Path

from pydantic import Field

from salmon import artifacts, border, figures, provenance, script


class Arguments(script.Arguments):
    """Draw what is known of the judge."""

    evaluation: Path = Field(description="folder of evaluate_judge")
    output: Path = Field(description="folder to write: pictures, table.html, manifest.json")


def main(arguments: Arguments) -> None:
    """Read the numbers, draw, write the folder."""
    found = border.read_json(arguments.evaluation / "judge.json", "", figures.AGAIN)
    origin = provenance.draw_judge(arguments.evaluation)
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        figures.judge(found).write(folder)
        counts = {"principles": len(found["principles"])}
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts))


if __name__ == "__main__":
    script.run(main, Arguments)
