"""Small inputs for all scripts, made by the scripts themselves from a few rows and a tiny model; command lines."""

import gzip
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from peft import TaskType

from salmon import adapters, models
from salmon.artifacts import manifest_path
from salmon.config import Lora, Model
from tests import forks, zoo
from tests.running import SCRIPTS
from tests.synthetic import openorca, sharegpt, shp

MODEL = {"base": "model", "adapter": "adapter", "quantization": "none", "dtype": "float32"}
BARE = MODEL | {"adapter": None}
POLICY_PROMPT = {"template": "policy.txt", "stop": ["\n### User\n"]}
LORA = {"r": 2, "alpha": 4.0}
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NAMES = ("Clear", "Kind")
# For many short runs, beside another test process.
ALONE = {"POLARS_MAX_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
CPU_SECONDS = 60  # for one run, which takes a few: more is a hang
LENGTHS = {"max_length": 160, "query_length": 30, "response_length": 40}


def source(format_name: str, path: str) -> dict[str, Any]:
    return {"format": format_name, "path": path}


@dataclass(frozen=True)
class Job:
    """A script, its options, and the path of its artifact."""

    script: str
    options: dict[str, Any]
    output: str


def scored(template: str) -> dict[str, Any]:
    return {"template": template, "learning_rate": 1e-3, "batch_size": 4, "eval_examples": 2, **LENGTHS}


def jobs() -> dict[str, Job]:
    """Runs of all scripts by name, in the order in which they can be made."""
    found: dict[str, Job] = {}

    def add(name: str, script: str, output: str, **options: Any) -> None:
        found[name] = Job(script, {"output": output, **options}, output)

    sources = {"own": source("prompts", "own.jsonl")}
    add("check_model", "check_model", "check", model=BARE, policy_prompt=POLICY_PROMPT, lora=LORA, parts=["sampling"])
    add("dequantize_base", "dequantize_base", "engine_base", model=BARE | {"quantization": "nf4"})
    add("clean_prompts", "clean_prompts", "prompts.parquet", prompts={"sources": sources})
    examples = {"own": source("instructions", "own.jsonl")}
    add("clean_sft_data", "clean_sft_data", "examples.parquet", sft_data={"sources": examples})
    sft = {"learning_rate": 1e-3, "batch_size": 4, "eval_examples": 2, "max_length": 80}
    add(
        "train_sft",
        "train_sft",
        "sft",
        **{"examples": "examples.parquet", "model": BARE, "lora": LORA, "policy_prompt": POLICY_PROMPT, "sft": sft},
        gradient_checkpointing=False,
    )
    pairs = {"shp": source("shp", "shp.json"), "hh": source("hh_rlhf", "hh.jsonl.gz")}
    add("clean_pmp_data", "clean_pmp_data", "pmp.parquet", pmp_data={"sources": pairs, "min_score_ratio": 1.5})
    more = {
        "chats": source("sharegpt", "sharegpt.jsonl"),
        "orca": source("openorca", "openorca.parquet"),
        "own": source("prompts", "own.jsonl"),
    }
    add(
        "clean_rl_prompts", "clean_rl_prompts", "rl.parquet", rl_prompts={"sources": more, "max_tokens": 60}, model=BARE
    )
    chat = {"template": "chat", "stop": []}
    sampling = {"max_length": 110, "shards": 2, "temperature": 1.0}
    for index in (0, 1):
        for shard in (0, 1):
            add(
                f"sample_responses {index} {shard}",
                "sample_responses",
                f"responses{index}/{shard}.parquet",
                **{"prompts": "prompts.parquet", "index": index, "shard": shard, "model": MODEL},
                **{"sampling": sampling, "policy_prompt": POLICY_PROMPT},
            )
        shards = [f"responses{index}/{shard}.parquet" for shard in (0, 1)]
        if index == 0:
            add(
                "sample in chats",
                "sample_responses",
                "chats.parquet",
                **{"prompts": "prompts.parquet", "index": 0},
                **{"shard": 0, "model": BARE, "sampling": sampling, "policy_prompt": chat},
            )
        add(f"gather responses {index}", "gather_shards", f"response{index}.parquet", shards=shards)
    responses = {"response0": "response0.parquet", "response1": "response1.parquet"}
    judge = {"template": "judge.txt", "principles": "judge.json", "max_length": 400, "min_characters": 1, "shards": 2}
    for shard in (0, 1):
        add(
            f"judge_preferences {shard}",
            "judge_preferences",
            f"judgements/{shard}.parquet",
            **{**responses, "principles": "judge.json", "shard": shard, "model": MODEL, "judge": judge},
        )
    add(
        "judge in chats",
        "judge_preferences",
        "chat_judgements.parquet",
        **{**responses, "principles": "judge.json", "shard": 0, "model": BARE},
        judge=judge | {"format": "chat"},
    )
    shards = [f"judgements/{shard}.parquet" for shard in (0, 1)]
    add("gather judgements", "gather_shards", "preferences.parquet", shards=shards)
    add(
        "aggregate_preferences",
        "aggregate_preferences",
        "principle.parquet",
        **{"preferences": "preferences.parquet", **responses, "principles": "judge.json"},
        aggregation={"dimensions": list(NAMES), "passes": 12},
    )
    add(
        "train_reward_model",
        "train_reward_model",
        "trained",
        **{"records": "principle.parquet", "init": "reward_model", "model": BARE, "lora": LORA},
        **{"reward_model": scored("reward.txt"), "gradient_checkpointing": False},
    )
    ppo = {"template": "reward.txt", "principles": "rl.json", "principles_per_rollout": 1, "epochs": 1}
    ppo |= {"rollout_batch_size": 8, "minibatch_size": 8, "inner_epochs": 1, "max_steps": 1, "query_length": 60}
    ppo |= {"warmup_steps": 0}
    ppo |= {"response_length": 8, "reward_max_length": 160, "reward_query_length": 30, "reward_response_length": 40}
    add(
        "train_policy",
        "train_policy",
        "policy",
        **{"prompts": "rl.parquet", "reward_model": "reward_model", "model": MODEL, "lora": LORA},
        **{"policy_prompt": POLICY_PROMPT, "ppo": ppo, "gradient_checkpointing": False},
    )
    return found


class BorderWorld:
    """A folder with all inputs, and the artifacts that the scripts make from them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, jobs()

    def build(self) -> None:
        """Make them all, in an empty folder."""
        make_files(self.folder)
        for name, job in self.jobs.items():
            status, said = self.run(job.script, job.options, self.folder)
            assert status == 0, (name, said)

    def run(self, script: str, options: dict[str, Any], folder: Path) -> tuple[int, str]:
        """Run a script in a folder: its exit status (negative: the signal that has ended it), and what it said."""
        line = [sys.executable, SCRIPTS / f"{script}.py", *forks.options(options)]
        done = forks.run(line, folder, os.environ | ALONE, {"CPU": CPU_SECONDS})
        return done.returncode, done.stdout + done.stderr

    def copy(self, folder: Path, job: Job) -> None:
        """The world without what the job makes; files are shared, so a test replaces what it changes."""
        shutil.copytree(self.folder, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
        remove(folder / job.output)


def remove(output: Path) -> None:
    """Delete an artifact and its manifest."""
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)
        manifest_path(output).unlink(missing_ok=True)


def make_files(folder: Path) -> None:
    """What users and the hub provide."""
    zoo.build("llama", folder / "model", num_hidden_layers=2, hidden_size=64, intermediate_size=64)
    generation = json.loads((folder / "model" / "generation_config.json").read_text())
    write_json(folder / "model" / "generation_config.json", generation | {"eos_token_id": [2, *range(3, 30)]})
    (folder / "model" / "chat_template.jinja").write_text(CHAT)
    (folder / "policy.txt").write_text("Ein Gespräch – kurz.\n### User\n", encoding="utf-8")
    (folder / "reward.txt").write_text("Größe: {Output}\n{Input}\n{Dimensions}\nThe quality is\n", encoding="utf-8")
    (folder / "judge.txt").write_text(
        "„{UserInstruction}“\n(a) {OutputA}\n(b) {OutputB}\n{Dimension}: {Definition}\nOutput (", encoding="utf-8"
    )
    write_json(
        folder / "judge.json",
        [{"dimension": n, "definition": f"Ja – {n}.", "negative_definition": f"Nein – {n}."} for n in NAMES],
    )
    write_json(folder / "rl.json", [{"dimension": n, "definition": f"Ja – {n}.", "weight": 2} for n in NAMES])
    rows = [
        {"instruction": f"Wie groß ist {word}, in words?", "input": "", "output": f"So groß wie {word}."}
        for word in WORDS
    ]
    write_lines(folder / "own.jsonl", rows)
    write_lines(folder / "sharegpt.jsonl", sharegpt()[:20])
    write_json(folder / "shp.json", shp()[:20])
    pl.DataFrame(openorca()[:20]).write_parquet(folder / "openorca.parquet")
    turns = [
        {
            "chosen": f"\n\nHuman: What is {w}?\n\nAssistant: Größe {w}.",
            "rejected": f"\n\nHuman: What is {w}?\n\nAssistant: no",
        }
        for w in WORDS
    ]
    with gzip.open(folder / "hh.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in turns)
    torch.manual_seed(3)
    lora = Lora.model_validate(LORA)
    here = Model.model_validate(BARE | {"base": str(folder / "model")})
    policy = adapters.add_lora(models.load_base(here, "cpu"), lora, TaskType.CAUSAL_LM)
    for model, name in ((models.new_reward_model(here, lora, "cpu", 3), "reward_model"), (policy, "adapter")):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0, 0.1)
        model.save_pretrained(str(folder / name))


WORDS = ("rain", "snow", "hail", "wind", "fog", "sun", "a cloud", "ice", "frost", "heat", "a storm", "thunder")
WORDS += ("a tide", "spring", "autumn", "a comet", "a river", "sand", "a stone", "grass", "a bee", "salt")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
