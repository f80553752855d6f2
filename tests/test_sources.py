"""Reading public data sets: the rows of every kind of file, and the message for every kind of bad one."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from salmon import sources
from salmon.config import PairSource, PromptSource
from salmon.errors import UserError
from salmon.formats import PAIR_FORMATS, PROMPT_FORMATS

SECRET = "tulip-7319"  # stands for the texts of a data set, which no message may quote
ROWS = [{"problem": f"{SECRET} {number}"} for number in range(2500)]


def read(
    path: Path | str | list[str], kind: str = "math", counts: Counter[str] | None = None, **more: Any
) -> list[tuple[str, Any]]:
    found = path if isinstance(path, list) else str(path)
    source_type, formats = (PromptSource, PROMPT_FORMATS) if kind in PROMPT_FORMATS else (PairSource, PAIR_FORMATS)
    source = source_type(format=kind, path=found, **more)
    return list(sources.read_source(source, formats[kind].row, Counter() if counts is None else counts))


def fails(path: Path | str | list[str], kind: str = "math", **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, kind, **more)
    message = str(caught.value)
    assert SECRET not in message
    return message


def json_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows to the kind of file that the name says."""
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        data = json_lines(rows) if ".jsonl" in path.suffixes else json.dumps(rows, ensure_ascii=False).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    found = read(write(tmp_path / name, ROWS))
    assert [row for _, row in found] == ROWS
    unit = "line" if "jsonl" in name else "row"
    assert found[1999][0] == f"{tmp_path / name}, {unit} 2000"


def test_other_columns_are_left_out(tmp_path: Path) -> None:
    rows = [{"problem": "p", "solution": "s"}]
    for name in ("a.parquet", "a.jsonl"):
        assert read(write(tmp_path / name, rows))[0][1] == {"problem": "p"}


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\u000bfour\r five"
    path = write(tmp_path / "a.jsonl", [{"problem": text}] * 2)
    assert [row["problem"] for _, row in read(path)] == [text, text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path, name: str) -> None:
    row = rb'{"problem": "\ud83d\ude00 \uD83D end"}'
    (tmp_path / name).write_bytes(b"[" + row + b"]" if name == "a.json" else row)
    assert read(tmp_path / name)[0][1] == {"problem": "\U0001f600 ? end"}


