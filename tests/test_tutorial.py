"""docs/tutorial.md: its Python runs as printed, and Snakemake accepts its command lines."""

import re
import shlex
from pathlib import Path

import polars as pl
import pytest

from tests import forks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
FILES = {name: text for text, name in re.findall(r"^echo '(.*)' > (\S+)$", PAGE, re.M)}
"""Files that the reader writes: name -> text."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def dry_runs() -> list[list[str]]:
    """Words of each line that calls Snakemake, in a block or in a sentence, as a dry run."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += re.findall(r"`(snakemake [^`]+)`", PAGE)
    words = [shlex.split(line, comments=True) for line in lines]
    found = [[word for word in line[1:] if word != "-n"] for line in words if line[:1] == ["snakemake"]]
    return [[*line, "-n"] for number, line in enumerate(found) if line not in found[:number]]


def test_its_python_runs(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one session, as the page says, with the results of another run in place of the demo's."""
    first, *others = blocks("python")
    assert others
    demo, here = 'Path("results/demo")', f"Path({str(small_run / 'results')!r})"
    assert first.count(demo) == 1
    session: dict[str, object] = {}
    with pl.Config():  # which the page changes
        exec(first.replace(demo, here), session)
        for block in others:
            exec(block, session)
            assert capsys.readouterr().out.strip(), block


def test_it_shows_what_each_block_prints() -> None:
    first, *others = re.findall(r"^```python\n.*?^```\n\n(```text)?", PAGE, re.M | re.S)
    assert (first, set(others)) == ("", {"```text"})


@pytest.mark.parametrize("words", dry_runs(), ids=shlex.join)
def test_snakemake_takes_its_command_lines(words: list[str], tmp_path: Path) -> None:
    """They run as dry runs, independently of what has been built."""
    assert set(FILES) == {"creative.json", "creative.yaml"}
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.replace("creative.json", str(tmp_path / "creative.json")))
    here = [str(tmp_path / word) if word in FILES else word for word in words]
    run = forks.snakemake([*here, "--nolock"])
    assert run.returncode == 0, run.stdout + run.stderr
