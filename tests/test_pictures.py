"""The pictures of docs/how_it_works.md are what their script draws."""

import re
from pathlib import Path

import pytest

from docs import draw

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", draw.PICTURES)
def test_a_picture_is_what_its_script_draws(name: str) -> None:
    assert (draw.FOLDER / f"{name}.svg").read_bytes() == draw.svg(name), "run `make docs-pictures`"


def test_the_page_shows_every_picture() -> None:
    shown = re.findall(r"\]\(pictures/(\w+)\.svg\)", PAGE)
    assert sorted(shown) == sorted(draw.PICTURES) == sorted(path.stem for path in draw.FOLDER.glob("*.svg"))


def test_the_example_of_aggregation_is_decided_as_it_says() -> None:
    deciding = max(draw.EXAMPLE, key=lambda one: abs(one.shown))
    assert (deciding.name, deciding.negated) == ("Concise", True)
    assert deciding.shown > 0  # response0 wins
