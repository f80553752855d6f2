"""The container image has the environment of `make install`; all places that name the version agree."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    words = [line.split(maxsplit=1) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]
    return [(name, " ".join(rest.split())) for name, rest in words]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    return found[max(index for index, (name, _) in enumerate(found) if name == "FROM") :]


def commands_of_make_install(folder: Path, *options: str) -> str:
    dry = ["make", "--dry-run", "--no-print-directory", "install", f"VENV={folder}/new", *options]
    # Without what the user, or a `make` that runs the tests, has set.
    clean = {name: os.environ[name] for name in os.environ.keys() - {"MAKEFLAGS", "MAKELEVEL", "PIP_ARGS", "PYTHON"}}
    found = subprocess.run(dry, cwd=folder, env=clean, check=True, capture_output=True, text=True)
    return found.stdout.replace(str(folder), "")


def test_make_install_installs_all_pins_but_those_of_the_engine() -> None:
    named = re.findall(r"-r (envs/\S+)", commands_of_make_install(ROOT))
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("envs/[!v]*.txt"))
    assert {path.name for path in ROOT.glob("envs/v*.txt")} == {"vllm.txt", "vllm-cpu.txt"}


def test_the_image_is_installed_by_make_install_from_the_files_that_are_copied(tmp_path: Path) -> None:
    before = []
    for name, rest in last_stage():
        if name == "RUN":
            assert re.findall(r"make install", rest) == ["make install"] * 2  # for the two variants
            break
        before.append((name, rest))
    copied = [rest.split()[1].removeprefix("/opt/salmon/") for name, rest in before if name == "COPY"]
    for path in copied:
        whole = ROOT / path
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, tmp_path / path)
    commands = commands_of_make_install(tmp_path)
    assert commands == commands_of_make_install(ROOT)
    assert [name for name in re.findall(r"-r (\S+)", commands) if not (tmp_path / name).is_file()] == []
    mirror = commands_of_make_install(tmp_path, "PIP_ARGS=--extra-index-url https://index")
    assert mirror.replace("--extra-index-url https://index", "") == commands_of_make_install(ROOT)


def test_the_dockerfile_repeats_no_pin() -> None:
    commands = [rest for name, rest in instructions() if name == "RUN"]
    assert commands
    assert [command for command in commands if re.search(r"==|pip install|pip3 |conda |uv ", command)] == []
    pins = [line for path in ROOT.glob("envs/*.txt") for line in path.read_text().splitlines() if "==" in line]
    assert [pin for pin in pins if pin in DOCKERFILE or pin.split("==")[1] in DOCKERFILE] == []


def test_only_the_repository_reaches_the_builder() -> None:
    """Neither models nor data of a checkout: the image is a clone of its last commit."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["*", "!.git"]
    from_context = [rest for name, rest in instructions() if name in ("COPY", "ADD") and "--from=" not in rest]
    assert [rest.split()[0] for rest in from_context] == [".git"]


def test_the_environment_is_where_commands_look_for_it() -> None:
    variables = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', " ".join(rest for name, rest in last_stage() if name == "ENV")))
    assert variables["PATH"].split(":")[0] == f"{variables['VENV']}/bin"
    arguments = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")
    variants = set(re.findall(r"(\w+)\) make install", DOCKERFILE))
    assert arguments["VARIANT"] in variants
    readme = (ROOT / "containers" / "README.md").read_text()
    assert set(re.findall(r"VARIANT=(\w+)", readme)) == variants
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", readme, re.M)) == set(arguments)


@pytest.fixture
def releases() -> list[tuple[str, str]]:
    """Version and date of the changelog's sections, latest first."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "[Unreleased]"
    found = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", heading) for heading in headings[1:]]
    assert all(found)
    return [(match[1], match[2]) for match in found if match]


def test_versions_agree(releases: list[tuple[str, str]]) -> None:
    version, date = releases[0]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == (version, date)


def test_releases_are_in_order(releases: list[tuple[str, str]]) -> None:
    assert releases == sorted(releases, key=lambda release: [int(part) for part in release[0].split(".")], reverse=True)
    assert [date for _, date in releases] == sorted((date for _, date in releases), reverse=True)
