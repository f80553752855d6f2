"""Draw the training of a reward model, or of the initial policy, and the results of `evaluate_reward_model`."""

from pathlib import Path

from pydantic import Field

from salmon import artifacts, border, figures, provenance, script


class Arguments(script.Arguments):
    """Draw a training with a loss, and the measurements of its model."""

    model: Path | None = Field(None, description="folder of the model, if it was trained here")
    measured: Path | None = Field(None, description="folder of evaluate_reward_model, if it was measured")
    title: str = Field(description="title of the page")
    output: Path = Field(description="folder to write: pictures, table.html, manifest.json")


def main(arguments: Arguments) -> None:
    """Read the metrics and the numbers, draw, write the folder."""
    part, counts = figures.Part(arguments.title, []), {"steps": 0}
    if arguments.measured:
        found = border.read_json(arguments.measured / "reward_model.json", "", figures.AGAIN)
        part += figures.reward_model(arguments.title, found)
    if arguments.model:
        metrics = border.read_json(arguments.model / "metrics.json", "", figures.AGAIN)
        part += figures.model_training(arguments.title, metrics)
        counts["steps"] = len(metrics["training"])
    origin = provenance.draw_reward_model(arguments.model, arguments.measured)
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        part.write(folder)
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts))


if __name__ == "__main__":
    script.run(main, Arguments)
