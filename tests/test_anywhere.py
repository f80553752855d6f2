"""The workflow used from elsewhere: as a module, in another directory, from a read-only checkout."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from salmon import artifacts, shipped
from tests import forks
from tests.running import PATIENCE

ROOT = Path(__file__).parents[1]
RESULTS = 're sults/it\'s "$(touch x)"'
HOSTILE = {"results": RESULTS, "logs": "<results>/lo gs/$(touch y)", "benchmarks": "bench'marks"}
DATA = "prompts/rl.parquet"  # made by rules that take seconds
MODULE = """
configfile: "config/mine.yaml"
module salmon:
    snakefile: {snakefile}
    config: config
use rule * from salmon as salmon_*
"""
# The copy is mounted read-only, even for root; where mounting is not allowed, its modes make it read-only.
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workflow, in a folder whose name a shell could take for a command."""
    folder = tmp_path_factory.mktemp("anywhere") / "it's $(touch z) here"
    for name in ("rules", "workflow", "workflow_scripts", "demo", "prompts", "evaluation_tasks", "profiles", "envs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def snakemake(folder: Path, *arguments: Any, before: Sequence[str] = (), **environment: str) -> str:
    """What Snakemake says when called in a folder."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    if before:
        line = [*before, sys.executable, "-m", "snakemake", *map(str, arguments)]
        done = subprocess.run(line, cwd=folder, env=known, capture_output=True, text=True, timeout=PATIENCE)
    else:
        done = forks.snakemake(arguments, folder, known)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def locked(folder: Path) -> list[str]:
    """The beginning of a command line that cannot write in a folder."""
    mount = ["unshare", "--mount", "--map-root-user", "bash", "-c", READ_ONLY, str(folder)]
    if shutil.which("unshare") and subprocess.run([*mount, "true"], capture_output=True).returncode == 0:
        return mount
    subprocess.run(["chmod", "-R", "a-w", folder], check=True)
    return []


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, except what Python compiles where it is allowed to."""
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("how", ["module", "directory"])
def test_the_demo_from_a_checkout_that_cannot_be_written(checkout: Path, tmp_path: Path, how: str) -> None:
    """The data rules are run, the others listed; folders have names that a shell could take for a command."""
    unchanged, folder = contents(checkout), tmp_path / "else where"
    (folder / "config").mkdir(parents=True)
    own = {"pathvars": HOSTILE, "targets": ["rl_prompts", "report"]}
    demo = yaml.safe_load((ROOT / "demo" / "config.yaml").read_text()) | own
    (folder / "config" / "mine.yaml").write_text(yaml.safe_dump(demo))
    if how == "module":  # a module's configuration needs only what differs from the defaults
        (folder / "Snakefile").write_text(MODULE.format(snakefile=repr(str(checkout / "Snakefile"))))
        own, where, rule, target = ["--cores", "2"], folder, "salmon_", "salmon_policies"
    else:
        file = [checkout / "demo" / "config.yaml", "else where/config/mine.yaml"]
        own = ["-s", checkout / "Snakefile", "--directory", folder, "--profile", checkout / "profiles" / "demo"]
        own, where, rule, target = [*own, "--configfile", *file], tmp_path, "", "policies"
    before = locked(checkout)
    snakemake(where, f"{rule}report", *own, before=before)  # which needs the data
    assert (folder / RESULTS / DATA).exists()
    assert "Report created" in snakemake(
        where, f"{rule}report", *own, "--report", tmp_path / "it's.html", before=before
    )
    page = (tmp_path / "it's.html").read_text()
    assert "filename=funnel.svg;base64," in page
    assert "Rows from the raw data to the records" in page
    listed = snakemake(where, "-n", target, *own, before=before)
    assert f"{rule}train_policy " in listed
    assert f"{rule}clean_rl_prompts" not in listed
    assert contents(checkout) == unchanged
    assert sorted(path.name for path in folder.iterdir() if path.name not in (".snakemake", "Snakefile")) == [
        "bench'marks",
        "config",
        "re sults",
    ]
    # The model comes with the workflow, and no manifest says where that is.
    manifest = json.loads((folder / RESULTS / DATA).with_suffix(".manifest.json").read_text())
    assert manifest["settings"]["model"]["base"] == "demo/model"
    assert "demo/model" in manifest["inputs"]


def test_two_modules_of_one_workflow(tmp_path: Path) -> None:
    """Each has its own settings, and path variables from the configuration or from the statement."""
    snakefile = repr(str(ROOT / "Snakefile"))
    second = {"seed": 2, "pathvars": {"results": "two"}, "runs": {"mine": {"ppo": {"gamma": 0.5}}}}
    (tmp_path / "Snakefile").write_text(
        f"""
module one:
    snakefile: {snakefile}
    config: {{"seed": 1}}
    pathvars:
        results="one/",
        logs="all logs",
module two:
    snakefile: {snakefile}
    config: {second}
use rule * from one as one_*
use rule * from two as two_*
rule everything:
    default_target: True
    input: "one/prompts/oasst1.parquet", "two/runs/mine/policy"
"""
    )
    listed = snakemake(tmp_path, "-n", "-p")
    assert "> 'all logs/clean_prompts.log'" in listed
    assert "> two/logs/runs/mine/train_policy.log" in listed
    assert "one_train_policy" not in listed
    assert {int(seed) for seed in re.findall(r"clean_prompts.*\"seed\": ?(\d+)", listed)} == {2042, 1042}
    for name, results in (("one", "one"), ("two", "two")):
        assert f"missing: {results}/prompts/oasst1.parquet" in snakemake(tmp_path, "--cores", "1", f"{name}_verify")


def test_no_command_is_more_than_its_words(tmp_path: Path) -> None:
    """Every command of the DAG, run by bash with programs that only print their arguments."""
    line = ["-s", ROOT / "Snakefile", "--directory", tmp_path, "--configfile", ROOT / "demo" / "config.yaml"]
    line += ["--config", f"pathvars={json.dumps(HOSTILE)}", "targets=[evaluation,demo_policy]"]
    listed = snakemake(ROOT, "-n", "-p", *line)
    commands = re.findall(r"^Shell command: (.* > .*)$", listed, flags=re.MULTILINE)
    words = [shlex.split(command) for command in commands]
    assert f"{RESULTS}/models/pmp" in [line[line.index("--init") + 1] for line in words if "--init" in line]
    jobs = re.search(r"^total\s+(\d+)", listed, flags=re.MULTILINE)
    assert jobs is not None
    assert len(words) == int(jobs[1]) - 1  # `all` has no command
    folder = tmp_path / "empty"
    for command, line in zip(commands, words, strict=True):
        end = line.index(">")
        log = folder / line[end + 1]
        log.parent.mkdir(parents=True, exist_ok=True)
        printing = f'python() {{ printf \'%s\\0\' "$@"; }}; bash() {{ python "$@"; }}; {command}'
        subprocess.run(["bash", "-c", printing], cwd=folder, check=True)
        assert log.read_text().split("\0")[:-1] == line[1:end]
    assert [path.name for path in folder.iterdir()] == ["re sults"]


def test_a_file_of_the_working_directory_comes_first(tmp_path: Path) -> None:
    """The workflow's own file is used if there is none; a name found in neither place stays as it is."""
    named = {"template": "prompts/templates/judge.txt", "others": ["demo/model", "prompts/mine.txt", "mine.txt", 5]}
    found = shipped.find(named, tmp_path, ROOT)
    assert found == {
        "template": str(ROOT / "prompts/templates/judge.txt"),
        "others": [str(ROOT / "demo/model"), "prompts/mine.txt", "mine.txt", 5],
    }
    (tmp_path / "prompts" / "templates").mkdir(parents=True)
    (tmp_path / "prompts" / "templates" / "judge.txt").write_text("mine")
    assert shipped.find(named, tmp_path, ROOT)["template"] == named["template"]


def test_manifests_and_fingerprints_do_not_tell_where_the_checkout_is() -> None:
    def made_of(place: str) -> tuple[dict[str, Any], dict[str, str]]:
        file = f"{place}prompts/judge.txt"
        return {"judge": {"template": file}, "files": [file, "/prompts/judge.txt", f"{ROOT}/mine"]}, {file: "hash"}

    assert artifacts.fingerprint(*made_of(f"{ROOT}/")) == artifacts.fingerprint(*made_of(""))
    written = artifacts.manifest(*made_of(f"{ROOT}/"), {})
    assert (written["settings"], written["inputs"]) == made_of("")


def test_the_catalogs_way(tmp_path: Path, checkout: Path) -> None:
    """`snakedeploy` copies config/, and writes a module that Snakemake reads file by file from a host."""
    cache, user = tmp_path / "cache", tmp_path / "user"
    shutil.copytree(ROOT / "config", user / "config")
    source = shutil.copytree(checkout, tmp_path / "source")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "1"], ["tag", "v1"]):
        who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
        subprocess.run(["git", *who, *words], cwd=source, check=True)
    clones = cache / "snakemake" / "snakemake" / "source-cache" / "snakemake-git-cache"
    bare = ["git", "clone", "-q", "--bare", source, clones / "github.com" / "someone" / "salmon"]
    subprocess.run(bare, check=True)  # as Snakemake does when it is online
    hosted = 'github("someone/salmon", path="workflow/Snakefile", tag="v1")'
    (user / "Snakefile").write_text(MODULE.replace("mine", "config").format(snakefile=hosted))
    said = snakemake(user, "-n", "-p", "salmon_policy", XDG_CACHE_HOME=str(cache))
    script = Path(next(iter(re.findall(r"^Shell command: python (\S*)", said, flags=re.MULTILINE))))
    assert cache in script.parents
    assert script.exists()
    catalog = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())
    assert catalog["usage"]["software-stack-deployment"]["conda"] is True
    assert (ROOT / "config" / "README.md").exists()
