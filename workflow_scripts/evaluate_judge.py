"""Measure the judge by its judgements: agreement of both orders, position bias, margins, how principles correlate."""

import logging
from pathlib import Path

from pydantic import Field

from salmon import artifacts, checked, evaluation, provenance, script
from salmon.config import Evaluation
from salmon.tables import JUDGEMENTS

log = logging.getLogger("salmon.evaluate_judge")


class Arguments(script.Arguments):
    """Measure the judge by its judgements."""

    preferences: Path = Field(description="judgements (parquet)")
    output: Path = Field(description="folder to write: judge.json, manifest.json")
    evaluation: Evaluation = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read the judgements, measure, write the folder."""
    judgements = checked.read(arguments.preferences, JUDGEMENTS).collect()
    found = evaluation.judge(judgements, arguments.evaluation.seed)
    for name, measured in found["principles"].items():
        log.info("%s: orders agree %.3f, bias %.3f", name, measured["agree"]["value"], measured["bias"]["value"])
    origin = provenance.evaluate_judge(arguments.preferences, evaluation=arguments.evaluation)
    counts = {"judgements": len(judgements), "pairs": judgements["prompt_id"].n_unique()}
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        artifacts.write_json(folder / "judge.json", found)
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts))


if __name__ == "__main__":
    script.run(main, Arguments)
