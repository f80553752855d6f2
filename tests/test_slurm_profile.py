"""The SLURM profile: the SLURM options that the executor passes for every rule of the paper's configuration.

Whether SLURM accepts them, and what it makes of them, is tested on a real SLURM (tests/slurm).
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from snakemake.profiles import ProfileConfigFileParser
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

from tests import forks

ROOT = Path(__file__).parents[1]
CPU = "-p cpu -t 480 --mem 64000 --ntasks=1 --cpus-per-task=8"
EIGHT = "--ntasks-per-node=8 --cpus-per-task=8"  # one task per GPU: 64 CPUs on a node
ONE = "-p gpu -t 360 --mem 64000 --cpus-per-task=8 --gres=gpu:1"  # and one task, SLURM's default
EXPECTED = {
    "check_model": ONE,
    "clean_prompts": CPU,
    "clean_sft_data": CPU,
    "clean_pmp_data": CPU,
    "clean_rl_prompts": CPU,
    "gather_responses": CPU,
    "gather_preferences": CPU,
    "aggregate_preferences": CPU,
    "sample_responses": f"-p gpu -t 360 --mem 512000 --nodes=1 {EIGHT} --gres=gpu:8",
    "judge_preferences": f"-p gpu -t 1440 --mem 512000 --nodes=1 {EIGHT} --gres=gpu:8",
    "train_pmp": f"-p gpu -t 1440 --mem 512000 --nodes=1 {EIGHT} --signal=TERM@1200 --gres=gpu:8",
    "train_reward_model": f"-p gpu -t 1440 --mem 512000 --nodes=1 {EIGHT} --signal=TERM@1200 --gres=gpu:8",
    "train_sft": f"-p gpu -t 1440 --mem 512000 --nodes=1 {EIGHT} --signal=TERM@1200 --gres=gpu:8",
    "train_policy": f"-p gpu -t 1440 --mem 512000 --nodes=6 {EIGHT} --signal=TERM@1200 --gres=gpu:8",
    "train_demo_policy": ONE,
    "evaluate_demo": ONE,
}
PAPER = ("policies", "sft", "demo_policy")
DEMO = ("demo_evaluation", "--configfile", "demo/config.yaml", "--forceall")  # even where the demo has run


class Resources(dict[str, Any]):
    """Resources as the executor sees them: by name, and as attributes."""

    __getattr__ = dict.__getitem__


def jobs(*targets: str, site: Path | None = None, folder: Path = ROOT) -> Iterator[tuple[str, Resources]]:
    """Rule and resources of every job, from a dry run with the profile."""
    line = ["-s", ROOT / "Snakefile", "--profile", ROOT / "profiles" / "slurm", "-n", *targets]
    done = forks.snakemake(line, folder, os.environ | ({"SALMON_SITE": str(site)} if site else {}))
    assert done.returncode == 0, done.stderr + done.stdout
    printed = re.findall(r"^rule (\w+):\n((?: .*\n)*)", done.stdout + done.stderr, flags=re.MULTILINE)
    for rule, body in printed:
        words = re.search(r"resources: (.*)", body)
        assert words, rule
        pairs = (pair.split("=", 1) for pair in re.split(r", (?=\w+=)", words[1]))
        yield (
            rule,
            Resources({name: int(value) if value.isdigit() and name != "qos" else value for name, value in pairs}),
        )


def submit_line(rule: str, resources: Resources) -> str:
    """What the executor would call, without what it adds for itself."""
    job = SimpleNamespace(name=rule, resources=resources, threads=1)
    params = {
        "run_uuid": "uuid",
        "slurm_logfile": "log",
        "comment_str": rule,
        "account": f"-A {resources['slurm_account']}" if "slurm_account" in resources else "",
        "partition": f"-p {resources['slurm_partition']}",
        "workdir": None,
    }
    line = get_submit_command(job, params) + set_gres_string(job)
    return " ".join(line.split("--comment", 1)[1].split()[1:])


def minutes(value: Any) -> Any:
    """Run times as the executor gets them."""
    return int(value[:-1]) * 60 if isinstance(value, str) and value.endswith("h") else value


def test_every_rule_asks_for_what_the_paper_ran_on() -> None:
    asked = dict(jobs(*PAPER))
    asked["evaluate_demo"] = dict(jobs(*DEMO))["evaluate_demo"]
    for resources in asked.values():
        resources["runtime"] = minutes(resources["runtime"])
    seen = {rule: submit_line(rule, resources) for rule, resources in asked.items()}
    for target in PAPER:  # they have no job of their own
        del seen[target]
    assert seen == EXPECTED


def test_the_site_file_is_the_only_place_to_edit(tmp_path: Path) -> None:
    site = yaml.safe_load((ROOT / "profiles" / "slurm" / "site.yaml").read_text())
    site |= {"account": "lab", "gpu_partition": "a100", "gres": "gpu:a100", "gpus_per_node": 1, "policy_nodes": 2}
    site |= {"qos": "long", "constraint": "ib", "tensor_parallel": True, "cpu_partition": "serial"}
    site |= {"policy_deepspeed": "profiles/deepspeed/zero3.json"}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    asked = dict(jobs("policies", site=tmp_path / "site.yaml"))
    policy = asked["train_policy"]
    line = submit_line("train_policy", policy)
    for words in (
        "-A lab",
        "--gres=gpu:a100:1",
        "-p a100",
        "-C ib",
        "--qos=long",
        "--nodes=2",
        "--ntasks-per-node=2 --cpus-per-task=4",
    ):
        assert words in line, words
    assert (policy["ranks"], policy["deepspeed"]) == (1, str(ROOT / "profiles/deepspeed/zero3.json"))
    assert asked["sample_responses"]["tensor_parallel"] == asked["judge_preferences"]["tensor_parallel"] == "true"
    assert "-p serial" in submit_line("clean_prompts", asked["clean_prompts"])


def test_names_of_the_site_are_taken_as_they_stand(tmp_path: Path) -> None:
    """From any directory, though Snakemake evaluates resources as Python, and fills in environment variables."""
    site = yaml.safe_load((ROOT / "profiles" / "slurm" / "site.yaml").read_text())
    site |= {"account": "2024-15", "cpu_partition": "all", "gpu_partition": "it's $HOME", "constraint": "a100|h100"}
    site |= {"qos": "007", "gres": "gpu:list"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(site))
    (tmp_path / "zero.json").write_text("{}")
    asked = dict(jobs("policy", "prompts", site=tmp_path / "mine.yaml", folder=tmp_path))
    policy, prompts = asked["train_policy"], asked["clean_prompts"]
    assert (prompts["slurm_account"], prompts["slurm_partition"]) == ("2024-15", "all")
    names = ("slurm_account", "slurm_partition", "constraint", "qos", "gres")
    assert [policy[name] for name in names] == ["2024-15", "it's $HOME", "a100|h100", "007", "gpu:list:8"]
    assert policy["deepspeed"] == str(ROOT / "profiles" / "deepspeed" / "zero2.json")


@pytest.mark.parametrize(
    ("line", "instead", "said"),
    [
        ("gpu_partition: gpu", "gpu_partition: on", "gpu_partition: True is not a name; write it in quotes"),
        ("policy_tokens_per_pass: 4096", "policy_micro_batch_size: 1", "policy_micro_batch_size is now policy_tokens"),
    ],
)
def test_what_is_wrong_in_the_site_is_told(tmp_path: Path, line: str, instead: str, said: str) -> None:
    text = (ROOT / "profiles" / "slurm" / "site.yaml").read_text()
    assert line in text
    (tmp_path / "site.yaml").write_text(text.replace(line, instead))
    environment = os.environ | {"SALMON_SITE": str(tmp_path / "site.yaml")}
    done = forks.snakemake(["--profile", "profiles/slurm", "-n"], environment=environment)
    assert done.returncode != 0
    assert f"site.yaml: {said}" in done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], "results/logs/slurm"),
        (["--config", "seed=1", "pathvars={results: 'a b', logs: <results>/l}"], "a b/l/slurm"),
        (["--configfile", "one.yaml", "two.yaml", "-n", "policy"], "one/x/slurm"),
        (["--configfile", "one.yaml", "--config", "pathvars={results: three}", "--directory", "else where"], None),
    ],
)
def test_slurms_logs_follow_the_path_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str], expected: str | None
) -> None:
    (tmp_path / "one.yaml").write_text("pathvars: {results: one, logs: <results>/y}")
    (tmp_path / "two.yaml").write_text("{pathvars: {logs: <results>/x}}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["snakemake", *line])
    profile = ProfileConfigFileParser().parse((ROOT / "profiles" / "slurm" / "profile.yaml").open())
    assert profile["slurm-logdir"] == str(tmp_path / (expected or "else where/three/y/slurm"))


@pytest.mark.parametrize("nodes", ["2", "3"])
def test_several_nodes_need_slurm(nodes: str) -> None:
    """Otherwise a run on one node would look like one on several."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    line = ["bash", "workflow_scripts/launch.sh", nodes, "1", "1", "script.py"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{nodes} nodes need SLURM" in done.stderr


