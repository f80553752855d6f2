"""Prove on this machine what the stages rely on in a model, or refuse it in a sentence: the first job of the workflow.

Weights all used; batches, caches and shared adapters as single texts; ends of turns reachable; room for the longest
text; LoRA where it should be; the way in which the judge computes its prompts. See `salmon/checking.py`.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from salmon import artifacts, checking, config, distributed, identity, models, script
from salmon.errors import UserError
from salmon.tokenizers import load_tokenizer


class Arguments(script.Arguments):
    """Prove what the stages rely on in a model, or refuse it. By hand, only --model and --output are needed."""

    output: Path = Field(description="folder of the report: report.json, report.md")
    model: config.Model = Field(description="section of the configuration, like the next eight")
    policy_prompt: config.PolicyPrompt = config.PolicyPrompt(template="prompts/templates/policy.txt")
    sampling: config.Sampling = config.Sampling()
    judge: config.Judge = config.Judge(
        template="prompts/templates/judge.txt", principles="prompts/principles/judge.json"
    )
    lora: config.Lora = config.Lora()
    pmp: config.RewardTraining = config.RewardTraining(
        template="prompts/templates/reward_model_pmp.txt",
        learning_rate=5e-5,
        max_length=1024,
        query_length=256,
        response_length=640,
    )
    reward_model: config.RewardModel = config.RewardModel(
        template="prompts/templates/reward_model.txt",
        learning_rate=3e-5,
        max_length=1280,
        query_length=128,
        response_length=768,
    )
    ppo: config.Ppo = config.Ppo(
        template="prompts/templates/reward_model_rl.txt", principles="prompts/principles/rl.json"
    )
    scoring: config.Scoring = config.Scoring()
    device: Literal["auto", "cpu"] = Field(
        "auto", description="hardware: the GPU, if there is one; or the CPU, for a model that does not fit one GPU"
    )


def main(arguments: Arguments) -> None:
    """Check, and write the report."""
    device = distributed.init()
    if arguments.device == "cpu":
        device = torch.device("cpu")
    names = checking.Settings.__dataclass_fields__
    settings = checking.Settings(**{name: getattr(arguments, name) for name in names})
    report = checking.check_model(settings, load_tokenizer(arguments.model), device)
    reports = {arguments.model.base: report}
    if arguments.judge.model is not None:
        judge = checking.Report()
        judging = checking.Settings(**{**vars(settings), "model": arguments.judge.model})
        tokenizer = load_tokenizer(judging.model)
        judge.check(
            "judging",
            lambda: checking.judge(judging, tokenizer, models.load_initial_policy(judging.model, device), device),
        )
        reports[f"{judging.model.base}, the judge"] = judge
    if refusals := [sentence for each in reports.values() for sentence in each.refusals.values()]:
        raise UserError("the model is refused: " + "; ".join(refusals))
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        artifacts.write_json(folder / "report.json", {name: each.facts for name, each in reports.items()})
        pages = [each.markdown(name) for name, each in reports.items()]
        (folder / "report.md").write_text("\n".join(pages), encoding="utf-8")
        settings_json = {name: getattr(arguments, name) for name in names}
        manifest = artifacts.manifest(settings_json, identity.identify(arguments.model), {})
        artifacts.write_json(artifacts.manifest_path(folder), manifest)
    distributed.leave()


if __name__ == "__main__":
    script.run(main, Arguments)
