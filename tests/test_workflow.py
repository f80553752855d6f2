"""The DAG: dry runs of the paper's configuration, seen as a user sees them."""

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from salmon import configuration, verification
from tests import forks
from tests.running import merge

ROOT = Path(__file__).parents[1]

# Rule -> rules it needs directly; each target below is one rule and all that it depends on.
PARENTS = {
    "check_model": [],
    "clean_prompts": [],
    "sample_responses": ["clean_prompts", "check_model"],
    "gather_responses": ["sample_responses"],
    "judge_preferences": ["gather_responses", "check_model"],
    "gather_preferences": ["judge_preferences"],
    "aggregate_preferences": ["gather_preferences", "gather_responses"],
    "clean_pmp_data": [],
    "train_pmp": ["clean_pmp_data", "check_model"],
    "train_reward_model": ["train_pmp", "aggregate_preferences", "check_model"],
    "clean_rl_prompts": [],
    "train_policy": ["clean_rl_prompts", "train_reward_model", "check_model"],
}
# For the initial policy, which the configuration does not train.
SFT = {"clean_sft_data": [], "train_sft": ["clean_sft_data", "check_model"]}
TARGETS = {
    "sft_data": "clean_sft_data",
    "sft": "train_sft",
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


def snakemake(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return forks.snakemake(arguments, folder)


def elsewhere(folder: Path) -> list[str]:
    """Options that put all results into another folder."""
    return ["--config", f"pathvars={{results: {folder}, logs: {folder}/logs, benchmarks: {folder}/benchmarks}}"]


def jobs(output: str) -> dict[str, int]:
    table = output.rsplit("Job stats:", 1)[1]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.M) if name != "total"}


def ancestors(rule: str) -> set[str]:
    return {rule}.union(*(ancestors(parent) for parent in (PARENTS | SFT)[rule]))


def test_every_target_is_tested() -> None:
    """Targets of all runs and of the demo have tests of their own below."""
    assert {*TARGETS, "policies", "evaluation", "report", "demo_evaluation", "demo_policy"} == set(
        configuration.TARGETS
    )


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
    if target in ("response0", "response1"):  # for one response only
        assert counts["sample_responses"] == 4


