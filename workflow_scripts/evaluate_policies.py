"""Compare the policies of all runs with their initial policies: how they answer, and which principles they serve.

The table principles x runs: how often a run's answer has the higher score under a principle, and how often the judge
prefers it in both orders.
"""

import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from salmon import artifacts, checked, evaluation, provenance, script
from salmon.config import Evaluation
from salmon.tables import ANSWERS, JUDGEMENTS, SCORES

log = logging.getLogger("salmon.evaluate_policies")


class Run(BaseModel):
    """A run's answers, and what they are compared with."""

    name: str = Field(description="of the run")
    answers: Path = Field(description="of its policy (parquet)")
    scores: Path = Field(description="of these answers (parquet)")
    judgements: Path = Field(description="of these answers against those of the initial policy (parquet)")
    initial_answers: Path = Field(description="of its initial policy (parquet)")
    initial_scores: Path = Field(description="of these answers (parquet)")


class Arguments(script.Arguments):
    """Compare policies."""

    runs: script.JsonList[Run] = Field(min_length=1, description="JSON list of runs with their tables")
    output: Path = Field(description="folder to write: policies.json, policies.md, manifest.json")
    evaluation: Evaluation = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read all tables, compare, write the folder."""
    seed = arguments.evaluation.seed
    found: dict[str, dict[str, Any]] = {}
    for run in arguments.runs:
        answers, initial = (checked.read(path, ANSWERS).collect() for path in (run.answers, run.initial_answers))
        scores, before = (checked.read(path, SCORES).collect() for path in (run.scores, run.initial_scores))
        judged = checked.read(run.judgements, JUDGEMENTS).collect()
        found[run.name] = {
            "behaviour": evaluation.behaviour(answers, seed),
            "initial_behaviour": evaluation.behaviour(initial, seed),
            "scores": evaluation.score_wins(scores, before, seed),
            "judge": evaluation.judge_wins(judged, seed),
        }
        log.info("%s: KL %.3f", run.name, found[run.name]["behaviour"]["kl"]["value"])
    origin = provenance.evaluate_policies([run.model_dump() for run in arguments.runs], evaluation=arguments.evaluation)
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        artifacts.write_json(folder / "policies.json", found)
        (folder / "policies.md").write_text(evaluation.policies_markdown(found), encoding="utf-8")
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), {"runs": len(found)}))


if __name__ == "__main__":
    script.run(main, Arguments)