def test_plan_counts_with_the_hardware_of_the_profile(tmp_path: Path) -> None:
    """Both with numbers and with words from the site's file."""
    site = yaml.safe_load((ROOT / "profiles" / "slurm" / "site.yaml").read_text())
    site |= {"reward_model_tokens_per_pass": 1, "policy_deepspeed": None, "gpus_per_node": 4, "policy_nodes": 2}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    line = ["--profile", "profiles/slurm", "--executor", "local", "--cores", "1", "--nolock", "--quiet", "all"]
    raw = yaml.safe_load((ROOT / "demo" / "config.yaml").read_text())
    one_run = {"plan": {"gpu": "a10g"}, "runs": dict.fromkeys(raw["runs"])}
    (tmp_path / "one_run.yaml").write_text(yaml.safe_dump(one_run))
    line += ["--retries", "0", "--configfile", "demo/config.yaml", str(tmp_path / "one_run.yaml")]
    line += ["--config", f"pathvars={{results: {tmp_path}/results, logs: {tmp_path}/logs}}", "--", "plan"]
    done = forks.snakemake(line, environment=os.environ | {"SALMON_SITE": str(tmp_path / "site.yaml")})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 GB, 70 TFLOPS, 600 GB/s" in done.stdout
    tables = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in done.stdout.splitlines() if row.startswith("|")
    ]
    counts = {row[0]: row for row in tables if len(row) == 10}
    assert {name: counts[name][7] for name in ("response0", "preferences", "pmp", "policy")} == {
        "response0": "1 x 4",
        "preferences": "2 x 4",
        "pmp": "1 x 4",
        "policy": "1 x 8",
    }
    passes, steps = (int(counts["reward_model"][column].replace(",", "")) for column in (6, 5))
    assert passes == 32 // 4 * steps > 0  # a pair per pass and GPU
    assert not (tmp_path / "results").exists()