def test_a_file_of_the_results_is_a_target_too(tmp_path: Path) -> None:
    run = snakemake("-n", *(str(tmp_path / name.removeprefix("results/")) for name in FILES), *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    assert set(jobs(run.stdout + run.stderr)) == {*PARENTS, *SFT}


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


SAMPLED = {"sample_responses", "gather_responses"}
JUDGED = {"judge_preferences", "gather_preferences"}
TRAINED = {"train_reward_model", "train_policy"}


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({"sampling": {"temperature": 1.0}}, {"check_model", *SAMPLED, *JUDGED, "aggregate_preferences", *TRAINED}),
        ({"judge": {"min_characters": 1}}, {"check_model", *JUDGED, "aggregate_preferences", *TRAINED}),
        ({"judge": {"shards": 2}, "sampling": {"shards": 1}}, {"train_policy"}),  # changes no result
        ({"aggregation": {"agreement": "mean"}}, {"aggregate_preferences", *TRAINED}),
        ({"lora": {"r": 8}}, {"check_model", "train_pmp", *TRAINED}),
        ({"model": {"adapter": "mine/policy"}}, {*PARENTS} - {"clean_prompts", "clean_pmp_data"}),
        (
            {"prompts": {"sources": {"oasst1": {"limit": 9}}}},
            {"clean_prompts", *SAMPLED, *JUDGED, "aggregate_preferences", *TRAINED},
        ),
        ({"pmp_data": {"min_score_ratio": 3.0}}, {"clean_pmp_data", "train_pmp", *TRAINED}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_run_may_change_every_section_and_shares_the_rest(
    changes: dict[str, Any], own: set[str], tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"runs": {"a-1": changes}}))
    targets = [f"{tmp_path}/runs/{run}/policy" for run in ("default", "a-1")]
    run = snakemake("-n", *targets, "--configfile", str(overlay), *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    found = jobs(run.stdout + run.stderr)
    default = {"check_model": 4, "sample_responses": 8, "gather_responses": 2, "judge_preferences": 8}
    assert {rule for rule in found if found[rule] > default.get(rule, 1)} == own


def test_the_demo_ends_with_the_evaluation_of_all_its_runs(tmp_path: Path) -> None:
    run = snakemake("-n", "--configfile", "config.yaml", "demo/config.yaml", *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert counts["evaluate_demo"] == 1
    assert counts["train_policy"] == 5
    assert counts["train_reward_model"] == 1
    assert counts["clean_rl_prompts"] == 1
    assert counts["make_demo_data"] == 1
    drawn = {rule: number for rule, number in counts.items() if rule.startswith("draw_")}
    assert drawn == dict.fromkeys(("draw_funnel", "draw_judge", "draw_pmp", "draw_reward_model", "draw_training"), 1)
    assert not any(rule.startswith("evaluate_") for rule in counts.keys() - {"evaluate_demo"})
    assert f"{tmp_path}/data/oasst1.jsonl" in run.stdout + run.stderr


def test_other_targets_can_be_set(tmp_path: Path) -> None:
    run = snakemake("-n", *elsewhere(tmp_path), "targets=[pmp,prompts]")
    assert run.returncode == 0, run.stderr
    assert set(jobs(run.stdout + run.stderr)) == {"clean_pmp_data", "train_pmp", "clean_prompts", "check_model", "all"}


def test_an_unknown_run_is_named(tmp_path: Path) -> None:
    run = snakemake("-n", f"{tmp_path}/runs/nope/policy", *elsewhere(tmp_path))
    assert run.returncode != 0
    assert "there is no run nope" in run.stdout + run.stderr


def test_thousands_of_jobs_are_listed_in_seconds(tmp_path: Path) -> None:
    """Snakemake itself takes nearly all of the time (benchmarks/dry_run.py): nine times its start-up time."""

    def seconds(*arguments: str) -> float:
        """CPU seconds."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        run = subprocess.run([sys.executable, "-m", "snakemake", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        said.append(run.stdout + run.stderr)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    said: list[str] = []
    start = seconds("--version")
    shards = ("sampling={shards: 1000}", "judge={shards: 1000}")
    assert seconds("-n", "--quiet", "all", *elsewhere(tmp_path), *shards) < 15 * start
    assert "judge_preferences" in said[1]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("responses/response0.shards/99.parquet", "no shard 99 of the responses: sampling.shards is 4"),
        ("preferences/preferences.shards/08.parquet", "no shard 08 of the judgements: judge.shards is 8"),
        ("runs/harmless/models/reward_model", "the reward_model of the run harmless is results/models/reward_model"),
        ("runs/default/models/pmp", "the pmp of the run default is results/models/pmp"),
        ("runs/honest/prompts/rl.parquet", "the rl_prompts of the run honest is results/prompts/rl.parquet"),
        (
            "runs/no_pmp/reward_data/principle_preferences.parquet",
            "the reward_data of the run no_pmp is results/reward_data/principle_preferences.parquet",
        ),
        ("demo_evaluation", "prompts.sources.oasst1.path is OpenAssistant/oasst1, outside of it"),
    ],
)
def test_what_no_rule_should_make_is_refused(target: str, said: str) -> None:
    """Otherwise it would be judged with a shard too many, trained again, or measured by oracles of another world."""
    run = snakemake("-n", f"results/{target}")
    assert run.returncode != 0
    assert said in run.stdout + run.stderr
    assert "Job stats" not in run.stdout + run.stderr


def test_what_a_run_does_not_share_is_made(tmp_path: Path) -> None:
    own = (f"{tmp_path}/runs/{name}" for name in ("harmless/prompts/rl.parquet", "no_pmp/models/reward_model"))
    run = snakemake("-n", *own, *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    assert jobs(run.stdout + run.stderr)["train_reward_model"] == 1


def test_a_wrong_key_ends_before_any_job_without_a_traceback() -> None:
    run = snakemake("-n", "--config", "ppo={temprature: 1}")
    assert run.returncode != 0
    said = run.stdout + run.stderr
    assert "ppo.temprature: unknown key" in said
    assert "Traceback" not in said
    assert "Job stats" not in said


def test_the_old_name_of_a_resource_is_refused(tmp_path: Path) -> None:
    run = snakemake("-n", *elsewhere(tmp_path), "--set-resources", "train_policy:micro_batch_size=1")
    assert run.returncode != 0
    assert "train_policy:micro_batch_size (of --set-resources, or of a profile) is now" in run.stdout + run.stderr
    assert "train_policy:tokens_per_pass" in run.stdout + run.stderr


def test_hardware_reruns_nothing_and_settings_do(tmp_path: Path) -> None:
    """Changing a resource leaves params alone; the resources of a job are not among its params."""
    text = snakemake("-n", "-p", *elsewhere(tmp_path), "--set-resources", "train_policy:tokens_per_pass=777").stdout
    assert "--tokens-per-pass 777" in text
    done = snakemake(
        "-n", *elsewhere(tmp_path), "--profile", "profiles/local", "--set-resources", "train_policy:ranks=2"
    )
    assert "replaces all resources that the profile sets" in done.stdout + done.stderr
    params = (ROOT / "rules" / "policy.smk").read_text()
    assert "tokens_per_pass" not in params.split("params:")[1].split("shell:")[0]


# ---- A local model that changes


ADAPTER = "models/sft"
BASE = "demo/model"


def pretend(folder: Path, *arguments: str) -> None:
    """Create a placeholder for every output of the demo, so all of them are up to date."""
    listed = snakemake("--profile", "profiles/demo", "--summary", "demo_evaluation", *arguments, folder=folder)
    assert listed.returncode == 0, listed.stderr
    for line in listed.stdout.splitlines()[1:]:
        output = folder / line.split("\t")[0]
        (output.parent if output.suffix else output).mkdir(parents=True, exist_ok=True)
        if output.suffix:
            output.write_text(output.name)
    touched = snakemake(
        "--profile", "profiles/demo", "--touch", "--forceall", "demo_evaluation", *arguments, folder=folder
    )
    assert touched.returncode == 0, touched.stderr


def reruns(folder: Path, *arguments: str) -> set[str]:
    """Rules that a dry run of the demo lists, except the check of the model, which makes nothing that they read."""
    run = snakemake("--profile", "profiles/demo", "-n", "demo_evaluation", *arguments, folder=folder)
    assert run.returncode == 0, run.stderr
    said = run.stdout + run.stderr
    return set() if "Nothing to be done" in said else set(jobs(said)) - {"demo_evaluation", "check_model"}


@contextmanager
def overwritten(file: Path) -> Iterator[None]:
    """Within the block, a file has other contents and the current time; a new file is empty."""
    before = (file.read_bytes(), file.stat().st_mtime) if file.exists() else None
    with file.open("r+b" if before else "wb") as stream:
        stream.write(before[0].swapcase() if before else b"")
    try:
        yield
    finally:
        if before:
            file.write_bytes(before[0])
            os.utime(file, (before[1], before[1]))
        else:
            file.unlink()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with an adapter, and up-to-date placeholders for all results."""
    folder = tmp_path_factory.mktemp("built") / "copy"
    folder.mkdir()
    for name in ("Snakefile", "config.yaml", "rules", "workflow_scripts", "demo", "prompts", "profiles", "envs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    (folder / ADAPTER).mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / ADAPTER / name).write_text(name)
    pretend(folder, "--config", f"model={{adapter: {ADAPTER}}}")
    return folder


# What reads the base model's weights, and what reads only the initial policy.
POLICY = {*PARENTS} - {"check_model", "clean_prompts", "clean_pmp_data", "clean_rl_prompts", "train_pmp"}
POLICY |= {"evaluate_demo"}
WEIGHTS = POLICY | {"train_pmp"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"{BASE}/README.md", f"{BASE}/manifest.json", f"{BASE}/pytorch_model.bin", f"{ADAPTER}/README.md"], set()),
        ([f"{BASE}/model.safetensors"], WEIGHTS),
        ([f"{BASE}/generation_config.json"], WEIGHTS),
        ([f"{BASE}/tokenizer.json"], WEIGHTS | {"clean_rl_prompts"}),
        ([f"{BASE}/chat_template.jinja"], WEIGHTS | {"clean_rl_prompts"}),
        ([f"{ADAPTER}/adapter_model.safetensors"], POLICY),
    ],
)
def test_a_local_model_that_is_changed_in_its_place(built: Path, names: list[str], expected: set[str]) -> None:
    """What reads the file is run again, and what depends on that; another file in the folder makes no difference."""
    with ExitStack() as changes:
        for name in names:
            changes.enter_context(overwritten(built / name))
        assert reruns(built, "--config", f"model={{adapter: {ADAPTER}}}") == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("ppo={learning_rate: 0.00123}", {"train_policy", "evaluate_demo"}),
        ("sampling={temperature: 0.7}", POLICY),
        ("pmp={learning_rate: 0.00123}", {"train_pmp", "train_reward_model", "train_policy", "evaluate_demo"}),
        # Settings that the check of the model reads, too.
        ("ppo={reward_max_length: 440}", {"train_policy", "evaluate_demo"}),
        ("reward_model={max_length: 440}", {"train_reward_model", "train_policy", "evaluate_demo"}),
        ("scoring={format: chat}", {"train_pmp", "train_reward_model", "train_policy", "evaluate_demo"}),
    ],
)
def test_a_changed_setting_reruns_what_depends_on_it(built: Path, setting: str, expected: set[str]) -> None:
    assert reruns(built, "--config", setting, f"model={{adapter: {ADAPTER}}}") == expected


