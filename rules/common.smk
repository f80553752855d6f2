"""Settings and helpers of all rules: the validated configuration, and how it reaches scripts and inputs."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import yaml
from pydantic_core import to_json
from snakemake.exceptions import WorkflowError
from snakemake.pathvars import Pathvars
from snakemake.sourcecache import HostingProviderFile
from snakemake.utils import update_config


def checkout(rules):
    """The folder of the workflow, which the working directory need not be: another workflow may use it as a module.

    Args:
        rules: where Snakemake reads this file. From a host (`github(…)`) it takes single files only, but jobs need
            scripts and library: the whole commit is checked out beside Snakemake's other sources.
    """
    if isinstance(rules, os.PathLike):
        return Path(rules).parent
    if not isinstance(rules, HostingProviderFile):
        raise WorkflowError(f"{rules} is no folder or hosted repository: clone SALMON, and name the clone's Snakefile")
    repository = rules.hosted_repo.repo_clone

    def git(*words):
        return subprocess.run(["git", *words], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    commit = git("-C", repository, "rev-parse", f"{rules.ref}^{{commit}}")
    folder = Path(workflow.sourcecache.cache_path) / "salmon" / commit
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as new:
            git("clone", "--quiet", "--no-checkout", repository, f"{new}/clone")
            git("-C", f"{new}/clone", "checkout", "--quiet", "--detach", commit)
            with suppress(OSError):  # another process was faster
                os.rename(f"{new}/clone", folder)
    return folder


CHECKOUT = checkout(workflow.current_basedir)
sys.path.insert(0, str(CHECKOUT / "workflow_scripts"))

from salmon import configuration, shipped, work
from salmon.config import PathVars, is_local
from salmon.configuration import TARGETS, load
from salmon.errors import UserError
from salmon.identity import model_files, tokenizer_files

if not CHECKOUT.samefile(shipped.CHECKOUT):
    raise WorkflowError(f"one workflow cannot use two checkouts of SALMON, {shipped.CHECKOUT} and {CHECKOUT}")

# Jobs find the Python that runs Snakemake, whether or not its environment was activated (conda goes before it).
os.environ.update(PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))

if workflow.modifier.is_main_snakefile():  # Snakemake calls the handlers of no other
    os.environ[work.KEEP_FINISHED] = "1"


configfile: str(CHECKOUT / "config.yaml")


def whole_configuration():
    """What the user has set, over the defaults, which a workflow that uses this one as a module need not repeat."""
    whole = {}
    if not workflow.config_settings.replace_workflow_config:
        whole = yaml.safe_load((CHECKOUT / "config.yaml").read_text(encoding="utf-8"))
    update_config(whole, config)
    # Path variables can also be set by the `module` statement; those of Snakemake itself are not what ours default to.
    unset = Pathvars.with_defaults()
    places = {name: workflow.pathvars.get(name) for name in PathVars.model_fields}
    places = {name: place for name, place in places.items() if workflow.pathvars.level[name] < unset.level[name]}
    if isinstance(whole.setdefault("pathvars", {}), dict):
        whole["pathvars"] = whole["pathvars"] | places
    return whole


try:
    RUNS = load(whole_configuration(), Path.cwd(), CHECKOUT)
    settings = RUNS["default"]
except UserError as error:
    raise WorkflowError(str(error)) from None

# `results/` is the same folder as `results`, and not another one that all would have to be built in.
workflow.pathvars.update(Pathvars.from_module(settings.pathvars.model_dump()))


def in_checkout(name):
    """A file of the checkout as it is written in a shell command."""
    return shlex.quote(name if CHECKOUT.samefile(Path.cwd()) else str(CHECKOUT / name))


SCRIPTS = in_checkout("workflow_scripts")
LAUNCH = f"bash {SCRIPTS}/launch.sh {{resources.nodes:q}} {{resources.ranks:q}} {{threads}} {SCRIPTS}"
DEMO = in_checkout("demo")


def local_files(paths):
    """Those of the paths, hub ids and nulls that are local: inputs of a rule."""
    return [path for path in paths if path and is_local(path)]


def source_files(sources):
    """Local files of data sources."""
    return local_files(path for source in sources.values() for path in source.paths)


def target_files(target):
    """The artifacts of a target."""
    return expand(f"<results>/{TARGETS[target].artifact}", run=RUNS)


def files_of(model, files=model_files):
    """What has to be there to read a model: of a local folder the files that matter, of a hub model nothing.

    The folder itself would not do: its time stays the same when a file in it is overwritten, and changes with a new
    README. Only a folder that a rule makes, or that is not there yet, is an input as a whole.

    Args:
        model: hub id or folder, or null.
        files: lists the files of a folder.
    """
    if not model or not Path(model).is_dir():
        return local_files([model])
    if model.startswith(f"{settings.pathvars.results}/") and Path(model, ".snakemake_timestamp").exists():
        return [model]
    # A link that is set to another folder, whose files may be old, gives other inputs.
    folder = Path(model).resolve() if Path(model).is_symlink() else Path(model)
    return [str(file) for file in files(folder)] or [model]


def initial_policy():
    """Files of the base model and the initial policy's adapter."""
    return files_of(settings.model.base) + files_of(settings.model.adapter)


