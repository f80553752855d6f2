"""The whole DAG, from real public data to a policy, as a user runs it.

The data are samples of the real data sets in their upstream schemas (`tests/data`), and made-up rows of those that no
licence lets us ship (`tests/synthetic.py`). The model is the demo's: what it says to such prompts does not matter,
but every stage does its work all the same.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForCausalLM

from tests import forks
from tests.running import environment

ROOT = Path(__file__).parents[1]


@pytest.fixture
def results(small_run: Path) -> Path:
    """All artifacts."""
    return small_run / "results"


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
    PeftModel.from_pretrained(base, str(results / "models" / "sft")).unload()
    policy = results / "runs" / "default" / "policy"
    PeftModel.from_pretrained(base, str(policy))
    assert len((policy / "metrics.jsonl").read_text().splitlines()) == 2


def test_every_artifact_has_a_manifest(results: Path) -> None:
    tables = [path for path in results.rglob("*.parquet") if "data" not in path.parts]
    assert len(tables) >= 7
    files = [path.with_suffix(".manifest.json") for path in tables]
    files += [results / "models" / "pmp" / "manifest.json", results / "models" / "reward_model" / "manifest.json"]
    files += [results / "runs" / "default" / "policy" / "manifest.json", results / "models" / "sft" / "manifest.json"]
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
    done = forks.run(line, ROOT, environment(), patience=max(forks.PATIENCE, 20 * int(kills)))
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
