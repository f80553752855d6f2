"""Settings and helpers for all rules: the validated configuration, and how it reaches scripts and inputs."""

import ast
import json
import os
import re
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
from snakemake.resources import Resource
from snakemake.sourcecache import HostingProviderFile
from snakemake.utils import update_config


def checkout(rules):
    """The folder of the workflow, which differs from the working directory if another workflow uses it as a module.

    Args:
        rules: where Snakemake reads this file from. From a host (`github(…)`) it fetches only single files, but jobs
            need scripts and library, so the whole commit is checked out next to Snakemake's other sources.
    """
    if isinstance(rules, os.PathLike):
        return Path(rules).parent
    if not isinstance(rules, HostingProviderFile):
        raise WorkflowError(f"{rules} is not a folder or hosted repository: clone SALMON and use the clone's Snakefile")
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

from salmon import configuration, plan, provenance, shipped, work
from salmon.config import PathVars, Section, TaskPrompt, is_local
from salmon.configuration import TARGETS, load
from salmon.errors import UserError
from salmon.identity import model_files, tokenizer_files
from salmon.plan import Plan

if not CHECKOUT.samefile(shipped.CHECKOUT):
    raise WorkflowError(f"one workflow cannot use two checkouts of SALMON: {shipped.CHECKOUT} and {CHECKOUT}")

# Jobs find the Python that runs Snakemake, even if its environment is not activated (a conda environment comes first).
os.environ.update(PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))

if workflow.modifier.is_main_snakefile():  # Snakemake calls only the main file's handlers
    os.environ[work.KEEP_FINISHED] = "1"


configfile: str(CHECKOUT / "config.yaml")


def whole_configuration():
    """The user's settings on top of the defaults, which a workflow that uses this one as a module need not repeat."""
    whole = {}
    if not workflow.config_settings.replace_workflow_config:
        whole = yaml.safe_load((CHECKOUT / "config.yaml").read_text(encoding="utf-8"))
    update_config(whole, config)
    # The `module` statement can also set path variables. Snakemake's own defaults are ignored: ours differ.
    unset = Pathvars.with_defaults()
    places = {name: workflow.pathvars.get(name) for name in PathVars.model_fields}
    places = {name: place for name, place in places.items() if workflow.pathvars.level[name] < unset.level[name]}
    if isinstance(whole.setdefault("pathvars", {}), dict):
        whole["pathvars"] = whole["pathvars"] | places
    return whole


try:
    PLAN = Plan(load(whole_configuration(), Path.cwd(), CHECKOUT))
    RUNS = PLAN.runs
    settings = RUNS["default"]
except UserError as error:
    raise WorkflowError(str(error)) from None

for name in ("train_sft", "train_pmp", "train_reward_model", "train_policy"):
    # Snakemake would silently ignore this resource.
    if "micro_batch_size" in workflow.resource_settings._parsed_overwrite_resources.get(name, {}):
        raise WorkflowError(
            f"{name}:micro_batch_size (of --set-resources, or of a profile) is now {name}:tokens_per_pass; set the "
            "tokens of a pass, including padding, instead of rows"
        )

# `results/` and `results` are the same folder, so changing one to the other must not rebuild everything.
workflow.pathvars.update(Pathvars.from_module(settings.pathvars.model_dump()))


def in_checkout(name):
    """A file of the checkout, quoted for a shell command."""
    return shlex.quote(name if CHECKOUT.samefile(Path.cwd()) else str(CHECKOUT / name))


SCRIPTS = in_checkout("workflow_scripts")
LAUNCH = f"bash {SCRIPTS}/launch.sh {{resources.nodes:q}} {{resources.ranks:q}} {{threads}} {SCRIPTS}"
DEMO = in_checkout("demo")


def local_files(paths):
    """The local paths among paths, hub ids and nulls, as inputs of a rule."""
    return [path for path in paths if path and is_local(path)]


def source_files(sources):
    """Local files of data sources."""
    return local_files(path for source in sources.values() for path in source.paths)


def target_files(target):
    """The artifacts of a target."""
    return PLAN.target_paths(target)


def files_of(model, files=model_files):
    """The input files of a model: the relevant files of a local folder, and none for a hub model.

    The folder itself cannot be the input: its time stays the same when a file in it is overwritten, and changes with a
    new README. Only a folder that a rule makes, or that does not exist yet, is an input as a whole.

    Args:
        model: hub id or folder, or null.
        files: function that lists the relevant files of a folder.
    """
    if not model or not Path(model).is_dir():
        return local_files([model])
    if model.startswith(f"{settings.pathvars.results}/") and Path(model, ".snakemake_timestamp").exists():
        return [model]
    # The link is resolved, so that pointing it to another folder with old files changes the inputs.
    folder = Path(model).resolve() if Path(model).is_symlink() else Path(model)
    return [str(file) for file in files(folder)] or [model]


def deciding(section, without=(), only=None):
    """A section as a parameter of a rule, without keys that change no result (`config.FREE`) and so rerun nothing."""
    chosen = {name: value for name, value in section.deciding().items() if name not in without}
    return to_json({name: value for name, value in chosen.items() if only is None or name in only}).decode()


def free(**sections):
    """The keys that `deciding` leaves out, as options of a script; used as a resource, whose changes rerun nothing."""
    return " ".join(
        f"--{name}.{field}".replace("_", "-") + f" {'null' if value is None else shlex.quote(str(value))}"
        for name, section in sections.items()
        for field, value in section.free().items()
    )


# Runs that agree in everything that decides an artifact share it. It is built once, in the folder of the first of them:
# `<results>/` for the default run, `<results>/runs/NAME/` for others. `{home}` is the part of it after `<results>/`.
HOME = "(runs/[^/]+/)?"


