"""The documentation as a site: it is built without a warning, everything is in it, and it needs no network."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_origin

import pytest
import yaml
from pydantic import BaseModel

from salmon.configuration import Config, section_in
from salmon.tables import TABLES
from tests.browser import check_quiet, chromium, needs_chromium

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def build(configuration: Path, site: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(configuration), "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # which is about MkDocs, and not about this site
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


class Loads(HTMLParser):
    """Addresses that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"link": "href", "object": "data"}
        if tag != "a":
            self.found += [value for name, value in attrs if name == names.get(tag, "src") and value]


def loaded(text: str) -> list[str]:
    parser = Loads()
    parser.feed(text)
    return parser.found


def pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages(part)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if (below := section_in(field.annotation)) is not None:
            entry = "NAME." if get_origin(field.annotation) is dict else ""
            yield from keys(below, f"{prefix}{name}.{entry}")


def test_every_document_is_in_the_navigation(site: Path) -> None:
    nav = re.search(r"^nav:.*?\Z", (ROOT / "mkdocs.yml").read_text(), re.M | re.S)
    assert nav
    named = list(pages(yaml.safe_load(nav[0])["nav"]))
    assert len(named) == len({*named})
    assert {page for page in named if not page.startswith("files/")} == {path.name for path in DOCS.glob("*.md")}
    assert [
        page for page in named if not (site / page.replace("README.md", "index.md")).with_suffix(".html").exists()
    ] == []


def test_every_key_and_every_table_is_in_the_reference(site: Path) -> None:
    page = (site / "configuration.html").read_text()
    assert [key for key in keys(Config) if f"<code>{key}</code>" not in page] == []
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    named = [f"{name}.{key}" for name, part in raw.items() if isinstance(part, dict) and name != "runs" for key in part]
    assert len(named) > 100
    assert [key for key in named if f"<code>{key}</code>" not in page] == []
    page = (site / "tables.html").read_text()
    assert [table.name for table in TABLES if f"<code>{table.files}</code>" not in page] == []
    columns = {column for table in TABLES for column in table.columns}
    assert [column for column in columns if f"<code>{column}</code>" not in page] == []


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    assert loaded('<script src="https://a.example/x.js"></script><a href="https://b.example">b</a>') == [
        "https://a.example/x.js"
    ]
    found = {path.relative_to(site): loaded(path.read_text()) for path in site.rglob("*.html")}
    assert len(found) > 30
    assert sum(map(len, found.values())) > 100
    elsewhere = re.compile(r"(?:\w+:)?//")
    assert [(path, each) for path, all_of in found.items() for each in all_of if elsewhere.match(each)] == []
    sheets = [
        path for path in site.rglob("*.css") if re.search(r"(?:url\(|@import)\W*(?:https?:)?//", path.read_text())
    ]
    assert sheets == []


def test_what_documents_link_to_outside_their_folder_is_in_the_site(site: Path) -> None:
    contributing = (site / "files" / "CONTRIBUTING.html").read_text()
    assert "Recipes" in contributing
    changelog = (site / "files" / "CHANGELOG.html").read_text()
    assert 'href="../cost.html"' in changelog  # where the checkout has docs/cost.md
    code = (site / "files" / "profiles" / "slurm" / "site.yaml.html").read_text()
    assert "gpu_partition" in code
    assert 'href="zero2.json.html"' in (site / "files" / "profiles" / "deepspeed" / "index.html").read_text()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[a](gone.md)", "gone.md"),
        ("[a](../gone.yaml)", "gone.yaml"),
        ("[a](slurm.md#gone)", "gone"),
        ("[a](../CONTRIBUTING.md#gone)", "gone"),
        ("[a](/docs/slurm.md)", "/docs/slurm.md"),
    ],
)
def test_a_broken_link_fails(tmp_path: Path, text: str, named: str) -> None:
    shutil.copytree(DOCS / "assets", tmp_path / "docs" / "assets")
    shutil.copy(DOCS / "hooks.py", tmp_path / "docs")
    settings = re.sub(r"^nav:.*\Z", "nav: [index.md, slurm.md]\n", (ROOT / "mkdocs.yml").read_text(), flags=re.M | re.S)
    (tmp_path / "mkdocs.yml").write_text(settings)
    (tmp_path / "CONTRIBUTING.md").write_text("# A page\n\n## Recipes\n")
    (tmp_path / "docs" / "slurm.md").write_text("# A page\n\n## There\n")
    index = tmp_path / "docs" / "index.md"
    index.write_text("# A page\n\n[a](slurm.md#there), [b](../CONTRIBUTING.md#recipes), `[c](gone.md)`\n")
    assert build(tmp_path / "mkdocs.yml", tmp_path / "site").returncode == 0
    index.write_text(f"# A page\n\n{text}\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert named in done.stderr


@needs_chromium
def test_a_site_that_is_opened_from_the_disk_has_its_search(site: Path) -> None:
    with chromium() as browser:
        browser.get((site / "index.html").as_uri())
        field = browser.find_element("css selector", "[data-md-component=search-query]")
        field.click()
        field.send_keys("negation_probability")
        found: list[str] = []
        end = time.monotonic() + 60
        while not found and time.monotonic() < end:
            time.sleep(0.1)
            links = browser.find_elements("css selector", ".md-search-result__link")
            found = [str(link.get_attribute("href")) for link in links]
        assert any(address.startswith((site / "configuration.html").as_uri()) for address in found)
        check_quiet(browser, site.as_uri(), "data:", "about:")
