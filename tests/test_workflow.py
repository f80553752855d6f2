"""The DAG: dry runs of the paper's configuration, seen as a user sees them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from salmon import configuration
from tests.running import PATIENCE

ROOT = Path(__file__).parents[1]

# Rule -> rules it needs directly; each target below is one rule and all that it rests on.
PARENTS = {
    "clean_prompts": [],
    "sample_responses": ["clean_prompts"],
    "gather_responses": ["sample_responses"],
    "judge_preferences": ["gather_responses"],
    "gather_preferences": ["judge_preferences"],
    "aggregate_preferences": ["gather_preferences", "gather_responses"],
    "clean_pmp_data": [],
    "train_pmp": ["clean_pmp_data"],
    "train_reward_model": ["train_pmp", "aggregate_preferences"],
    "clean_rl_prompts": [],
    "train_policy": ["clean_rl_prompts", "train_reward_model"],
}
TARGETS = {
    "prompts": "clean_prompts",
    "response0": "gather_responses",
    "response1": "gather_responses",
    "preferences": "gather_preferences",
    "reward_data": "aggregate_preferences",
    "pmp_data": "clean_pmp_data",
    "pmp": "train_pmp",
    "reward_model": "train_reward_model",
    "rl_prompts": "clean_rl_prompts",
    "policy": "train_policy",
}
FILES = {f"results/{configuration.TARGETS[target].artifact}": rule for target, rule in TARGETS.items()}


def snakemake(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


def elsewhere(folder: Path) -> list[str]:
    """Options that put all results into another folder."""
    return ["--config", f"pathvars={{results: {folder}, logs: {folder}/logs, benchmarks: {folder}/benchmarks}}"]


def jobs(output: str) -> dict[str, int]:
    table = output.rsplit("Job stats:", 1)[1]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.M) if name != "total"}


def ancestors(rule: str) -> set[str]:
    return {rule}.union(*(ancestors(parent) for parent in PARENTS[rule]))


def test_every_target_is_tested() -> None:
    """Those of all runs and of the demo have tests of their own below."""
    assert {*TARGETS, "policies", "evaluation", "demo_policy"} == set(configuration.TARGETS)


def test_the_dry_run_lists_the_whole_reproduction(tmp_path: Path) -> None:
    run = snakemake("-n", *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert set(counts) == {*PARENTS, "all"}
    assert counts["sample_responses"] == 2 * 4
    assert counts["judge_preferences"] == 8
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_a_named_target_builds_just_its_ancestors(target: str, tmp_path: Path) -> None:
    run = snakemake("-n", target, *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert set(counts) - {target} == ancestors(TARGETS[target])
    if target in ("response0", "response1"):  # of one response only
        assert counts["sample_responses"] == 4


def test_a_file_of_the_results_is_a_target_too(tmp_path: Path) -> None:
    run = snakemake("-n", *(str(tmp_path / name.removeprefix("results/")) for name in FILES), *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    assert set(jobs(run.stdout + run.stderr)) == set(PARENTS)


def test_runs_share_what_they_have_in_common(tmp_path: Path) -> None:
    run = snakemake("-n", "policies", *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    # Seven policies; reward models: the shared one, one without PMP, one on data of another aggregation.
    assert counts["train_policy"] == 7
    assert counts["train_reward_model"] == 3
    assert counts["aggregate_preferences"] == 2
    assert counts["train_pmp"] == 1
    assert counts["clean_rl_prompts"] == 2  # one with red-teaming questions, for the harmless run
    assert counts["judge_preferences"] == 8


def test_the_demo_ends_with_the_evaluation_of_all_its_runs(tmp_path: Path) -> None:
    run = snakemake("-n", "--configfile", "config.yaml", "demo/config.yaml", *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert counts["evaluate_demo"] == 1
    assert counts["train_policy"] == 5
    assert counts["train_reward_model"] == 1
    assert counts["clean_rl_prompts"] == 1
    assert counts["make_demo_data"] == 1
    assert f"{tmp_path}/data/oasst1.jsonl" in run.stdout + run.stderr


def test_other_targets_can_be_set(tmp_path: Path) -> None:
    run = snakemake("-n", *elsewhere(tmp_path), "targets=[pmp,prompts]")
    assert run.returncode == 0, run.stderr
    assert set(jobs(run.stdout + run.stderr)) == {"clean_pmp_data", "train_pmp", "clean_prompts", "all"}


def test_an_unknown_run_is_named(tmp_path: Path) -> None:
    run = snakemake("-n", f"{tmp_path}/runs/nope/policy", *elsewhere(tmp_path))
    assert run.returncode != 0
    assert "there is no run nope" in run.stdout + run.stderr


def test_a_wrong_key_ends_before_any_job_without_a_traceback() -> None:
    run = snakemake("-n", "--config", "ppo={temprature: 1}")
    assert run.returncode != 0
    said = run.stdout + run.stderr
    assert "ppo.temprature: unknown key" in said
    assert "Traceback" not in said
    assert "Job stats" not in said


def test_hardware_reruns_nothing_and_settings_do(tmp_path: Path) -> None:
    """Changing a resource leaves params alone; the resources of a job are not among its params."""
    text = snakemake("-n", "-p", *elsewhere(tmp_path), "--set-resources", "train_policy:micro_batch_size=1").stdout
    assert "--micro-batch-size 1" in text
    params = (ROOT / "rules" / "policy.smk").read_text()
    assert "micro_batch_size" not in params.split("params:")[1].split("shell:")[0]


def test_every_rule_has_a_log_a_benchmark_and_a_script_of_its_name() -> None:
    text = "".join(path.read_text() for path in sorted((ROOT / "rules").glob("*.smk")))
    for block in re.split(r"^(?=rule |use rule )", text, flags=re.M)[1:]:
        name = re.match(r"(?:use rule \w+ as|rule) (\w+)", block)[1]
        assert "log:" in block, name
        assert "benchmark:" in block, name
        if block.startswith("rule ") and name != "gather_responses":  # both gathering rules share one script
            assert f"/{name}.py" in block, name


def test_the_picture_of_the_rules_is_the_one_of_these_rules() -> None:
    run = snakemake("--rulegraph", "mermaid-js")
    assert run.returncode == 0, run.stderr
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", run.stdout))
    edges = sorted((names[start], names[end]) for start, end in re.findall(r"(id\d+) --> (id\d+)", run.stdout))
    drawn = (ROOT / "docs" / "rules.dot").read_text()
    labels = dict(re.findall(r'(\d+)\[label *= *"(\w+)', drawn))
    assert sorted((labels[start], labels[end]) for start, end in re.findall(r"(\d+) -> (\d+)", drawn)) == edges