def run_name(wildcards):
    """Name of the run that a job belongs to."""
    name = wildcards.get("run") or wildcards.get("home", "")[len("runs/") : -1] or "default"
    if name not in RUNS:
        raise WorkflowError(f"there is no run {name} in the configuration; its runs are: {', '.join(RUNS)}")
    return name


def run_settings(wildcards):
    """Settings of the run that a job belongs to."""
    return RUNS[run_name(wildcards)]


def artifact(name):
    """Input: an artifact of the job's run, which may be in the folder of a run that shares it."""
    return lambda wildcards: f"<results>/{PLAN.home(run_name(wildcards), name)}{configuration.ARTIFACTS[name]}"


def in_results(path):
    """A path of the plan in the form used in rules."""
    return f"<results>{path.removeprefix(settings.pathvars.results)}"


def at_home(name):
    """An empty input that refuses the path of an artifact under a run that uses another run's artifact."""

    def check(wildcards):
        run, one = run_name(wildcards), name.format(**wildcards)
        if wildcards.home != PLAN.home(run, one):
            shared = PLAN.path(run, one)
            raise WorkflowError(f"the {one} of the run {run} is {shared}, which has the same settings; use that path")
        return []

    return check


def imported(name):
    """Constraint of `{home}`: the folders of runs that import an artifact."""
    folders = ["" if run == "default" else f"runs/{run}/" for run in RUNS if plan.is_imported(RUNS[run], name)]
    return f"(?:{'|'.join(map(re.escape, folders))})" if folders else "(?!)"


def made(name):
    """Constraint of `{home}`: all other folders, for which this workflow makes the artifact."""
    return f"(?!{imported(name)}{configuration.ARTIFACTS[name].split('/')[0]}/){HOME}"


def shard_of(table, key):
    """An empty input that refuses a shard that the table does not have."""
    section = key.split(".")[0]

    def check(wildcards):
        shards = getattr(run_settings(wildcards), section).shards
        if not (wildcards.shard == "0" or wildcards.shard[0] != "0" and int(wildcards.shard) < shards):
            raise WorkflowError(
                f"there is no shard {wildcards.shard} of the {table}: {key} is {shards}, and shards are counted from 0"
            )
        return []

    return check


def shards_of(table, section):
    """Input: all shards of a table."""
    return lambda wildcards: expand(
        f"<results>/{table}.shards/{{shard}}.parquet",
        shard=range(getattr(run_settings(wildcards), section).shards),
        **wildcards,
    )


def setting(section, without=(), only=None):
    """Parameter: a section of the job's run, or some of its keys, without keys that change no result."""

    @cache
    def of(run):
        return deciding(getattr(RUNS[run], section), without, only)

    return lambda wildcards: of(run_name(wildcards))


def free_settings(*sections):
    """Resource: the keys that `setting` leaves out of sections, as options of a script."""

    @cache
    def of(run):
        return free(**{section: getattr(RUNS[run], section) for section in sections})

    return lambda wildcards: of(run_name(wildcards))


def engine_base(section):
    """Input: the model that an engine samples from, if it is not the base model itself."""

    def find(wildcards):
        needed = configuration.needs_engine_base(run_settings(wildcards), section)
        return artifact("engine_base")(wildcards) if needed else []

    return find


def engine_base_option(wildcards, input):
    """Parameter: the input of `engine_base` as an option of a script."""
    return f"--engine-base {shlex.quote(input.engine_base)}" if input.engine_base else ""


@cache
def initial_policy(run):
    """Files of a run's base model and of the initial policy's adapter."""
    model = RUNS[run].model
    return files_of(model.base) + files_of(model.adapter)


@cache
def judge_model(run):
    """Files of the model that judges."""
    model = plan.judge_model(RUNS[run])
    return files_of(model.base) + files_of(model.adapter)


@cache
def judge_settings(run):
    """The model that judges, as a parameter."""
    return deciding(plan.judge_model(RUNS[run]))


@cache
def judge_free(run, shards=None):
    """The keys that `judge_settings` and the section `judge` leave out, as options; optionally with other shards."""
    judge = RUNS[run].judge
    judge = judge.model_copy(update={"model": None, "shards": shards or judge.shards})
    return free(model=plan.judge_model(RUNS[run]), judge=judge)


@cache
def base_model(run):
    """Files of a run's base model and of the initial policy's tokenizer, which may come with the adapter."""
    model = RUNS[run].model
    return files_of(model.base) + files_of(PLAN.tokenizer(run).adapter, tokenizer_files)


@cache
def tokenizer(run):
    """Files of the initial policy's tokenizer."""
    model = PLAN.tokenizer(run)
    return files_of(model.base, tokenizer_files) + files_of(model.adapter, tokenizer_files)


@cache
def tokenizer_settings(run):
    """The settings of the model that affect its tokenizer; other changes, such as quantisation, rerun nothing."""
    return PLAN.tokenizer(run).model_dump_json(exclude_unset=True)


def pmp_model(wildcards):
    """Input: the pre-trained model that a run's reward model starts from, if any."""
    return artifact("pmp")(wildcards) if run_settings(wildcards).reward_model.init == "pmp" else []


def hardware(name):
    """The resources of a rule that are numbers or words, from the profile or the rule; a module may lack the rule."""
    found = {}
    proxy = getattr(rules, name, None)
    for key, resource in proxy.rule.resources.items() if proxy else ():
        value = resource.raw if isinstance(resource, Resource) else resource
        if isinstance(value, str):
            with suppress(ValueError, SyntaxError):  # in a profile, values are Python expressions
                value = ast.literal_eval(value)
        if isinstance(value, str | int):
            found[key] = value
    return found


def options(**values):
    """Options of a command line, without those that are null."""
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", value)]
