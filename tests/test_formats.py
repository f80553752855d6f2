"""A source format is one entry: a schema and a function, neither of which can be forgotten."""

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from typing_extensions import TypedDict, is_typeddict

from salmon import formats, prompts
from salmon.config import PairSource, Prompts, PromptSource
from salmon.formats import PAIR_FORMATS, PROMPT_FORMATS, Comparison, Prompt, Skipped


class ChatRow(TypedDict):
    """A made-up format."""

    turns: list[str]


def first_turn(row: ChatRow) -> Prompt | Skipped:
    return Prompt(row["turns"][0]) if row["turns"] else Skipped("no turn")


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROMPT_FORMATS, "chat", None)
    del PROMPT_FORMATS["chat"]
    formats.prompts_from("chat")(first_turn)


@pytest.mark.usefixtures("chat")
def test_one_entry_is_all_that_a_format_needs(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    rows: list[dict[str, Any]] = [{"turns": ["Why?", "So."], "more": 1}, {"turns": []}, {"turns": ["How?"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Prompts.model_validate({"sources": {"it": {"format": "chat", "path": str(file)}}})
    table, counts = prompts.collect_prompts(settings)
    assert table["instruction"].to_list() == ["Why?", "How?"]
    assert counts == {"it: rows": 3, "it: no turn": 1, "it: kept": 2}


def test_half_an_entry_is_refused() -> None:
    def without_a_schema(row: Any) -> Prompt:
        return Prompt(row["turns"])

    for register in (formats.prompts_from, formats.comparisons_from):
        with pytest.raises(TypeError, match="annotate its parameter `row`"):
            register("half")(without_a_schema)  # type: ignore[operator]
    assert "half" not in {**PROMPT_FORMATS, **PAIR_FORMATS}
    with pytest.raises(TypeError, match="dolly is registered twice"):
        formats.prompts_from("dolly")(first_turn)


def test_the_configuration_takes_what_is_registered_and_no_other() -> None:
    for name in PROMPT_FORMATS:
        assert PromptSource(format=name, path="a/b").format == name
    for name in PAIR_FORMATS:
        assert PairSource(format=name, path="a/b").format == name
    with pytest.raises(ValueError, match="must be one of 'shp'"):
        PairSource(format="dolly", path="a/b")
    with pytest.raises(ValueError, match="must be one of 'oasst1'"):
        PromptSource(format="shp", path="a/b")


def test_rows_of_the_schemas_are_what_the_functions_take() -> None:
    """Each function accepts a row with only the columns that its schema requires, and a row with all."""
    for name, entry in {**PROMPT_FORMATS, **PAIR_FORMATS}.items():
        assert entry.row.__required_keys__, name
    for columns in ("__required_keys__", "__annotations__"):
        for prompt_format in PROMPT_FORMATS.values():
            list(prompt_format.extract([("here", sample(prompt_format.row, columns))], formats.Counter()))
        for pair_format in PAIR_FORMATS.values():
            assert isinstance(pair_format.compare(sample(pair_format.row, columns)), Comparison | Skipped)


def sample(kind: Any, columns: str) -> Any:
    """A value of a type; a row has these of its columns."""
    if is_typeddict(kind):
        types = get_type_hints(kind)
        return {name: sample(types[name], columns) for name in getattr(kind, columns)}
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    if get_origin(kind) is list:
        return [sample(get_args(kind)[0], columns)] * 2
    if get_origin(kind) is dict:
        return {"text": sample(get_args(kind)[1], columns)}
    if members := get_args(kind):  # a union
        return sample(members[0], columns)
    return {str: "text", float: 3.0, int: 1, bool: True}[kind]
