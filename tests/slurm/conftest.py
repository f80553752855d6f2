"""A SLURM for these tests, a small version of the demo's configuration, and its results by the local profile."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.running import merge
from tests.slurm.cluster import Cluster, missing_programs, until

ROOT = Path(__file__).parents[2]

SITE = {
    "account": "test",
    "cpu_partition": "cpu",
    "gpu_partition": "gpu",
    "qos": None,
    "constraint": None,
    "gres": "gpu",
    "gpus_per_node": 2,
    "cpus_per_gpu": 2,
    "mem_mb_per_gpu": 4000,
    "policy_nodes": 2,
    "policy_deepspeed": "profiles/deepspeed/zero2.json",
    "reward_model_tokens_per_pass": 2048,
    "policy_tokens_per_pass": 512,
    "policy_tokens_per_forward_pass": 2048,
    "runtime": {"policy": "1h"},
}
"""What differs for this cluster; the rest is as in profiles/slurm/site.yaml."""

# One run of a few steps, which take seconds.
SMALL: dict[str, Any] = {
    "targets": ["policies"],
    "prompts": {"sources": {"oasst1": {"limit": 48}}},
    "sampling": {"shards": 2},
    "aggregation": {"passes": 2},
    "pmp_data": {"sources": {"shp": {"limit": 80}, "hh_rlhf": {"limit": 80}}},
    "pmp": {"eval_examples": 16, "batch_size": 16, "save_steps": 2},
    "reward_model": {"eval_examples": 16, "batch_size": 8, "save_steps": 2},
    "ppo": {
        "max_steps": 4,
        "rollout_batch_size": 16,
        "minibatch_size": 8,
        "response_length": 48,
        "save_steps": 2,
    },
    "runs": dict.fromkeys(("concise", "comprehensive", "methodical", "control")),
}


@dataclass
class Run:
    """A Snakemake process, and where it logs."""

    process: subprocess.Popen[bytes]
    log: Path

    def finish(self, seconds: float = 1200) -> None:
        """Wait for it to end, and require success."""
        assert self.process.wait(timeout=seconds) == 0, self.log.read_text()[-6000:]


@dataclass
class World:
    """A cluster, a configuration, and a folder of results."""

    cluster: Cluster
    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def site(self, name: str, **changes: Any) -> str:
        """A site file."""
        base = yaml.safe_load((ROOT / "profiles" / "slurm" / "site.yaml").read_text())
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merge(base, merge(SITE, changes))))
        return str(path)

    def command(self, profile: str, results: Path, *arguments: str, **config: Any) -> list[str]:
        """The command line of a run of the small configuration; on SLURM, with options that shorten the waiting."""
        file = self.folder / f"{results.name}.config.yaml"
        file.write_text(yaml.safe_dump(merge(SMALL | {"pathvars": {"results": str(results)}}, config)))
        line = [sys.executable, "-m", "snakemake", "--profile", f"profiles/{profile}", "--nolock", *arguments]
        if profile == "slurm":
            line += [
                "--slurm-init-seconds-before-status-checks",
                "3",
                "--max-jobs-per-timespan",
                "100/1s",
            ]
        return [*line, "--configfile", "demo/config.yaml", str(file)]

    @contextmanager
    def started(self, site: str, *arguments: str, results: Path | None = None, **config: Any) -> Iterator[Run]:
        """Start `snakemake --profile profiles/slurm`; if it still runs at the end of the block, it is killed."""
        log = self.folder / "snakemake.log"
        process = subprocess.Popen(
            self.command("slurm", results or self.results, *arguments, **config),
            cwd=ROOT,
            env=self.cluster.environment | {"SALMON_SITE": site, "SALMON_PROGRESS_SECONDS": "0"},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Run(process, log)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def run(self, site: str, *arguments: str, results: Path | None = None, **config: Any) -> None:
        """The same, run to its end."""
        with self.started(site, *arguments, results=results, **config) as run:
            run.finish()

    def local(self, results: Path, *arguments: str) -> Path:
        """Results by the local profile: one process per job, no DeepSpeed."""
        line = self.command("demo", results, *arguments)
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-6000:]
        return results

    def running(self, rule: str) -> str:
        """Wait until a job of a rule is running; return its number."""
        found: list[str] = []

        def look() -> bool:
            found[:] = [
                line.split()[0]
                for line in self.cluster.run("squeue", "-h", "-t", "RUNNING", "-o", "%i %k").splitlines()
                if line.split()[1].startswith(f"rule_{rule}")
            ]
            return bool(found)

        until(f"a job of {rule} runs", look, 600)
        return found[0]

    def attempts(self, log: Path) -> str:
        """A rule's log over all attempts: each overwrites the one before, which Snakemake printed if it failed."""
        return (self.folder / "snakemake.log").read_text() + log.read_text()

    def jobs(self, fields: str = "JobID,Comment%80,Partition,NodeList,NNodes,NTasks,AllocTRES%70,State,Elapsed") -> str:
        """Sacct's table of all jobs so far."""
        return self.cluster.run("sacct", "-X", "-D", "-n", "-P", "-S", "now-1days", f"--format={fields}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running SLURM; without its programs these tests fail, because a skip would say nothing."""
    missing = missing_programs()
    assert not missing, f"not installed: {missing}; see docs/slurm.md"
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM"))  # so that the cluster is stopped then, too
    # Not among pytest's folders, which munged finds too private.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as running:
        yield running


@pytest.fixture(scope="session")
def world(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(cluster, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def local(world: World) -> Path:
    """Results of the local profile: one process per job, no DeepSpeed."""
    return world.local(world.folder / "local")


@pytest.fixture(scope="session")
def whole(world: World) -> Path:
    """Results of the whole DAG on SLURM."""
    world.run(world.site("site"))
    return world.results
