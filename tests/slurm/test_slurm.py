"""The profile for SLURM, on a real one: the whole DAG, and what goes wrong on clusters."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.slurm.cluster import until
from tests.slurm.conftest import World

# Columns that differ in their last bits between one process and several.
TABLES: dict[str, list[str]] = {
    "prompts/oasst1": [],
    "responses/response0": [],
    "responses/response1": [],
    "preferences/preferences": ["s12", "s21"],
    "reward_data/pmp": [],
    "reward_data/principle_preferences": ["scores"],
    "prompts/rl": [],
}


ENGINE = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"

# Runs that last long enough for something to happen to them.
LONG = {"reward_model": {"epochs": 12.0, "save_steps": 5}}


@pytest.fixture(scope="module")
def undisturbed(world: World, whole: Path) -> dict[str, Path]:
    """A reward model and a policy of such runs, to which nothing happens."""
    home = whole / "runs"
    found = {"long": home / "peaceful_long" / "models" / "reward_model", "policy": home / "peaceful" / "policy"}
    runs = {"peaceful_long": LONG, "peaceful": {"ppo": {"max_steps": 24, "save_steps": 1000}}}
    world.run(world.site("site"), *map(str, found.values()), runs=runs)
    return found


def metrics(policy: Path) -> list[dict[str, float]]:
    """Metrics of every step."""
    return [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()]


def agree(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    """Compare every step of two policies' training."""
    for one, other in zip(found, expected, strict=True):
        for name in ("score", "kl_sequence", "response_tokens", "value_loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=1e-3), (one["step"], name)


def evaluation(model: Path) -> dict[str, Any]:
    """How a reward model did on its held-out records."""
    found: dict[str, Any] = json.loads((model / "metrics.json").read_text())["evaluation"]
    return found


def losses(model: Path) -> list[float]:
    """Loss of every step of a reward model's training."""
    steps = json.loads((model / "metrics.json").read_text())["training"]
    assert [entry["step"] for entry in steps] == list(range(1, len(steps) + 1))
    return [entry["loss"] for entry in steps]


def contains(file: Path, pattern: str) -> bool:
    """Whether a log has a line like this."""
    return file.exists() and re.search(pattern, file.read_text()) is not None


def states(world: World, rule: str) -> list[str]:
    """How each attempt of a rule's jobs ended, in order."""
    rows = (line.split("|") for line in world.jobs("Comment%80,State").splitlines())
    return [state.split()[0] for comment, state in rows if comment.startswith(f"rule_{rule}")]


def test_the_whole_dag(world: World, whole: Path, local: Path) -> None:
    """Data rules on the CPU partition, one node for reward models, two nodes for PPO with ZeRO-2."""
    print(f"\n{world.jobs()}")
    rows = [line.split("|") for line in world.jobs("Comment%80,Partition,NNodes,State").splitlines()]
    for comment, partition, nodes, state in rows:
        on_gpus = re.match("rule_(check|sample|judge|train)", comment)
        assert partition == ("gpu" if on_gpus else "cpu"), comment
        assert nodes == ("2" if "train_policy" in comment else "1"), comment
        assert state == "COMPLETED", comment
    for name, rounded in TABLES.items():
        found, expected = (pl.read_parquet(results / f"{name}.parquet") for results in (whole, local))
        assert found.drop(rounded).equals(expected.drop(rounded)), name
        for column in rounded:
            difference = (found[column].explode() - expected[column].explode()).abs().max()
            assert difference is not None
            assert difference < 1e-4, (name, column)
    for name in ("pmp", "reward_model"):
        one, other = (evaluation(results / "models" / name) for results in (whole, local))
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02), name
    # PPO in one process, against SLURM's own reward model: every step.
    copy = world.folder / "copy"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("runs"))
    one, other = (metrics(results / "runs" / "default" / "policy") for results in (whole, world.local(copy, "policy")))
    assert len(one) == 4
    agree(one, other, 1e-2)


