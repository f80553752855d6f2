"""The overlays for models that people use: each is a configuration of the whole paper's run, and its kind is tested."""

from pathlib import Path

import pytest
import yaml

from tests.test_workflow import elsewhere, jobs, snakemake
from tests.zoo import ARCHITECTURES

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
OTHERS = {"authors"}  # of which test_imports.py knows more
KINDS = {
    "qwen2.5-0.5b": "qwen2",
    "qwen3-8b": "qwen3",
    "llama-3.2-1b": "llama_tied",
    "llama-3.1-8b": "llama3_rope",
    "mistral-7b": "llama",  # version 0.3 has no sliding window
    "gemma-3-4b": "gemma3_vision",
}
"""Overlay -> the architecture of the matrix (`tests/test_models.py`) that it is one of."""


def test_every_overlay_is_of_a_tested_architecture() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} - OTHERS == set(KINDS)
    assert set(KINDS.values()) <= set(ARCHITECTURES)
    results = [yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["pathvars"]["results"] for name in KINDS]
    assert results == [f"results/{name}" for name in KINDS]


@pytest.mark.parametrize("name", KINDS)
def test_an_overlay_is_the_whole_of_the_papers_run(tmp_path: Path, name: str) -> None:
    """From the prompts to the policy, as the paper's configuration has it, with the profile of one machine."""
    overlay = ("--configfile", f"examples/{name}.yaml", "--profile", "profiles/local")
    run = snakemake("-n", *overlay, *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert {"sample_responses", "judge_preferences", "train_pmp", "train_reward_model", "train_policy"} <= set(counts)
    assert counts["train_policy"] == 1
    assert counts["sample_responses"] == 8
