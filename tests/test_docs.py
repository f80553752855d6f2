"""Everything that the documents name exists."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def test_every_test_of_the_table_of_defects_exists() -> None:
    table = (ROOT / "docs" / "defects.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", table)
    assert set(re.findall(r"^\| (\d+) \|", table, re.M)) == {str(number) for number in range(1, 20)}
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text()]
    assert missing == []


def is_there(name: str, config: dict[str, Any]) -> bool:
    """Whether a test or function (`file.py::name`), a key or a key with its value (`key: value`) exists."""
    file, is_code, function = name.partition("::")
    if is_code:
        places = [ROOT / folder / file for folder in ("tests", "workflow_scripts", "workflow_scripts/salmon")]
        code = "".join(place.read_text() for place in places if place.exists())
        return re.search(rf"^(?: *def |class )?{function}\b", code, re.M) is not None
    key, has_value, value = name.partition(": ")
    place: Any = config
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            return False
        place = place[part]
    return not has_value or place == yaml.safe_load(value)


def test_every_row_of_the_tables_of_fidelity_holds() -> None:
    """It has a verdict, a reason if that is not `equal`, and existing keys, values, tests and functions."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    lines = (ROOT / "docs" / "fidelity.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    rows = [row for row in rows if row[0] not in ("what", "---")]
    assert len(rows) > 100
    assert [row for row in rows if len(row) != 5] == []
    verdict = re.compile(r"equal|(deliberately different|not yet equal): .+")
    assert [row[0] for row in rows if not verdict.fullmatch(row[3])] == []
    named = [re.findall(r"`([^`]+)`", row[4]) for row in rows]
    assert all(named)
    assert [name for names in named for name in names if not is_there(name, config)] == []


def test_what_is_not_there_is_noticed() -> None:
    config = {"ppo": {"clip": 0.2, "stop": ["\n"], "weights": {"a": 1}, "limit": None}}
    there = ["ppo", "ppo.clip", "ppo.clip: 0.2", 'ppo.stop: ["\\n"]', "ppo.weights: {a: 1}", "ppo.limit: null"]
    there += ["test_docs.py::is_there", "ppo.py::train", "ppo.py::Rollout", "formats.py::PROMPT_FORMATS"]
    assert [name for name in there if not is_there(name, config)] == []
    gone = ["ppo.clipp", "ppo.clip: 0.3", "ppo.clip.x", 'ppo.stop: "\\n"', "ppo.limit: 0"]
    gone += ["ppo.py::trai", "gone.py::train", "test_docs.py::test_gone"]
    assert [name for name in gone if is_there(name, config)] == []


def test_every_file_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_conda_environments_have_the_pins_of_the_text_files() -> None:
    import sys

    sys.path.insert(0, str(ROOT / "envs"))
    from write_conda import KINDS, conda_file

    for kind, texts in KINDS.items():
        assert (ROOT / "envs" / f"{kind}.yaml").read_text() == conda_file(texts), f"run `make envs` ({kind})"
    pin = (ROOT / "envs" / "deepspeed.txt").read_text().splitlines()[-1]
    assert pin in (ROOT / "envs" / "model.post-deploy.sh").read_text()


def taken_for_files(text: str) -> list[str]:
    """Words that Snakemake's `--configfile`, which takes all up to the next option, would read as configurations."""
    lines = re.findall(r"^snakemake [^#\n]*", re.sub(r"\$\(.*?\)", "", text.replace("\\\n", " ")), re.M)
    words = [
        word
        for line in lines
        for given in re.findall(r"--configfile((?: +[^-\s]\S*)+)", line)
        for word in given.split()
    ]
    return [word for word in words if not word.endswith((".yaml", ".yml"))]


def test_no_command_of_the_documents_reads_a_target_as_a_configuration() -> None:
    assert taken_for_files(
        "snakemake --configfile a.yaml \\\n  b.yaml plan # c\nsnakemake --configfile d.yaml -n e"
    ) == ["plan"]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert {page.name: found for page in pages if (found := taken_for_files(page.read_text()))} == {}
