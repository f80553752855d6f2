"""The whole DAG, from real public data to a policy, as a user runs it.

The data are samples of the real data sets in their upstream schemas (`tests/data`), and made-up rows of those that no
licence lets us ship (`tests/synthetic.py`). The model is the demo's: what it says to such prompts is of no interest,
every stage does its work all the same.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForCausalLM

from tests import synthetic
from tests.running import PATIENCE, environment

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"


def snakemake(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/demo", "--nolock", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's configuration with the real samples as its sources, and little of everything."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "shp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in synthetic.shp()))
    (folder / "sharegpt.json").write_text(json.dumps(synthetic.sharegpt()))
    pl.DataFrame(synthetic.openorca()).write_parquet(folder / "openorca.parquet")
    raw = yaml.safe_load((ROOT / "demo" / "config.yaml").read_text())
    results = str(folder / "results")
    raw["pathvars"] = {"results": results, "logs": f"{results}/logs", "benchmarks": f"{results}/benchmarks"}
    trees = str(DATA / "oasst1")
    raw["prompts"]["sources"] = {"oasst1": {"path": trees, "limit": 40}}
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
        "hh_red_team": {  # only the type is red teaming: the dialogues are of the helpful part
            "format": "hh_rlhf",
            "path": str(DATA / "hh-rlhf"),
            "limit": 10,
            "question_type": "red_teaming",
        },
    }
    raw["targets"] = ["policy"]
    raw["aggregation"] = {"passes": 2}
    raw["rl_prompts"]["max_tokens"] = 64
    raw["sampling"] |= {"max_length": 200, "shards": 2}
    raw["pmp"] |= {"eval_examples": 8}
    # The judge of the small world has consistent opinions on only some of these texts: few records, small batches.
    raw["reward_model"] |= {"eval_examples": 8, "epochs": 1.0, "batch_size": 8}
    raw["ppo"] |= {"max_steps": 2, "rollout_batch_size": 16, "minibatch_size": 8, "query_length": 64}
    raw["ppo"] |= {"response_length": 48}
    raw["folder"] = str(folder)
    return raw


@pytest.fixture(scope="module")
def results(config: dict[str, Any]) -> Path:
    """All artifacts, built by one call."""
    config = dict(config)
    folder = Path(config.pop("folder"))
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    run = snakemake("--configfile", str(file), "--printshellcmds")
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    (folder / "printed").write_text(run.stdout + run.stderr)
    again = snakemake("--configfile", str(file), "-n")
    assert "Nothing to be done" in again.stdout + again.stderr
    return folder / "results"


def manifest(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_tables_are_keyed_and_consistent(results: Path) -> None:
    prompts = pl.read_parquet(results / "prompts" / "oasst1.parquet")
    assert len(prompts) == prompts["prompt_id"].n_unique() == 40
    responses = [pl.read_parquet(results / "responses" / f"response{index}.parquet") for index in (0, 1)]
    for response in responses:
        assert set(response["prompt_id"]) == set(prompts["prompt_id"])
        assert set(response["finish_reason"]) <= {"eos", "stop", "length", "prompt_too_long"}
    assert not responses[0]["response"].equals(responses[1]["response"])
    judged = pl.read_parquet(results / "preferences" / "preferences.parquet")
    names = {principle["dimension"] for principle in json.loads((ROOT / "demo/principles/judge.json").read_text())}
    assert judged.group_by("prompt_id").len()["len"].to_list() == [len(names)] * judged["prompt_id"].n_unique()
    assert set(judged["prompt_id"]) <= set(prompts["prompt_id"])
    records = pl.read_parquet(results / "reward_data" / "principle_preferences.parquet")
    assert set(records["prompt_id"]) <= set(judged["prompt_id"])
    assert set(records["preference"]) <= {1, 2}


def test_all_sources_and_question_types_arrive_at_rl(results: Path) -> None:
    prompts = pl.read_parquet(results / "prompts" / "rl.parquet")
    assert set(prompts["source"]) == {"sharegpt", "dolly", "oasst1", "openorca", "math", "hh_red_team"}
    bonuses = dict(prompts.select("question_type", "length_bonus").unique().rows())
    assert bonuses == {"general": 1.0, "reasoning": -0.4, "red_teaming": 0.0}


def test_models_load_as_anyone_loads_them(results: Path) -> None:
    for stage in ("pmp", "reward_model"):
        AutoPeftModelForSequenceClassification.from_pretrained(results / "models" / stage, num_labels=1)
        assert 0 <= json.loads((results / "models" / stage / "metrics.json").read_text())["evaluation"]["accuracy"] <= 1
    base = AutoModelForCausalLM.from_pretrained(ROOT / "demo" / "model")
    policy = results / "runs" / "default" / "policy"
    PeftModel.from_pretrained(base, str(policy))
    assert len((policy / "metrics.jsonl").read_text().splitlines()) == 2


def test_every_artifact_has_a_manifest(results: Path) -> None:
    tables = [path for path in results.rglob("*.parquet") if "data" not in path.parts]
    assert len(tables) >= 7
    files = [path.with_suffix(".manifest.json") for path in tables]
    files += [results / "models" / "pmp" / "manifest.json", results / "models" / "reward_model" / "manifest.json"]
    files.append(results / "runs" / "default" / "policy" / "manifest.json")
    for file in files:
        found = manifest(file)
        assert {"settings", "inputs", "counts", "packages", "created"} <= set(found), file
    assert not list(results.rglob("*.tmp"))
    assert not list(results.rglob(".work/*"))


def test_no_text_of_the_data_is_in_the_logs(results: Path) -> None:
    prompts = pl.read_parquet(results / "prompts" / "oasst1.parquet")
    texts = [text[:60] for text in prompts["instruction"] if len(text) >= 60]
    assert texts
    logs = "".join(path.read_text() for path in (results / "logs").rglob("*.log"))
    assert sum(text in logs for text in texts) == 0


def test_killed_at_any_moment_nothing_is_lost(results: Path, tmp_path: Path) -> None:
    """A short form of `make soak`."""
    printed, kills = results.parent / "printed", os.environ.get("SOAK_KILLS", "16")
    line = [sys.executable, ROOT / "tests" / "soak.py", printed, tmp_path / "soak", kills, os.environ.get("SEED", "0")]
    done = subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
