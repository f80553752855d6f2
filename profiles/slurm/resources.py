"""SLURM resources for rules, built from the site file; profile.yaml says which rule requests which resources.

Snakemake evaluates the resources of a profile as Python. All strings are therefore passed as Python literals, which
evaluate to the strings in the site file.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
Resources = dict[str, int | str]
RENAMED = {
    "reward_model_micro_batch_size": "reward_model_tokens_per_pass, and evaluation_batch_size",
    "policy_micro_batch_size": "policy_tokens_per_pass, and policy_tokens_per_forward_pass",
}


def read_site() -> dict[str, Any]:
    """Read the site file: the one that SALMON_SITE names, or site.yaml in this folder.

    Raises:
        ValueError: if a name is not read as a string (YAML reads `on` as a truth value), or a key has been renamed.
    """
    file = Path(os.environ.get("SALMON_SITE") or HERE / "site.yaml")
    site: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    for old, new in RENAMED.items():
        if old in site:
            raise ValueError(f"{file}: {old} is now {new}; set tokens instead of rows, as in profiles/slurm/site.yaml")
    for key in ("account", "cpu_partition", "gpu_partition", "qos", "constraint", "gres"):
        if site[key] is None:
            continue
        if not isinstance(site[key], str | int) or isinstance(site[key], bool):
            raise ValueError(f"{file}: {key}: {site[key]!r} is not a name; write it in quotes")
        site[key] = str(site[key])
    return site


SITE = read_site()


def literal(value: int | str) -> int | str:
    """A string as a Python literal without `$`, which Snakemake would read as an environment variable."""
    return repr(value).replace("$", r"\x24") if isinstance(value, str) else value


def literals(resources: Resources) -> Resources:
    """Apply `literal` to each resource."""
    return {name: literal(value) for name, value in resources.items()}


def gpus(stage: str, nodes: int, **more: int | str) -> Resources:
    """A job on all GPUs of some nodes, one rank per GPU."""
    ranks = SITE["gpus_per_node"]
    tasks = max(ranks, 2)  # with mpi, the executor requires at least 2; launch.sh starts one task per rank
    return literals(
        {
            "slurm_partition": SITE["gpu_partition"],
            "mpi": "srun",  # the job's shell runs without srun, and launch.sh calls srun itself
            "nodes": nodes,
            "ranks": ranks,
            "tasks_per_node": tasks,
            "cpus_per_task": max(1, ranks * SITE["cpus_per_gpu"] // tasks),
            "gres": f"{SITE['gres']}:{ranks}",
            "mem_mb": ranks * SITE["mem_mb_per_gpu"],
            "runtime": SITE["runtime"][stage],
            **{name: SITE[name] for name in ("qos", "constraint") if SITE[name]},
            **more,
        }
    )


def parallel(stage: str, nodes: int, **more: int | str) -> Resources:
    """The same, with one model on all GPUs of the job if the site file sets tensor_parallel."""
    return gpus(stage, nodes, tensor_parallel=str(SITE["tensor_parallel"]).lower(), **more)


def trainer(stage: str, nodes: int, deepspeed: str | None, **more: int | str) -> Resources:
    """A job on all GPUs of some nodes that gets a signal to save a checkpoint before its time limit.

    Args:
        stage: stage whose run time is used.
        nodes: number of nodes.
        deepspeed: DeepSpeed's configuration file, in the working directory or else in the checkout.
        more: further resources.
    """
    file = "null"
    if deepspeed:
        file = str(Path(deepspeed).absolute() if Path(deepspeed).exists() else CHECKOUT / deepspeed)
    notice = f"--signal=TERM@{SITE['notice']}"
    return gpus(stage, nodes, deepspeed=file, slurm_extra=notice, **more)


def one_gpu(stage: str, **more: int | str) -> Resources:
    """A job with one process on one GPU."""
    return literals(
        {
            "slurm_partition": SITE["gpu_partition"],
            "cpus_per_task": SITE["cpus_per_gpu"],
            "gres": f"{SITE['gres']}:1",
            "mem_mb": SITE["mem_mb_per_gpu"],
            "runtime": SITE["runtime"][stage],
            **{name: SITE[name] for name in ("qos", "constraint") if SITE[name]},
            **more,
        }
    )


def check(stage: str) -> Resources:
    """The same; a model larger than a GPU is checked in a machine's memory, which is slow."""
    if not SITE["tensor_parallel"]:
        return one_gpu(stage)
    cores = SITE["gpus_per_node"] * SITE["cpus_per_gpu"]
    return one_gpu(stage, device="cpu", cpus_per_task=cores, **whole_memory())


def whole_memory() -> Resources:
    """The memory of a machine that all of its GPUs together would get, to hold a whole model."""
    return {"mem_mb": SITE["gpus_per_node"] * SITE["mem_mb_per_gpu"]}


def log_folder() -> str:
    """Folder of SLURM's logs: `slurm` in the folder of the scripts' logs.

    Snakemake reads a profile before the configuration, so this function reads `pathvars` itself from config.yaml, the
    files of --configfile, and --config.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--configfile", "--configfiles", nargs="+", default=[])
    parser.add_argument("--config", "-C", nargs="*", default=[])
    parser.add_argument("--directory", "-d", default="")
    line, _ = parser.parse_known_args()
    configs = [
        yaml.safe_load(Path(file).read_text(encoding="utf-8")) for file in (CHECKOUT / "config.yaml", *line.configfile)
    ]
    configs += [{name: yaml.safe_load(value)} for name, _, value in (entry.partition("=") for entry in line.config)]
    places = {"results": "results", "logs": "<results>/logs"}
    for config in configs:
        places |= (config or {}).get("pathvars") or {}
    logs = Path(places["logs"].replace("<results>", places["results"]))
    return str(Path(line.directory).absolute() / logs / "slurm")
