"""The pages for beginners: their links, and the code that they show."""

import re
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["your_principles.md", "troubleshooting.md", "faq.md"])
def test_links_and_their_headings_are_there(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^):]+)\)", text)
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        target = (ROOT / "docs" / (file or name)).resolve()
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}, link


def test_pairs_for_dpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only pairs on which both orders agree, with the preferred response first."""
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results" / "demo"
    (results / "responses").mkdir(parents=True)
    (results / "preferences").mkdir()
    ids = ["a", "b", "c", "d"]
    for number in (0, 1):
        rows = [(each, f"ask {each}", "", f"{each}{number}", number) for each in ids]
        table = pl.DataFrame(rows, ["prompt_id", "instruction", "input", "response", "other"], orient="row")
        table.write_parquet(results / f"responses/response{number}.parquet")
    judged = [("c", "Concise", -1.0, -2.0), ("a", "Concise", 2.0, 1.0), ("b", "Concise", 1.0, -1.0)]
    judged += [("d", "Concise", 0.0, 1.0), ("b", "Ethical", 1.0, 1.0)]
    preferences = pl.DataFrame(judged, ["prompt_id", "dimension", "s12", "s21"], orient="row")
    preferences.write_parquet(results / "preferences/preferences.parquet")
    exec(compile(code, "faq.md", "exec"), {})
    made = pl.read_parquet("concise.parquet").sort("instruction")
    assert made.columns == ["instruction", "input", "chosen", "rejected"]
    assert made.rows() == [("ask a", "", "a0", "a1"), ("ask c", "", "c1", "c0")]
