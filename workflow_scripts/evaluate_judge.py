"""Measure the judge by its judgements: agreement of both orders, position bias, margins, correlation of principles.

If it has judged pairs that people compared, also its agreement with people.
"""

import logging
from pathlib import Path

from pydantic import Field

from salmon import artifacts, checked, evaluation, provenance, script
from salmon.config import Evaluation
from salmon.errors import UserError
from salmon.tables import JUDGEMENTS, RESPONSES

log = logging.getLogger("salmon.evaluate_judge")


class Arguments(script.Arguments):
    """Measure the judge by its judgements."""

    preferences: Path = Field(description="judgements (parquet)")
    judged: Path | None = Field(None, description="judgements of pairs whose output 1 people prefer (parquet), if any")
    labelled: Path | None = Field(None, description="these outputs, as responses (parquet)")
    output: Path = Field(description="folder to write: judge.json, manifest.json")
    evaluation: Evaluation = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read the judgements, measure, write the folder."""
    judgements = checked.read(arguments.preferences, JUDGEMENTS).collect()
    if judgements.is_empty():
        raise UserError(
            f"{arguments.preferences} has no judgements to measure: no pair was long enough or fitted the judge; check "
            "judge.min_characters and judge.max_length"
        )
    found = evaluation.judge(judgements, arguments.evaluation.seed)
    for name, measured in found["principles"].items():
        log.info("%s: orders agree %.3f, bias %.3f", name, measured["agree"]["value"], measured["bias"]["value"])
    counts = {"judgements": len(judgements), "pairs": judgements["prompt_id"].n_unique()}
    if (arguments.judged is None) != (arguments.labelled is None):
        raise UserError("set both --judged and --labelled (judgements, and the outputs that people prefer), or neither")
    if arguments.judged and arguments.labelled:
        judged = checked.read(arguments.judged, JUDGEMENTS).collect()
        sources = checked.read(arguments.labelled, RESPONSES, ("prompt_id", "source", "instruction")).collect()
        read = sources.join(judged, on="prompt_id", how="semi")
        if unread := sorted({*sources["source"]} - {*read["source"]}):
            raise UserError(
                f"the judge has read no pair of {', '.join(unread)} (evaluation.judge_pairs): none fits; check "
                "judge.max_length"
            )
        about = {name: source.principles for name, source in arguments.evaluation.judge_pairs.items()}
        found["labelled"] = evaluation.labelled(judged, sources, about, arguments.evaluation.seed)
        counts |= {"labelled_pairs": len(sources), "labelled_pairs_judged": judged["prompt_id"].n_unique()}
    origin = provenance.evaluate_judge(
        arguments.preferences, arguments.judged, arguments.labelled, evaluation=arguments.evaluation
    )
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        artifacts.write_json(folder / "judge.json", found)
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts))


if __name__ == "__main__":
    script.run(main, Arguments)
