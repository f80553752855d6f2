"""A hook for MkDocs: it takes what documents link to outside docs/ into the site, below files/.

Documents are also read in the checkout, so their links name files where the checkout has them. In the site, Markdown
becomes a page, a folder its README or a list of its files, and any other text a page that shows it.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS, FILES = "docs/", "files/"
BINARY = {".gz", ".parquet", ".png", ".safetensors", ".svg"}  # these are copied as they are
# The target of a link, without its anchor; code is matched first, so that nothing in it counts as a link.
LINK = re.compile(r"^(`{3,}|~{3,}).*?^\1|`[^`\n]+`|(?<=\]\()(?P<target>[^\s()#:]+)(?=[\s)#])", re.M | re.S)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what the navigation names and pages link to, and what that links to."""
    wanted = [name.removeprefix(FILES) for name in _pages(config.nav) if name.startswith(FILES)]
    for file in files.documentation_pages():
        wanted += _targets(DOCS + file.src_uri, file.content_string)
    while wanted:
        target = wanted.pop()
        if files.get_file_from_path(_name(target)) is not None:
            continue
        if Path(target).suffix in BINARY:
            files.append(File.generated(config, _name(target), abs_src_path=str(ROOT / target)))
        else:
            content = _content(target)
            files.append(File.generated(config, _name(target), content=content))
            wanted += _targets(f"{target}/README.md" if (ROOT / target).is_dir() else target, content)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to the places in the site."""
    name = page.file.src_uri
    place = name.removeprefix(FILES) if name.startswith(FILES) else DOCS + name

    def link(found: re.Match[str]) -> str:
        target = _target(place, found)
        return found[0] if target is None else posixpath.relpath(_name(target), posixpath.dirname(name))

    return LINK.sub(link, markdown)


def _pages(nav: Any) -> Iterator[str]:
    """The pages of a part of the navigation."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _pages(part)


def _targets(place: str, text: str) -> Iterator[str]:
    """What a document at some place of the repository links to, outside docs/."""
    found = (_target(place, match) for match in LINK.finditer(text))
    return (target for target in found if target is not None and not target.startswith(DOCS))


def _target(place: str, found: re.Match[str]) -> str | None:
    """The file or folder of the repository that a link leads to; None if there is none, of which MkDocs warns."""
    if found["target"] is None:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(place), found["target"]))
    return target if not target.startswith("..") and (ROOT / target).exists() else None


def _name(target: str) -> str:
    """The name in the site of a file or folder of the repository."""
    if target.startswith(DOCS):
        return target.removeprefix(DOCS)
    if (ROOT / target).is_dir():
        return f"{FILES}{target}/README.md"
    return FILES + target if Path(target).suffix in {".md", *BINARY} else f"{FILES}{target}.md"


def _content(target: str) -> str:
    """The Markdown of a page that shows a file or folder of the repository."""
    path = ROOT / target
    if path.is_dir():
        if (path / "README.md").exists():
            return (path / "README.md").read_text(encoding="utf-8")
        names = sorted(child.name for child in path.iterdir() if child.is_file())
        return f"# {target}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    fence = "~" * 8
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {target}\n\n{fence}{path.suffix[1:]}\n{text}\n{fence}\n"
