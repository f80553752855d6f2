"""What each rule asks SLURM for, made of the site's file; profile.yaml says which rule asks for which.

Snakemake evaluates the resources of a profile as Python. So all texts are handed over as Python literals, and come out
as they stand in the site's file.
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
    """The site's file: the one that SALMON_SITE names, or the one beside this.

    Raises:
        ValueError: where a name was not read as one: YAML takes `on` for a truth value; or a key has another name now.
    """
    file = Path(os.environ.get("SALMON_SITE") or HERE / "site.yaml")
    site: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    for old, new in RENAMED.items():
        if old in site:
            raise ValueError(f"{file}: {old} is now {new}: tokens, and not rows; the file that ships has all keys")
    for key in ("account", "cpu_partition", "gpu_partition", "qos", "constraint", "gres"):
        if site[key] is None:
            continue
        if not isinstance(site[key], str | int) or isinstance(site[key], bool):
            raise ValueError(f"{file}: {key}: {site[key]!r} is not a name; write it in quotes")
        site[key] = str(site[key])
    return site


SITE = read_site()


def literal(value: int | str) -> int | str:
    """A text as a Python literal without `$`, which Snakemake would take for an environment variable."""
    return repr(value).replace("$", r"\x24") if isinstance(value, str) else value


def literals(resources: Resources) -> Resources:
    """The same for each of some resources."""
    return {name: literal(value) for name, value in resources.items()}


def gpus(stage: str, nodes: int, **more: int | str) -> Resources:
    """A job on all GPUs of some nodes, one rank per GPU."""
    ranks = SITE["gpus_per_node"]
    tasks = max(ranks, 2)  # with mpi the executor takes no fewer; launch.sh starts as many as there are ranks
    return literals(
        {
            "slurm_partition": SITE["gpu_partition"],
            "mpi": "srun",  # the job's shell runs bare, and launch.sh calls srun
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
    """The same; one model on all GPUs of the job where the site says so."""
    return gpus(stage, nodes, tensor_parallel=str(SITE["tensor_parallel"]).lower(), **more)


def trainer(stage: str, nodes: int, deepspeed: str | None, **more: int | str) -> Resources:
    """A job on all GPUs of some nodes that is told in time to write a checkpoint.

    Args:
        stage: whose run time it has.
        nodes: how many.
        deepspeed: file of DeepSpeed's settings, from the working directory or, if there is none, from the checkout.
        more: resources.
    """
    file = "null"
    if deepspeed:
        file = str(Path(deepspeed).absolute() if Path(deepspeed).exists() else CHECKOUT / deepspeed)
    notice = f"--signal=TERM@{SITE['notice']}"
    return gpus(stage, nodes, deepspeed=file, slurm_extra=notice, **more)


def one_gpu(stage: str, **more: int | str) -> Resources:
    """A job of one process."""
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
    """The same; of a model that is larger than a GPU in a machine's memory, where it is slow."""
    if not SITE["tensor_parallel"]:
        return one_gpu(stage)
    cores = SITE["gpus_per_node"] * SITE["cpus_per_gpu"]
    return one_gpu(stage, device="cpu", cpus_per_task=cores, **whole_memory())


def whole_memory() -> Resources:
    """As much of a machine's memory as all of its GPUs have: for a whole model in it."""
    return {"mem_mb": SITE["gpus_per_node"] * SITE["mem_mb_per_gpu"]}


def log_folder() -> str:
    """Folder of SLURM's logs: `slurm` in that of the scripts' logs.

    A profile is read before the configuration, so that this looks for `pathvars` itself: in config.yaml, the files of
    --configfile and --config.
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
