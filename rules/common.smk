"""Settings and helpers of all rules: the validated configuration, and how it reaches scripts and inputs."""

import json
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(Path(workflow.basedir) / "workflow_scripts"))

from salmon.config import is_local
from salmon import configuration
from salmon.configuration import TARGETS, load
from salmon.errors import UserError
from salmon.identity import model_files, tokenizer_files, tokenizer_model

# Jobs find the Python that runs Snakemake, whether or not its environment was activated (conda goes before it).
os.environ.update(PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))

try:
    RUNS = load(config, Path.cwd())
    settings = RUNS["default"]
except UserError as error:
    raise WorkflowError(str(error)) from None


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
    return tokenizer_model(settings.model).adapter


# What only the tokenizer's rules need to know of the model, so that a change of quantisation does not rerun them.
TOKENIZER = tokenizer_model(settings.model).model_dump_json(exclude_unset=True)


def tokenizer():
    """Files of the initial policy's tokenizer."""
    return files_of(settings.model.base, tokenizer_files) + files_of(own_tokenizer(), tokenizer_files)


# The model that judges, and its files.
JUDGE_MODEL = settings.judge.model or settings.model


def judge_model():
    """Files of the model that judges."""
    return files_of(JUDGE_MODEL.base) + files_of(JUDGE_MODEL.adapter)


NO_ADAPTER = {"adapter": None, "adapter_revision": None}


def deciding(section, without=()):
    """A section as a parameter of a rule: what changes no result (`config.FREE`) is left out, and so reruns nothing."""
    return json.dumps({name: value for name, value in section.deciding().items() if name not in without})


def free(**sections):
    """What `deciding` leaves out, as options of a script. A resource, since a change of those reruns nothing either."""
    return " ".join(
        f"--{name}.{field} {shlex.quote(str(value))}".replace("_", "-", f"{name}.{field}".count("_"))
        for name, section in sections.items()
        for field, value in section.free().items()
    )


# Artifacts that several runs share live in the folder of the first run that has the same settings: `<results>/` for
# the default run, `<results>/runs/NAME/` for another. `{home}` is that folder's part after `<results>/`.
HOME = "(runs/[^/]+/)?"


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
    return f"<results>/{configuration.home(RUNS, run_name(wildcards), 'reward_data')}reward_data/principle_preferences.parquet"


def pmp_model(wildcards):
    """Reward model that a run's reward model starts from, if any."""
    if run_settings(wildcards).reward_model.init == "base":
        return []
    return f"<results>/{configuration.home(RUNS, run_name(wildcards), 'pmp')}models/pmp"


def reward_model_of(wildcards):
    """Reward model that a run's policy is trained against."""
    return f"<results>/{configuration.home(RUNS, run_name(wildcards), 'reward_model')}models/reward_model"


def rl_prompts_of(wildcards):
    """Prompts that a run's policy is trained on."""
    return f"<results>/{configuration.home(RUNS, run_name(wildcards), 'rl_prompts')}prompts/rl.parquet"