def test_blank_lines_windows_line_ends_and_byte_order_marks_are_no_trouble(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        plain = write(tmp_path / name, ROWS[:2]).read_bytes()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n\r\n"))
        assert [row for _, row in read(tmp_path / name)] == ROWS[:2]


def test_a_folder_is_read_by_name_and_a_list_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.parquet", "deep/c.json"):
        write(tmp_path / name, [{"problem": name}])
    write(tmp_path / ".hidden.jsonl", [{"problem": "hidden"}])
    (tmp_path / "a.manifest.json").write_text("{}")
    (tmp_path / "README.md").write_text("no data")
    assert [row["problem"] for _, row in read(tmp_path)] == ["a.parquet", "b.jsonl", "deep/c.json"]
    paths = [str(tmp_path / "b.jsonl"), str(tmp_path / "a.parquet")]
    assert [row["problem"] for _, row in read(paths)] == ["b.jsonl", "a.parquet"]


def test_inputs_are_described_by_hash_or_revision(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", ROWS[:1]))
    described = sources.identify_sources(
        {
            "one": PromptSource(format="math", path=path),
            "two": PromptSource(format="math", path=["owner/a", "owner/b"], revision="abc"),
        }
    )
    assert described["owner/a"] == described["owner/b"] == "abc"
    assert len(described[path]) == 64


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"problem": "tulip-7319"', "broken JSON"),
        (b'{"problem": "tulip-7319 \xff"}', "not UTF-8"),
        (b'{"solution": "tulip-7319"}', "column problem is missing"),
        (b'{"problem": ["tulip-7319"]}', "column problem: input should be a valid string"),
        (b'{"problem": 7319}', "column problem"),
        (b'["tulip-7319"]', "not an object with named columns"),
        (b'"tulip-7319"', "not an object with named columns"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"problem": ' + b"7" * 5000 + b"}", "broken JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(ROWS[:2]) + line + b"\n" + json_lines(ROWS[:1]))
    message = fails(path)
    assert message.startswith(f"{path}, line 3: ")
    assert said in message


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_a_file_cut_in_half_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 7])
    message = fails(path)
    assert str(path) in message
    assert "cut off" in message


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_file_of_something_else_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x93\x00tulip-7319\xff" * 50)
    assert str(tmp_path / name) in fails(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_file_without_rows_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pl.DataFrame(schema={"problem": pl.String}).write_parquet(path)
    else:
        write(path, [])
    good = write(tmp_path / "good.jsonl", ROWS[:1])
    assert f"{path} holds no rows" in fails([str(good), str(path)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_file_of_no_bytes_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert f"{tmp_path / name} holds no rows" in fails(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
def test_all_bad_rows_are_listed_in_one_pass(tmp_path: Path, name: str) -> None:
    mixed: list[dict[str, Any]] = [
        {"history": SECRET, "human_ref_A": SECRET, "human_ref_B": SECRET, "labels": number % 5, "score_ratio": 3.0}
        for number in range(100)
    ]
    path = write(tmp_path / name, mixed)
    good = write(tmp_path / "good.jsonl", [row for row in mixed if row["labels"] < 2])
    message = fails([str(path), str(good)], "shp")
    *told, more, last = message.split("\n")
    unit = "line" if "jsonl" in name else "row"
    wanted = [number + 1 for number in range(100) if number % 5 > 1]
    assert [line.partition(": column labels: ")[0] for line in told] == [
        f"{path}, {unit} {number}" for number in wanted[:20]
    ]
    assert more == "... and 40 more"
    assert "60 bad rows, but max_bad_rows of the source allows 0; format shp needs" in last
    assert "allows 59" in fails([str(path), str(good)], "shp", max_bad_rows=59)
    counts: Counter[str] = Counter()
    found = read([str(path), str(good)], "shp", counts, max_bad_rows=60)
    assert [row["labels"] for _, row in found] == [row["labels"] for row in mixed if row["labels"] < 2] * 2
    assert counts == {"rows": 140, "bad rows": 60}


def test_broken_lines_are_bad_rows_like_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"problem": "tulip-7319"\n{"problem": "\xff"}\n{"problem": 1}\n' + json_lines(ROWS[:2]))
    message = fails(path)
    assert [line.partition(": ")[0] for line in message.split("\n")[:3]] == [f"{path}, line {n}" for n in (1, 2, 3)]
    counts: Counter[str] = Counter()
    assert [row for _, row in read(path, counts=counts, max_bad_rows=3)] == ROWS[:2]
    assert counts == {"rows": 5, "bad rows": 3}


def test_a_folder_of_objects_one_a_file(tmp_path: Path) -> None:
    """MATH as published: train/algebra/1.json and so on."""
    for number, subject in enumerate(["algebra", "algebra", "geometry"]):
        path = tmp_path / "train" / subject / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"problem": f"{SECRET} {number}", "level": "Level 1", "type": subject}, indent=1))
    assert [row for _, row in read(tmp_path / "train")] == [{"problem": f"{SECRET} {number}"} for number in range(3)]
    path.write_text(json.dumps({"solution": SECRET}))
    assert fails(tmp_path / "train").startswith(f"{path}, row 1: column problem is missing")
    path.write_text('{"problem": "tulip-7319')
    assert f"{path}: broken JSON" in fails(tmp_path / "train")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_of_any_size_are_read_and_scores_are_finite(tmp_path: Path, name: str) -> None:
    def line(ratio: str) -> Path:
        row = f'{{"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": {ratio}, "id": '
        text = row + f"{2**64}, " + '"x": -1e400}'
        (tmp_path / name).write_text(f"[{text}]" if name == "a.json" else text)
        return tmp_path / name

    for ratio in ("3", "2.1", "1e30", f"{10**30}"):
        [(_, row)] = read(line(ratio), "shp")
        assert row["score_ratio"] == float(ratio)
    for ratio in (f"{10**400}", "null", '"3"', *(["NaN", "-Infinity", "1e400"] if name == "a.jsonl" else ["-1e400"])):
        assert "column score_ratio: " in fails(line(ratio), "shp")
    assert "broken JSON" in fails(line("7" * 5000), "shp")


def test_a_json_list_is_told_from_json_lines(tmp_path: Path) -> None:
    """The authors' JSON Lines files end with `.json`."""
    path = tmp_path / "a.json"
    path.write_bytes(json_lines(ROWS[:2]))
    assert read(path) == [(f"{path}, line {n + 1}", ROWS[n]) for n in range(2)]
    path.write_bytes(json.dumps(ROWS[0], indent=1).encode())
    assert read(path) == [(f"{path}, row 1", ROWS[0])]
    path.write_bytes(json.dumps(ROWS[0], indent=1).encode() * 2)
    assert "ends with .jsonl" in fails(path)
    path.write_text('"tulip-7319"')
    assert "neither a JSON list nor an object" in fails(path)


def test_bad_rows_of_a_json_list_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps([*ROWS[:4], {"answer": SECRET}]).encode())
    assert fails(path).startswith(f"{path}, row 5: column problem is missing")
    path.write_bytes(json.dumps(ROWS[:4]).encode().replace(b"}]", b', "x": "tulip-7319 \xff"}]'))
    assert "not UTF-8, after row 3" in fails(path)


def test_a_parquet_file_without_a_column_is_named_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"solution": SECRET}])
    assert f"{path} has no column problem" in fails(path)