def test_the_report_of_what_slurm_has_made(world: World, whole: Path) -> None:
    """Its rules are jobs on the CPU partition; the page itself is made where Snakemake runs."""
    page = whole / "report.html"
    world.run(world.site("site"), "report")
    world.run(world.site("site"), "report", "--report", str(page))
    assert states(world, "draw_training") == ["COMPLETED"]
    assert "filename=training.svg;base64," in page.read_text()


def test_zero3_gives_the_policy_of_zero2(world: World, whole: Path) -> None:
    """Two nodes x two ranks again, by naming only this artifact; the old one is set aside."""
    expected = metrics(whole / "runs" / "default" / "policy")
    (whole / "runs" / "default").rename(whole / "runs" / "zero2")
    world.run(world.site("zero3", policy_deepspeed="profiles/deepspeed/zero3.json"), "policy")
    found = metrics(whole / "runs" / "default" / "policy")
    log = (whole / "logs" / "runs" / "default" / "train_policy.log").read_text()
    assert "ZeRO-3 on 4 ranks" in log
    agree(found, expected, 1e-2)


def test_the_time_limit_in_ppo(world: World, whole: Path, undisturbed: dict[str, Path]) -> None:
    """On SLURM's notice, PPO writes a checkpoint; the next attempt resumes from there and repeats no step."""
    run = {"limited": {"ppo": {"max_steps": 24, "save_steps": 1000}}}
    policy = whole / "runs" / "limited" / "policy"
    log = whole / "logs" / "runs" / "limited" / "train_policy.log"
    with world.started(world.site("limited", notice=150), str(policy), runs=run) as snakemake:
        job = world.running("train_policy")
        until("step 2", lambda: contains(log, "INFO step 2/24"), 600)
        # Whatever the machine's speed: the limit comes in a minute or two, and the notice of it at once.
        elapsed = int(world.cluster.run("sacct", "-X", "-n", "-P", "-j", job, "--format=ElapsedRaw"))
        world.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={(elapsed + 75) // 60 + 1}")
        snakemake.finish()
    assert [line["step"] for line in metrics(policy)] == list(range(1, 25))
    said = world.attempts(log)
    stops = re.findall(r"stopped by SIGTERM after step (\d+)", said)
    assert stops
    assert set(stops) <= set(re.findall(r"resuming after step (\d+)", said))
    done = re.findall(r"INFO step (\d+)/24:", said)
    print(f"\ntime limit in PPO: stopped after {sorted(set(stops))}; {len(done) - 24} of 24 steps repeated")
    assert len(done) == 24
    agree(metrics(policy), metrics(undisturbed["policy"]), 1e-3)


def test_a_node_fails_in_reward_model_training(world: World, whole: Path, undisturbed: dict[str, Path]) -> None:
    """SLURM puts the job on another node, where it resumes from its last checkpoint. The reward model is the same."""
    model = whole / "runs" / "long" / "models" / "reward_model"
    log = whole / "logs" / "runs" / "long" / "train_reward_model.log"
    with world.started(world.site("site"), str(model), runs={"long": LONG}) as snakemake:
        job = world.running("train_reward_model")
        until("a checkpoint", lambda: list(model.parent.glob(".work/reward_model/checkpoint-*/whole")), 600)
        node = world.cluster.run("squeue", "-h", "-j", job, "-o", "%N")
        world.cluster.fail(node)
        first = log.read_text()  # the next attempt overwrites it
        try:
            until("the job runs elsewhere", lambda: contains(log, "resuming after step"), 600)
        finally:
            world.cluster.start(node)
        snakemake.finish()
    (resumed,) = (int(step) for step in re.findall(r"resuming after step (\d+)", world.attempts(log)))
    expected = losses(undisturbed["long"])
    done = [int(step) for step in re.findall(rf" (\d+)/{len(expected)} \[", first)]
    print(f"\nnode {node} failed in RM training after step {done[-1]}: {states(world, 'train_reward_model')}")
    print(f"resumed after step {resumed}; {done[-1] - resumed} of {len(expected)} steps repeated")
    assert done == list(range(1, len(done) + 1))
    assert 0 <= done[-1] - resumed <= LONG["reward_model"]["save_steps"]
    assert losses(model) == pytest.approx(expected, rel=1e-4)
    assert evaluation(model)["loss"] == pytest.approx(evaluation(undisturbed["long"])["loss"], rel=1e-4)


def test_preemption_and_a_killed_rank_in_ppo(world: World, whole: Path, undisturbed: dict[str, Path]) -> None:
    """On preemption, a checkpoint is written and no step is repeated; when a rank is killed, as the kernel does when
    memory runs out, the job ends at once, and the next attempt resumes from the last checkpoint."""
    run = {"disturbed": {"ppo": {"max_steps": 24, "save_steps": 4}}}
    policy = whole / "runs" / "disturbed" / "policy"
    log = whole / "logs" / "runs" / "disturbed" / "train_policy.log"
    before = len(states(world, "train_policy"))
    with world.started(world.site("site"), str(policy), runs=run) as snakemake:
        until("step 2", lambda: contains(log, "INFO step 2/24"), 600)
        urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--gres=gpu:8", "--mem=100"]
        other = world.cluster.run(*urgent, "--output=/dev/null", "--wrap=sleep 10")
        until("the job stops", lambda: contains(log, "stopped by SIGTERM after step"), 120)
        first = log.read_text()
        until("it resumes", lambda: contains(log, "resuming after step"), 600)
        assert world.cluster.run("sacct", "-X", "-n", "-P", "-j", other, "--format=State") == "COMPLETED"
        # Two steps or so after a checkpoint.
        until("a checkpoint and a step", lambda: contains(log, r"INFO step (9|13|17|21)/24"), 600)
        (rank,) = (
            process
            for process in world.cluster.processes(SLURM_JOB_ID=world.running("train_policy"), RANK=3)
            if b"train_policy.py" in (process / "cmdline").read_bytes()
        )
        os.kill(int(rank.name), signal.SIGKILL)
        snakemake.finish()
    assert [line["step"] for line in metrics(policy)] == list(range(1, 25))
    # Each line once: the first attempt's log may be in Snakemake's, too.
    said = "\n".join(dict.fromkeys((first + world.attempts(log)).splitlines()))
    stopped, resumed, steps = (
        [int(step) for step in re.findall(rf"\] \w+ {what} (\d+)", said)]
        for what in ("stopped by SIGTERM after step", "resuming after step", "step")
    )
    ends = states(world, "train_policy")[before:]
    print(f"\npreemption in PPO: stopped after {set(stopped)}, a rank killed: resumed after {resumed}; {ends}")
    print(f"{len(steps) - 24} of 24 steps repeated, all after the kill")
    assert resumed[0] == stopped[0]
    assert len(resumed) == 2
    assert resumed[1] % 4 == 0
    assert sorted(set(steps)) == list(range(1, 25))
    assert {step for step in steps if steps.count(step) > 1} <= set(range(resumed[1] + 1, resumed[1] + 4))
    assert ends[-1] == "COMPLETED"
    agree(metrics(policy), metrics(undisturbed["policy"]), 1e-3)


def test_want_of_memory(world: World, whole: Path) -> None:
    """Killed by SLURM, a job without GPUs is submitted again with more memory."""
    table = world.folder / "memory" / "reward_data" / "pmp.parquet"
    before = len(states(world, "clean_pmp_data"))
    world.run(
        world.site("site"), str(table), "--set-resources", "clean_pmp_data:mem_mb=150*attempt", results=table.parents[1]
    )
    ends = states(world, "clean_pmp_data")[before:]
    kills = re.findall(r"exceeded memory limit .*", (world.cluster.folder / "log" / "slurmd.cpu1.log").read_text())
    print(f"\nwant of memory: {ends}; {kills[:1]}")
    assert kills
    assert len(ends) > 1
    assert ends[-1] == "COMPLETED"
    assert table.read_bytes() == (whole / "reward_data" / "pmp.parquet").read_bytes()


def test_a_cancelled_shard_an_outage_of_accounting_and_a_killed_head(world: World, local: Path) -> None:
    """Sampling into a separate results folder: what was sampled is not sampled again."""
    results = world.folder / "faulty"
    site = world.site("small-batches", sampling_batch_size=1)  # many parts, between which there is time to cancel
    table = results / "responses" / "response0.parquet"
    shards = results / "responses" / "response0.shards"
    before = len(states(world, "sample_responses"))
    with world.started(site, str(table), results=results) as snakemake:
        job = world.running("sample_responses_wildcards__0_0")
        until("parts of the shard", lambda: list(shards.glob(".work/0.parquet/part-*.parquet")), 600)
        world.cluster.run("scancel", job)
        world.cluster.kill("slurmdbd")
        time.sleep(60)
        world.cluster.start("slurmdbd")
        snakemake.finish()
    # When the controller finds the database again, it passes on what it kept during the outage.
    until("accounting has caught up", lambda: len(states(world, "sample_responses")) == before + 3, 120)
    ends = states(world, "sample_responses")[before:]
    print(f"\nscancel of {job}, accounting gone for a minute: {ends}")
    assert sorted(ends) == ["CANCELLED", "COMPLETED", "COMPLETED"]
    # The second attempt found what the first had done; the other shard needed only one.
    logs = results / "logs" / "sample_responses"
    assert [contains(logs / f"response0.{shard}.log", "continuing from") for shard in (0, 1)] == [True, False]
    assert table.read_bytes() == (local / "responses" / "response0.parquet").read_bytes()

    other = results / "responses" / "response1.parquet"
    before += len(ends)
    with world.started(site, str(other), results=results) as snakemake:
        world.running("sample_responses")
        os.killpg(snakemake.process.pid, signal.SIGKILL)
    until("the jobs end", lambda: world.cluster.run("squeue", "-h") == "", 600)
    world.run(site, str(other), results=results)
    attempts = len(states(world, "sample_responses")) - before
    print(f"head killed and started again: {attempts} jobs for 2 shards")
    assert attempts == 2
    assert other.read_bytes() == (local / "responses" / "response1.parquet").read_bytes()


@pytest.mark.skipif(not ENGINE.exists(), reason="there is no vLLM here: make install-vllm")
def test_an_engine_samples_on_the_nodes(world: World, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampling shard, and PPO on two nodes, each with a separate server; nothing is left of the servers."""
    monkeypatch.delitem(world.cluster.environment, "CXX", raising=False)  # vLLM compiles for the CPU
    engine = f"--engine.python {ENGINE} --engine.max-rows 16"
    more = {"gpus_per_node": 1, "mem_mb_per_gpu": 16000, "sampling_engine": engine, "policy_engine": engine}
    runs: dict[str, Any] = {
        "engine": {"sampling": {"engine": "vllm"}},
        "rollouts": {"ppo": {"engine": "vllm", "max_steps": 3}},
    }
    shard = whole / "runs" / "engine" / "responses" / "response0.shards" / "0.parquet"
    policy = whole / "runs" / "rollouts" / "policy"
    world.run(world.site("engine", **more), str(shard), str(policy), runs=runs)
    found, expected = (
        pl.read_parquet(file) for file in (shard, whole / "responses" / "response0.shards" / "0.parquet")
    )
    assert found["prompt_id"].equals(expected["prompt_id"])
    assert not found["response"].equals(expected["response"])  # other random numbers
    assert found["response_tokens"].mean() == pytest.approx(expected["response_tokens"].mean(), rel=0.5)
    assert len(metrics(policy)) == 3
    for line in metrics(policy):
        assert line["engine_ratio"] == pytest.approx(1, abs=1e-3)
        assert line["engine_ratio_largest"] < 1.05
    log = (whole / "logs" / "runs" / "rollouts" / "train_policy.log").read_text()
    assert "ZeRO-2 on 2 ranks" in log
    until("the servers end", lambda: not server_processes(), 180)


def server_processes() -> list[str]:
    """Command lines of vLLM's servers and their guards."""
    lines = [Path(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
    found = []
    for file in lines:
        with contextlib.suppress(OSError):
            found.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if "salmon-vllm-" in line]
