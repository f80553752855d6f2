"""Every message in docs/troubleshooting.md is in the file that its comment names, ours or an installed package's."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
VARIABLE = "…"
ELSEWHERE = {"Python", "PyTorch", "SLURM"}  # whose messages are in no Python file
MESSAGE = re.compile(r"<!-- from: (.+?) -->\n```text\n(.+?)\n```", re.S)


def messages(page: str) -> list[tuple[str, str]]:
    """The source of each message, and its text."""
    return MESSAGE.findall(page)


def source(name: str) -> Path:
    """A file of this repository, or of an installed package."""
    if (ROOT / name).is_file():
        return ROOT / name
    package, _, below = name.partition("/")
    found = importlib.util.find_spec(package)
    assert found, f"{name} is not here"
    assert found.origin, f"{name} is not a package"
    return Path(found.origin).parent / below


def texts(path: Path) -> list[str]:
    """All texts of a Python or Snakemake file, in full, with `…` for what is filled in."""
    code = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(code)
    except SyntaxError:  # rules; adjacent texts are joined
        literal = r'f?"((?:[^"\\\n]|\\.)*)"'
        joined = re.finditer(rf"{literal}(?:\s+{literal})*", code)
        return [re.sub(r"\{[^{}]*\}", VARIABLE, "".join(re.findall(literal, each[0]))) for each in joined]
    return [_template(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)]


def _template(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(VARIABLE if isinstance(part, ast.FormattedValue) else _template(part) for part in node.values)
    return ""


def says(path: Path, message: str) -> bool:
    """Whether one text of the file has all words of the message in their order, whatever `…` stands for."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in re.split(f" *{VARIABLE} *", message)]
    pattern = re.compile(r"\s*.*?\s*".join(parts), re.S)
    return any(pattern.search(text) for text in texts(path))


@pytest.mark.parametrize(("where", "message"), messages(PAGE.read_text(encoding="utf-8")))
def test_a_message_is_in_the_code(where: str, message: str) -> None:
    if where not in ELSEWHERE:
        assert says(source(where), message), f"{where} no longer says: {message}"


def test_every_message_names_its_origin() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(messages(page)) == page.count("```text") == page.count("<!-- from: ")
    assert len(re.findall(r"^### ", page, re.M)) >= 20


def test_a_renamed_message_is_noticed(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text('log.warning("%s is late", x)\nraise E(f"the {a} of {b} is not "\n    f"valid; see {c}")\n')
    rules = tmp_path / "code.smk"
    rules.write_text('rule a:\n    input: "b"\n    run:\n        raise E(f"no run {a}; " "look")\n')
    assert says(code, "the … of … is not valid; see …")
    assert says(code, "of … is not valid")
    assert says(code, "… is late")
    assert says(rules, "no run …; look")
    assert not says(code, "the … of … was not valid; see …")
    assert not says(code, "is not valid … the")
    assert not says(code, "is late … valid")  # words from two texts
    assert not says(rules, "no run …; listen")
