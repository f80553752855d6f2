"""TruthfulQA and HHH of a real model: the rule's numbers are those of lm-eval's own command line on the same folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from salmon import tasks
from tests.test_tasks import plain

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("config.yaml")
MODEL = ROOT / "examples" / "smollm2" / "model"
LIMIT = os.environ.get("SALMON_TASKS_LIMIT", str(yaml.safe_load(CONFIG.read_text())["evaluation"]["tasks_limit"]))
"""Questions per task; `null` takes all of them, half an hour per test."""
FORMS = ["chat"] if "SALMON_TASKS_LIMIT" not in os.environ else ["text", "chat"]
"""How they are asked; by default, only one way, which already takes minutes."""


def run(*line: str) -> None:
    done = subprocess.run([sys.executable, "-m", *line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.parametrize("form", FORMS)
def test_the_rule_says_what_the_command_line_says(tmp_path: Path, form: str) -> None:
    assert MODEL.is_dir(), "run `python examples/smollm2/fetch_model.py`, or `make test-real`"
    changes = {"tasks_format": form, "tasks_limit": yaml.safe_load(LIMIT)}
    line = ["snakemake", "--profile", "profiles/cpu", "--nolock", f"{tmp_path}/results/evaluation/initial_tasks"]
    line += ["--configfile", str(CONFIG), "--config", f"pathvars={{results: {tmp_path}/results}}"]
    run(*line, f"evaluation={json.dumps(changes)}")
    ours = json.loads((tmp_path / "results" / "evaluation" / "initial_tasks" / "tasks.json").read_text())
    ours = plain(ours)
    data = yaml.safe_load(CONFIG.read_text())["evaluation"]["tasks_data"]
    line = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={MODEL},dtype=float32", "--device", "cpu"]
    line += ["--tasks", "truthfulqa_local,hhh", "--include_path", "evaluation_tasks", "--metadata", json.dumps(data)]
    line += ["--batch_size", "16", "--output_path", f"{tmp_path}/theirs"]
    line += ["--apply_chat_template"] if form == "chat" else []
    run(*line, *([] if LIMIT == "null" else ["--limit", LIMIT]))
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = plain(tasks.metrics(json.loads(file.read_text())["results"], {}, {}, 0))
    print(form, {name: (ours[name]["acc"], theirs[name]["acc"]) for name in ("truthfulqa_mc1", "hhh")})  # noqa: T201
    # A mean of probabilities: their logarithms are around -100, where float32 has steps of 8e-6, and are rounded
    # depending on the other texts in the batch.
    assert ours.pop("truthfulqa_mc2")["acc"] == pytest.approx(theirs.pop("truthfulqa_mc2")["acc"], rel=2e-5)
    assert ours == theirs  # counts of right answers
    assert ours["hhh"]["acc"]["number"] == sum(one["acc"]["number"] for name, one in ours.items() if "hhh_" in name)
    assert 0 < ours["hhh"]["acc"]["value"] < 1