def own_tokenizer():
    """The initial policy's adapter, unless it is a local one without a tokenizer or chat template of its own."""
    return configuration.tokenizer_of(settings).adapter


# What only the tokenizer's rules need to know of the model, so that a change of quantisation does not rerun them.
TOKENIZER = configuration.tokenizer_of(settings).model_dump_json(exclude_unset=True)


def tokenizer():
    """Files of the initial policy's tokenizer."""
    return files_of(settings.model.base, tokenizer_files) + files_of(own_tokenizer(), tokenizer_files)


# The model that judges, and its files.
JUDGE_MODEL = settings.judge.model or settings.model


def judge_model():
    """Files of the model that judges."""
    return files_of(JUDGE_MODEL.base) + files_of(JUDGE_MODEL.adapter)


def deciding(section, without=()):
    """A section as a parameter of a rule: what changes no result (`config.FREE`) is left out, and so reruns nothing."""
    return to_json({name: value for name, value in section.deciding().items() if name not in without}).decode()


def free(**sections):
    """What `deciding` leaves out, as options of a script. A resource, since a change of those reruns nothing either."""
    return " ".join(
        f"--{name}.{field}".replace("_", "-") + f" {shlex.quote(str(value))}"
        for name, section in sections.items()
        for field, value in section.free().items()
    )


# Artifacts that several runs share live in the folder of the first run that has the same settings: `<results>/` for
# the default run, `<results>/runs/NAME/` for another. `{home}` is that folder's part after `<results>/`.
HOME = "(runs/[^/]+/)?"


@cache
def home(run, artifact):
    """Home of a run's artifact."""
    return configuration.home(RUNS, run, artifact)


def path_of(artifact, run):
    """Where a run's artifact is, which it may share with others."""
    return f"<results>/{home(run, artifact)}{configuration.SHARED[artifact]}"


def at_home(artifact):
    """No input, but a refusal of the artifact under the name of a run that shares another one's."""

    def check(wildcards):
        run = run_name(wildcards)
        if wildcards.home != home(run, artifact):
            shared = path_of(artifact, run).replace("<results>", settings.pathvars.results)
            raise WorkflowError(f"the {artifact} of the run {run} is {shared}: its settings are the same; name that")
        return []

    return check


def shard_of(table, key, shards):
    """No input, but a refusal of a shard that the table does not have."""

    numbers = frozenset(map(str, range(shards)))

    def check(wildcards):
        if wildcards.shard not in numbers:
            raise WorkflowError(
                f"there is no shard {wildcards.shard} of the {table}: {key} is {shards}, and they are counted from 0"
            )
        return []

    return check


def run_settings(wildcards):
    """Settings of the run that a job belongs to."""
    return RUNS[run_name(wildcards)]


def run_name(wildcards):
    """Name of the run that a job belongs to."""
    name = wildcards.get("run") or wildcards.get("home", "")[len("runs/") : -1] or "default"
    if name not in RUNS:
        raise WorkflowError(f"there is no run {name} in the configuration; its runs are: {', '.join(RUNS)}")
    return name


def reward_data(wildcards):
    """Records that a run's reward model is trained on."""
    return path_of("reward_data", run_name(wildcards))


def pmp_model(wildcards):
    """Reward model that a run's reward model starts from, if any."""
    if run_settings(wildcards).reward_model.init == "base":
        return []
    return path_of("pmp", run_name(wildcards))


def reward_model_of(wildcards):
    """Reward model that a run's policy is trained against."""
    return path_of("reward_model", run_name(wildcards))


def rl_prompts_of(wildcards):
    """Prompts that a run's policy is trained on."""
    return path_of("rl_prompts", run_name(wildcards))


# What `make_demo_data` writes besides its manifest.
DEMO_DATA = ["oasst1.jsonl", "shp.jsonl", "hh_rlhf.jsonl", "openorca.parquet", "sharegpt.json", "sharegpt_90k.json"]
DEMO_DATA += ["dolly.jsonl", "math.jsonl", "held_out.jsonl"]


def demo_world(wildcards):
    """No input, but a refusal of other data: the oracles measure texts of the demo's world only."""
    made = {f"{settings.pathvars.results}/data/{file}" for file in DEMO_DATA}
    for name, source in settings.prompts.sources.items():
        if foreign := sorted(set(source.paths) - made):
            raise WorkflowError(
                "evaluation measures the demo's world with the demo's oracles, and "
                f"prompts.sources.{name}.path, {foreign[0]}, is not of it: there is nothing to measure these runs by"
            )
    return []