def test_a_parquet_column_of_another_type_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"problem": "fine"}, {"problem": None}])
    assert [row["problem"] for _, row in read(path)] == ["fine", None]
    path = write(tmp_path / "b.parquet", [{"problem": 1}])
    assert fails(path).startswith(f"{path}, row 1: column problem: ")


def test_nested_columns_are_checked(tmp_path: Path) -> None:
    turn = {"from": "human", "value": SECRET}
    path = write(tmp_path / "a.jsonl", [{"conversations": [turn]}, {"conversations": [turn, {"from": "gpt"}]}])
    assert fails(path, "sharegpt").startswith(f"{path}, line 2: column conversations.1.value is missing")


@pytest.mark.parametrize("label", [2, -1, "1", None])
def test_a_label_is_0_or_1(tmp_path: Path, label: Any) -> None:
    row = {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 3}
    assert len(read(write(tmp_path / "good.jsonl", [row]), "shp")) == 1
    assert "line 1: column labels" in fails(write(tmp_path / "a.jsonl", [row | {"labels": label}]), "shp")


def test_missing_and_unknown_paths_are_named(tmp_path: Path) -> None:
    assert "does not exist" in fails(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("problem\n")
    assert "has an unknown ending" in fails(tmp_path / "a.csv")
    (tmp_path / "empty").mkdir()
    assert "holds no data files" in fails(tmp_path / "empty")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A Parquet file that `datasets` streams stands in for the hub; the calls are recorded."""
    import datasets

    file = write(tmp_path / "hub.parquet", [row | {"solution": "s"} for row in ROWS])
    calls: list[Any] = []
    real = datasets.load_dataset

    def load(path: str, **options: Any) -> Any:
        calls.append((path, options))
        return real("parquet", data_files=str(file), split="train", streaming=options["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_the_hub_is_streamed(hub: list[Any]) -> None:
    found = read("owner/name", split="test", revision="abc", data_files="x.parquet")
    assert [row for _, row in found] == ROWS
    assert found[41][0] == "owner/name, row 42"
    options = {"split": "test", "revision": "abc", "data_files": "x.parquet", "streaming": True}
    assert hub == [("owner/name", options)]


def test_a_column_that_the_hub_lacks_is_named(hub: list[Any]) -> None:
    assert "owner/name has no column category, context, instruction" in fails("owner/name", "dolly")


def test_failures_of_the_hub_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def broken() -> Any:
        yield ROWS[0]
        raise OSError(f"lost at {SECRET}")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(broken))
    assert "owner/name: reading from the hub failed after row 1 (OSError)" in fails("owner/name")

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert "owner/name cannot be read from the hub: no route. Check path" in fails("owner/name")