def test_a_trailing_slash_reruns_nothing(built: Path) -> None:
    places = "pathvars={results: results//demo/, logs: <results>/logs/, benchmarks: ./results/demo/benchmarks}"
    assert reruns(built, "--config", places, f"model={{adapter: {ADAPTER}}}") == set()


def test_a_link_that_is_set_to_another_model(built: Path) -> None:
    """All files of the other model are older than the results."""
    own = ("--config", "model={base: models/current}", "pathvars={results: results/link}")
    shutil.copytree(built / BASE, built / "models" / "other")
    link = built / "models" / "current"
    link.symlink_to(built / BASE)
    pretend(built, *own)
    link.unlink()
    link.symlink_to("other")
    assert reruns(built, *own) == WEIGHTS | {"clean_rl_prompts"}


def test_a_model_that_a_rule_makes(built: Path) -> None:
    """Its folder is the input, both before and after it exists."""
    own = ("--config", "model={base: <results>/demo_policy}", "pathvars={results: results/own}")
    assert "train_demo_policy" in reruns(built, *own)
    pretend(built, *own)
    model = built / "results" / "own" / "demo_policy"
    shutil.copytree(built / BASE, model, dirs_exist_ok=True)
    assert reruns(built, *own) == set()
    (model / ".snakemake_timestamp").touch()
    assert reruns(built, *own) == WEIGHTS | {"clean_rl_prompts"}


