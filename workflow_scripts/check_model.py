"""Prove on this machine the properties that the stages need in a model, or refuse it: the workflow's first job.

It checks that all weights are used, that batches, caches and shared adapters give the results of single texts, that
turns can end, and that LoRA is where it should be; and it chooses how the judge computes. See `salmon/checking.py`.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from salmon import artifacts, checking, config, distributed, provenance, script
from salmon.errors import UserError


class Arguments(script.Arguments):
    """Prove the properties that stages need in a model, or refuse it. By hand, only --model and --output are needed."""

    output: Path = Field(description="folder for the report: report.json, report.md")
    model: config.Model = Field(description="section of the configuration")
    policy_prompt: config.PolicyPrompt = Field(
        config.PolicyPrompt(template="prompts/templates/policy.txt"), description="section of the configuration"
    )
    sampling: config.Sampling = Field(config.Sampling(), description="section of the configuration")
    judge: config.Judge = Field(
        config.Judge(template="prompts/templates/judge.txt", principles="prompts/principles/judge.json"),
        description="section of the configuration",
    )
    lora: config.Lora = Field(config.Lora(), description="section of the configuration")
    scoring: config.Scoring = Field(config.Scoring(), description="section of the configuration")
    tokenizer: config.Model | None = Field(
        None, description="model whose tokenizer reward models use; by default, that of model.base"
    )
    ppo: config.PpoTexts | None = Field(
        None, description="section of the configuration; its lengths and template are checked"
    )
    parts: script.JsonList[checking.Part] = Field(
        ["sampling", "judging", "training", "rl"], min_length=1, description="JSON list: the parts to check"
    )
    device: Literal["auto", "cpu"] = Field(
        "auto", description="hardware: auto: the GPU, if there is one; cpu: for a model that does not fit one GPU"
    )


def main(arguments: Arguments) -> None:
    """Check, and write the report."""
    device = distributed.init()
    if arguments.device == "cpu":
        device = torch.device("cpu")
    settings = checking.Settings(
        **{each.name: getattr(arguments, each.name) for each in dataclasses.fields(checking.Settings)}
    )
    report = checking.check_model(settings, arguments.parts, device)
    # A refusal gets another name, because the stages run if the report is there.
    refused = arguments.output.with_name(f"{arguments.output.name}.refused")
    artifacts.remove(refused)
    with artifacts.atomic(refused if report.refusals else arguments.output) as folder:
        folder.mkdir()
        artifacts.write_json(
            folder / "report.json", report.facts | {"refused": report.refusals} if report.refusals else report.facts
        )
        (folder / "report.md").write_text(report.markdown(arguments.model.base), encoding="utf-8")
        origin = provenance.check_model(arguments.parts, **vars(settings))
        artifacts.write_json(artifacts.manifest_path(folder), origin.manifest(origin.identify(), {}))
    if report.refusals:
        reasons = "; ".join(report.refusals.values())
        raise UserError(f"{arguments.model.base} is refused: {reasons}. The full report is in {refused}")
    distributed.leave()


if __name__ == "__main__":
    script.run(main, Arguments)
