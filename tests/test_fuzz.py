"""A script with any faulty input ends with an error sentence, or with the same output as for the correct input.

200 seeded mutations of the inputs of all scripts: files, models, data sets, manifests and command lines. None may
end in a traceback, another output with exit status 0 or a hang, or leave an artifact or a temporary file.
"""

import hashlib
import json
import os
import random
import re
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

from salmon.artifacts import manifest_path
from tests import mutations
from tests.border_world import BorderWorld, Job

CASES = int(os.environ.get("SALMON_FUZZ", "200"))
FIRST = int(os.environ.get("SALMON_FUZZ_FIRST", "0"))  # seed of the first one

# For each script: its inputs, and what may be wrong with them.
OPTIONS: dict[str, Any] = {"": mutations.OPTIONS}
MODEL: dict[str, Any] = {
    "model/config.json": mutations.MODEL_CONFIG,
    "model/generation_config.json": mutations.GENERATION_CONFIG,
    "model/model.safetensors": mutations.WEIGHTS,
    "model/tokenizer.json": mutations.TOKENIZER,
    "model/tokenizer_config.json": mutations.TOKENIZER_CONFIG,
}
ADAPTER: dict[str, Any] = {
    "adapter/adapter_config.json": mutations.ADAPTER_CONFIG,
    "adapter/adapter_model.safetensors": mutations.WEIGHTS,
}
REWARD_MODEL = {name.replace("adapter/", "reward_model/"): changes for name, changes in ADAPTER.items()}


def table(name: str) -> dict[str, Any]:
    return {f"{name}.parquet": mutations.TABLE, f"{name}.manifest.json": mutations.MANIFEST}


INPUTS: dict[str, dict[str, Any]] = {
    "check_model": OPTIONS | MODEL | {"policy.txt": mutations.TEXT},
    "clean_prompts": OPTIONS | {"own.jsonl": mutations.OWN},
    "clean_sft_data": OPTIONS | {"own.jsonl": mutations.LINES},
    "train_sft": OPTIONS | table("examples") | MODEL | {"policy.txt": mutations.TEXT},
    "clean_pmp_data": OPTIONS | {"shp.json": mutations.PAIRS, "hh.jsonl.gz": mutations.ZIPPED},
    "clean_rl_prompts": OPTIONS
    | {"own.jsonl": mutations.OWN, "sharegpt.jsonl": mutations.LINES, "openorca.parquet": mutations.ORCA}
    | {name: MODEL[name] for name in ("model/tokenizer.json", "model/tokenizer_config.json")},
    "sample_responses 0 0": OPTIONS | table("prompts") | MODEL | ADAPTER | {"policy.txt": mutations.TEXT},
    "sample in chats": {"model/chat_template.jinja": mutations.CHAT_TEMPLATE},
    "gather responses 0": OPTIONS | table("responses0/0") | table("responses0/1"),
    "judge_preferences 0": OPTIONS
    | table("response0")
    | table("response1")
    | {"judge.json": mutations.PRINCIPLES, "judge.txt": (*mutations.TEXT, mutations.empty)}
    | MODEL
    | ADAPTER,
    "judge in chats": {"model/chat_template.jinja": mutations.CHAT_TEMPLATE},
    "gather judgements": OPTIONS | table("judgements/0") | table("judgements/1"),
    "aggregate_preferences": OPTIONS
    | table("preferences")
    | table("response0")
    | table("response1")
    | {"judge.json": mutations.PRINCIPLES},
    "train_reward_model": OPTIONS
    | table("principle")
    | MODEL
    | REWARD_MODEL
    | {"reward.txt": (*mutations.TEXT, mutations.empty)},
    "train_policy": OPTIONS
    | table("rl")
    | MODEL
    | ADAPTER
    | REWARD_MODEL
    | {"rl.json": mutations.WEIGHTED, "reward.txt": (*mutations.TEXT, mutations.empty), "policy.txt": mutations.TEXT},
}
TARGETS = [(name, file) for name, files in INPUTS.items() for file in files]


def contents(output: Path) -> dict[str, str]:
    """Hashes of what an artifact holds, without times."""
    files = [output] if output.is_file() else sorted(file for file in output.rglob("*") if file.is_file())
    found = {}
    for file in files:
        text = file.read_bytes()
        if file.name == "metrics.jsonl":
            lines = [json.loads(line) for line in text.splitlines()]
            text = json.dumps([{k: v for k, v in line.items() if "seconds" not in k} for line in lines]).encode()
        if file.name == "adapter_config.json":  # PEFT carries over what nobody reads
            read = json.loads(text)
            text = json.dumps([read[key] for key in ("peft_type", "task_type", "r", "lora_alpha")]).encode()
        if file.name not in ("manifest.json", "report.md", "README.md") and "tfevents" not in file.name:
            found[str(file.relative_to(output.parent))] = hashlib.sha256(text).hexdigest()
    return found


def leftovers(folder: Path, job: Job) -> list[str]:
    """What a script that has failed should not have left."""
    output = folder / job.output
    found = [str(path) for path in (output, manifest_path(output)) if path.exists()]
    return found + [str(path) for path in folder.rglob(".*.tmp")]


def run_case(world: BorderWorld, number: int, folder: Path) -> tuple[str, str, str]:
    """Run a mutation; return its name, what went wrong (empty if nothing), and what was said."""
    rng = random.Random(number)
    name, file = TARGETS[number % len(TARGETS)]
    change = rng.choice(INPUTS[name][file])
    job = world.jobs[name]
    world.copy(folder, job)
    options = deepcopy(job.options)
    if file:
        change(folder / file, rng)
    else:
        change(options, rng)
    title = f"{number}: {name}, {file or 'options'}, {change.__name__}"
    status, said = world.run(job.script, options, folder)
    return title, judge(world, job, folder, Path(file).name if file else "", status, said), f"{status}\n{said}"


def judge(world: BorderWorld, job: Job, folder: Path, file: str, status: int, said: str) -> str:
    if "Traceback" in said:
        return "a traceback"
    if status == 0:
        same = contents(folder / job.output) == contents(world.folder / job.output)
        return "" if same else "another output"
    if status not in (1, 2):
        return f"status {status}"
    if left := leftovers(folder, job):
        return f"left {left}"
    messages = re.findall(r" ERROR (.+(?:\n  .+)*)|: error: (.+)", said)
    if not messages or len("".join(messages[-1]).split()) < 4:
        return "no sentence"
    return ""


def test_mutations(border_world: BorderWorld, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    bad = []
    for number in range(FIRST, FIRST + CASES):
        folder = tmp_path / str(number)
        title, wrong, said = run_case(border_world, number, folder)
        outcomes["same" if said.startswith("0") else "refused"] += 1
        if wrong:
            bad.append(f"{title}: {wrong}\n{said[-3000:]}")
        mutations.erase(folder)
    assert not bad, f"{len(bad)} of {CASES}\n\n" + "\n\n".join(bad)
    assert outcomes["refused"] > CASES / 2, outcomes
