"""Compare the policies of all runs and their initial policies: how they answer, and which principles they follow.

The table principles x runs says how often a run's answer scores higher under a principle than the answer of the initial
policy or of another run, and how often the judge, and a model behind an endpoint, prefers it in both orders.
"""

import logging
from pathlib import Path

from pydantic import BaseModel, Field

from salmon import artifacts, checked, evaluation, provenance, script
from salmon.config import Evaluation
from salmon.tables import ANSWERS, JUDGEMENTS, SCORES, VERDICTS

log = logging.getLogger("salmon.evaluate_policies")


class Policy(BaseModel):
    """A policy's answers, with their scores and judgements."""

    name: str = Field(description="name of the run, or of the initial policy")
    answers: Path = Field(description="the policy's answers (parquet)")
    scores: Path = Field(description="scores of these answers (parquet)")
    initial: str | None = Field(description="name of the policy that the run starts from; null for that policy itself")
    judgements: Path | None = Field(description="judgements of these answers against the initial policy's (parquet)")
    versus: dict[str, Path] = Field(
        {}, description="name of another run -> judgements of these answers against that run's (parquet)"
    )
    verdicts: Path | None = Field(None, description="verdicts of a model behind an endpoint (parquet), if any")


class Arguments(script.Arguments):
    """Compare policies."""

    policies: script.JsonList[Policy] = Field(
        min_length=1, description="JSON list of policies with their tables, initial ones first"
    )
    output: Path = Field(description="folder to write: policies.json, policies.md, manifest.json")
    evaluation: Evaluation = Field(description="section of the configuration")


def main(arguments: Arguments) -> None:
    """Read all tables, compare, write the folder."""
    policies = arguments.policies
    judged = {
        (policy.name, policy.initial): checked.read(policy.judgements, JUDGEMENTS).collect()
        for policy in policies
        if policy.initial and policy.judgements
    }
    versus = {
        (policy.name, other): checked.read(table, JUDGEMENTS).collect()
        for policy in policies
        for other, table in policy.versus.items()
    }
    for (name, other), table in (judged | versus).items():
        if table.is_empty():
            log.warning(
                "the judge has read no answers of %s and %s, so tables leave this comparison out: no pair fits; check "
                "judge.max_length",
                name,
                other,
            )
    found = evaluation.policies(
        {policy.name: checked.read(policy.answers, ANSWERS).collect() for policy in policies},
        {policy.name: checked.read(policy.scores, SCORES).collect() for policy in policies},
        judged,
        arguments.evaluation.seed,
        {
            (policy.name, policy.initial): checked.read(policy.verdicts, VERDICTS).collect()
            for policy in policies
            if policy.initial and policy.verdicts
        },
        versus,
    )
    for name, measured in found["behaviour"].items():
        log.info("%s: KL %.3f", name, measured["kl"]["value"])
    origin = provenance.evaluate_policies([policy.model_dump() for policy in policies], evaluation=arguments.evaluation)
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        artifacts.write_json(folder / "policies.json", found)
        (folder / "policies.md").write_text(evaluation.policies_markdown(found), encoding="utf-8")
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), {"policies": len(policies)}))


if __name__ == "__main__":
    script.run(main, Arguments)