def test_a_model_among_the_results_that_no_rule_makes(built: Path) -> None:
    """It is treated like any other."""
    own = ("--config", "model={base: <results>/mine}", "pathvars={results: results/other}")
    model = shutil.copytree(built / BASE, built / "results" / "other" / "mine")
    pretend(built, *own)
    with overwritten(model / "README.md"):
        assert reruns(built, *own) == set()
    with overwritten(model / "tokenizer.json"):
        assert reruns(built, *own) == WEIGHTS | {"clean_rl_prompts"}


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


@pytest.mark.parametrize(
    ("engines", "quantization", "reads"),
    [
        ({"sampling": {"engine": "vllm"}}, "nf4", {"sample_responses"}),
        ({"ppo": {"engine": "vllm"}, "sampling": {"engine": "vllm"}}, "nf4", {"sample_responses", "train_policy"}),
        ({"ppo": {"engine": "vllm"}}, "none", set()),
        ({}, "nf4", set()),
    ],
)
def test_an_engine_gets_a_base_that_it_reads(
    built: Path, engines: dict[str, Any], quantization: str, reads: set[str]
) -> None:
    """Written once for all runs, and only for the jobs in which the engine samples."""
    overlay = {"model": {"adapter": None, "quantization": quantization}, "targets": ["policies"], **engines}
    (built / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    words = ["--profile", "profiles/demo", "--configfile", "demo/config.yaml", "overlay.yaml", "-F", "-n"]
    listed = snakemake(*words, folder=built)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert jobs(listed.stdout).get("dequantize_base", 0) == bool(reads)
    blocks = re.findall(r"^rule (\w+):\n((?: .*\n)*)", listed.stdout, flags=re.M)
    assert {rule for rule, block in blocks if re.search(r"^    input: .*models/engine_base", block, re.M)} == reads


# ---- Provenance


def test_the_inventory_of_verify_is_what_the_rules_make(built: Path) -> None:
    """The same artifacts, each by its rule and from its inputs."""
    raw = merge(
        yaml.safe_load((ROOT / "config.yaml").read_text()), yaml.safe_load((ROOT / "demo/config.yaml").read_text())
    )
    raw = merge(raw, {"model": {"adapter": ADAPTER}, "runs": {"no_pmp": {"reward_model": {"init": "base"}}}})
    raw = merge(raw, {"runs": {"noisy": {"aggregation": {"label_noise": 0.2}, "rl_prompts": {"max_tokens": 31}}}})
    overlay = built / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"runs": raw["runs"]}))
    words = ("--profile", "profiles/demo", "--configfile", "demo/config.yaml", "overlay.yaml", "--detailed-summary")
    listed = snakemake(
        *words,
        "evaluation",
        "report",
        "demo_evaluation",
        "sft",
        "--config",
        f"model={{adapter: {ADAPTER}}}",
        folder=built,
    )
    assert listed.returncode == 0, listed.stderr
    head, *lines = (line.split("\t") for line in listed.stdout.splitlines() if "\t" in line)
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    made = {row["output_file"]: (row["rule"], set(row["input-file(s)"].split(","))) for row in rows}
    with contextlib.chdir(built):
        known = verification.inventory(configuration.load(raw, built))
    # The demo's data are one artifact of several files, and a manifest is a part of its table.
    assert set(known) == {path for path in made if "/data/" not in path and not path.endswith(".manifest.json")} | {
        "results/demo/data"
    }
    for path, artifact in known.items():
        if path == "results/demo/data":
            continue
        rule, inputs = made[path]
        assert artifact.rule == rule, path
        assert artifact.origin is not None
        for one in artifact.origin.inputs if Path(built, path).exists() else ():  # otherwise Snakemake lists no inputs
            if rule.startswith("gather_") and ".shards/" not in one.name:
                continue  # what the shards are made from
            if not Path(built, one.name).exists():
                continue  # a current input, whereas Snakemake lists those that it has a record of
            read = inputs | {str(Path(name).parent) for name in inputs}  # for a model, the rules list the files
            assert one.name in read, (path, one)


