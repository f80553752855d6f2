"""What the documents name exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_of_the_table_of_defects_exists() -> None:
    table = (ROOT / "docs" / "defects.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", table)
    assert set(re.findall(r"^\| (\d+) \|", table, re.M)) == {str(number) for number in range(1, 20)}
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text()]
    assert missing == []


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
