"""Draw the results of `evaluate_policies`: how policies answer, and principles x runs."""

from pathlib import Path

from pydantic import Field

from salmon import artifacts, border, figures, provenance, script


class Arguments(script.Arguments):
    """Draw the measurements of the policies."""

    evaluation: Path = Field(description="folder of evaluate_policies")
    output: Path = Field(description="folder to write: pictures, table.html, manifest.json")


def main(arguments: Arguments) -> None:
    """Read the numbers, draw, write the folder."""
    found = border.read_json(arguments.evaluation / "policies.json", "", figures.AGAIN)
    origin = provenance.draw_policies(arguments.evaluation)
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        figures.policies(found).write(folder)
        counts = {"policies": len(found["names"])}
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts))


if __name__ == "__main__":
    script.run(main, Arguments)