@pytest.fixture
def other_checkout(small_run: Path, tmp_path: Path) -> Path:
    """The changed configuration of existing results, in a folder without Snakemake's records."""
    file = tmp_path / "changed.yaml"
    raw = yaml.safe_load((small_run / "config.yaml").read_text())
    file.write_text(yaml.safe_dump(merge(raw, {"ppo": {"kl_coefficient": 0.5}})))
    return file


def test_a_warning_where_snakemake_has_no_record(small_run: Path, other_checkout: Path) -> None:
    """Snakemake says `Nothing to be done`, as it cannot know better; where it has a record, no warning is needed."""
    stale = f"stale: {small_run}/results/runs/default/policy: ppo.kl_coefficient 0.01 -> 0.5"
    words = ("-n", "--configfile", str(other_checkout))
    forgotten = snakemake(*words, "--snakefile", str(ROOT / "Snakefile"), folder=other_checkout.parent)
    assert forgotten.returncode == 0, forgotten.stderr
    assert "Nothing to be done" in forgotten.stdout + forgotten.stderr
    assert stale in forgotten.stdout + forgotten.stderr
    known = snakemake(*words)
    assert jobs(known.stdout + known.stderr)["train_policy"] == 1
    assert "stale" not in known.stdout + known.stderr


def test_the_target_verify(small_run: Path, other_checkout: Path) -> None:
    for file, status in ((small_run / "config.yaml", 0), (other_checkout, 1)):
        words = ("verify", "--cores", "1", "--configfile", str(file))
        run = snakemake(*words, "--snakefile", str(ROOT / "Snakefile"), folder=other_checkout.parent)
        assert run.returncode == status, run.stdout + run.stderr
        assert ("stale: " in run.stdout) == bool(status)
        assert "whole: " in run.stdout
    log = small_run / "results" / "logs" / "verify.log"
    assert "ppo.kl_coefficient 0.01 -> 0.5" in log.read_text()
