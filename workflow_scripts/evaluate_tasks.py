"""Run benchmark tasks on a policy: lm-eval's, such as TruthfulQA, and our own, such as HHH.

Each finished task is kept: a killed job resumes with the next one.
"""

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import Field

from salmon import artifacts, models, provenance, script
from salmon.config import Evaluation, Model, TaskPrompt
from salmon.distributed import init
from salmon.tasks import Benchmarks
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder

log = logging.getLogger("salmon.evaluate_tasks")


class Arguments(script.Arguments):
    """Run benchmark tasks on a policy."""

    policy: Path | None = Field(None, description="folder of the policy; without it, the initial policy is measured")
    output: Path = Field(description="folder to write: tasks.json, manifest.json")
    model: Model = Field(description="section of the configuration: the initial policy")
    prompt: TaskPrompt = Field(description="the parts of the section policy_prompt that affect how tasks are asked")
    evaluation: Evaluation = Field(description="section of the configuration")
    batch_size: int = Field(16, ge=1, description="hardware: texts per forward pass")


def main(arguments: Arguments) -> None:
    """Run the tasks that are not finished yet, write the folder."""
    device, evaluation = init(), arguments.evaluation
    origin = provenance.evaluate_tasks(
        arguments.policy, model=arguments.model, prompt=arguments.prompt, evaluation=evaluation
    )
    identities = origin.identify()
    work = WorkFolder(arguments.output)
    if work.open(origin.fingerprint(identities)):
        return
    benchmarks: Benchmarks | None = None
    found: dict[str, Any] = {}
    for place, task in enumerate(evaluation.tasks):
        kept = work.path / f"task-{place}.json"
        if not kept.is_file():
            benchmarks = benchmarks or Benchmarks(
                models.load_policy(arguments.model, arguments.policy, device),
                load_tokenizer(arguments.model),
                prompt=arguments.prompt,
                evaluation=evaluation,
                batch_size=arguments.batch_size,
            )
            artifacts.write_json(kept, benchmarks.measure(task))
        measured = json.loads(kept.read_text(encoding="utf-8"))
        for name, metrics in measured.items():
            log.info("%s: %s", name, {metric: one["value"] for metric, one in metrics.items()})
        found |= measured
    counts = {"tasks": len(found)}
    with work.finish(origin.manifest(identities, counts)) as folder:
        folder.mkdir()
        artifacts.write_json(folder / "tasks.json", found)


if __name__ == "__main__":
    script.run(main, Arguments)
