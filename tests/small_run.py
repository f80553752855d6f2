"""A small run of the whole DAG, from real public data to a policy, which several tests use.

The data are samples of the real data sets in their upstream schemas (`tests/data`), and made-up rows for those that no
licence lets us ship (`tests/synthetic.py`). The model is the demo's.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from tests import forks, synthetic

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
MINE = ("Tell me about iron.", "Why do whales sing?", "List three things about the moon.")
"""The user's own prompts, which the report may show."""


def snakemake(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forks.snakemake(["--profile", "profiles/demo", "--nolock", *arguments])


def configuration(folder: Path) -> dict[str, Any]:
    """The demo's configuration with the real samples as its sources, and everything small."""
    (folder / "shp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in synthetic.shp()))
    (folder / "sharegpt.json").write_text(json.dumps(synthetic.sharegpt()))
    pl.DataFrame(synthetic.openorca()).write_parquet(folder / "openorca.parquet")
    question = {"question_id": 81, "category": "writing", "turns": ["Tell a story.", "Shorter."]}
    (folder / "question.jsonl").write_text(json.dumps(question) + "\n")
    raw = yaml.safe_load((ROOT / "demo" / "config.yaml").read_text())
    results = str(folder / "results")
    raw["pathvars"] = {"results": results, "logs": f"{results}/logs", "benchmarks": f"{results}/benchmarks"}
    trees = str(DATA / "oasst1")
    raw["prompts"]["sources"] = {"oasst1": {"path": trees, "limit": 40}}
    raw["sft_data"] = {
        "sources": {
            "self_align": None,
            "dolly": {"format": "dolly", "path": str(DATA / "databricks-dolly-15k"), "limit": 20},
            "oasst1": {"format": "oasst1", "path": trees, "limit": 20},
            "sharegpt": {"format": "sharegpt", "path": str(folder / "sharegpt.json"), "limit": 20},
        }
    }
    raw["sft"] = {"max_length": 180, "batch_size": 8, "eval_examples": 8}
    raw["pmp_data"]["sources"] = {
        "shp": {"path": str(folder / "shp.jsonl")},
        "hh_rlhf": {"path": [str(DATA / "hh-rlhf" / "helpful_test_sample.jsonl.gz")], "limit": 60},
    }
    raw["pmp_data"]["min_score_ratio"] = 2.0
    raw["rl_prompts"]["sources"] = {
        "sharegpt": {"path": str(folder / "sharegpt.json"), "limit": 20},
        "sharegpt_90k": None,
        "dolly": {"path": str(DATA / "databricks-dolly-15k"), "limit": 20},
        "oasst1": {"path": trees, "limit": 20},
        "openorca": {"path": str(folder / "openorca.parquet"), "data_files": None, "limit": 5},
        "math": {"path": str(DATA / "MATH" / "test_sample.jsonl.gz"), "limit": 20},
        "hh_red_team": {  # only the type is red teaming: the dialogues are from the helpful part
            "format": "hh_rlhf",
            "path": str(DATA / "hh-rlhf"),
            "limit": 10,
            "question_type": "red_teaming",
        },
    }
    (folder / "mine.json").write_text(json.dumps([{"instruction": text, "input": ""} for text in MINE]))
    raw["targets"] = ["policy", "sft", "evaluation", "report"]
    raw["evaluation"] = {
        "prompts": {
            "oasst1": None,
            "dolly": {"format": "dolly", "path": str(DATA / "databricks-dolly-15k"), "limit": 8},
            "mine": {"format": "prompts", "path": str(folder / "mine.json")},
        },
        "pairs": {
            "hh_rlhf": None,
            "reward_bench": None,
            "helpful": {"format": "hh_rlhf", "path": str(DATA / "hh-rlhf"), "limit": 6},
            "hhh": {"format": "hhh", "path": str(DATA / "hhh_alignment" / "other"), "limit": 6},
        },
        "judge_pairs": {
            "hh_rlhf_helpful": None,
            "hh_rlhf_harmless": None,
            "harmless": {"format": "hhh", "path": str(DATA / "hhh_alignment" / "harmless"), "limit": 4}
            | {"principles": ["Ethical"]},
            "hhh": {"format": "hhh", "path": str(DATA / "hhh_alignment" / "helpful"), "limit": 4},
        },
        "tasks": ["hhh"],
        "tasks_limit": 2,
        "tasks_data": {"hhh": str(DATA / "hhh_alignment")},
        "mt_bench": str(folder / "question.jsonl"),
        "mt_bench_tokens": 16,
    }
    raw["runs"] |= dict.fromkeys(raw["runs"])  # none but the default one
    raw["aggregation"] = {"passes": 2}
    raw["rl_prompts"]["max_tokens"] = 64
    raw["sampling"] |= {"max_length": 180, "shards": 2}
    raw["pmp"] |= {"eval_examples": 8}
    # The judge of the small world has consistent opinions on only some of these texts: few records, small batches.
    raw["reward_model"] |= {"eval_examples": 8, "epochs": 1.0, "batch_size": 8}
    raw["ppo"] |= {"max_steps": 2, "rollout_batch_size": 16, "minibatch_size": 8, "query_length": 89}
    raw["ppo"] |= {"response_length": 48}
    return raw


def build(folder: Path) -> None:
    """All artifacts, built by one call; the configuration and Snakemake's output are next to them."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(configuration(folder)))
    run = snakemake("--configfile", str(file), "--printshellcmds")
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    (folder / "printed").write_text(run.stdout + run.stderr)
    again = snakemake("--configfile", str(file), "-n")
    assert "Nothing to be done" in again.stdout + again.stderr
