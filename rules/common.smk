"""Settings and helpers of all rules: the validated configuration, and how it reaches scripts and inputs."""

import json
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(Path(workflow.basedir) / "workflow_scripts"))

from salmon.config import is_local, load
from salmon.errors import UserError

# Jobs find the Python that runs Snakemake, whether or not its environment was activated (conda goes before it).
os.environ.update(PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))

try:
    settings = load(config, Path.cwd())
except UserError as error:
    raise WorkflowError(str(error)) from None

# What only the tokenizer's rules need to know of the model, so that a change of quantisation does not rerun them.
TOKENIZER = settings.model.model_dump_json(include={"base", "revision", "trust_remote_code"})


def local_files(paths):
    """Those of the paths, hub ids and nulls that are local: inputs of a rule."""
    return [path for path in paths if path and is_local(path)]


def source_files(sources):
    """Local files of data sources."""
    paths = [source.path for source in sources.values()]
    return local_files(path for one in paths for path in ([one] if isinstance(one, str) else one))


def initial_policy():
    """Local folders of the base model and the initial policy's adapter."""
    return local_files([settings.model.base, settings.model.adapter])


def policy_template():
    """The policy's template file, unless the tokenizer's own is used."""
    template = settings.policy_prompt.template
    return [] if template == "chat" else [template]
