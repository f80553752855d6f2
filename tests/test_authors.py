"""The authors' tables: responses, judgements and records are converted to ours, or refused with the reason."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from salmon import aggregation, artifacts, authors, preference_data, principles
from salmon.config import Aggregation, PmpData, RlPrompts
from salmon.errors import UserError
from salmon.prompts import collect_prompts
from salmon.randomness import digest
from salmon.tables import JUDGEMENTS, PRINCIPLE_RECORDS, RESPONSES
from tests.authors_world import (
    DIMENSIONS,
    prompts,
    publish_preferences,
    publish_records,
    publish_responses,
    score_of,
    write_lines,
    write_principles,
)

PROMPTS = prompts(23)
Rows = list[dict[str, Any]]


def paths(files: list[Path]) -> list[str]:
    return [str(file) for file in files]


def read_lines(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def named(tmp_path: Path) -> list[principles.JudgedPrinciple]:
    return principles.read_judged(write_principles(tmp_path / "principles.json"))


def check(table: pl.DataFrame, kind: Any, file: Path) -> None:
    """The table is as the workflow writes it."""
    artifacts.write_table(table, file, kind)


def test_responses_become_tables(tmp_path: Path) -> None:
    """Keyed by their prompts: neither the file's order nor white space decides anything."""
    files = publish_responses(tmp_path, PROMPTS)
    lines = read_lines(files[1])
    random.Random(1).shuffle(lines)
    write_lines(files[1], lines)
    pairs = authors.read_pairs(paths(files), "sampling.paths")
    tables = []
    for index in (0, 1):
        table, counts = authors.responses(pairs, index)
        check(table, RESPONSES, tmp_path / f"{index}.parquet")
        assert counts == {"read": 23, "duplicate": 0, "rows": 23}
        assert set(table["finish_reason"]) == {"imported"}
        assert table["prompt_id"].is_sorted()
        tables.append(table)
    assert tables[0]["prompt_id"].equals(tables[1]["prompt_id"])
    texts = {(row["instruction"], row["input"]): row["response"] for row in tables[0].iter_rows(named=True)}
    assert texts == {
        (instruction.strip(), extra): f"response 0 to {instruction.strip()}\n\n### Details\nA list.\n\n### User\nmore"
        for instruction, extra in PROMPTS
    }
    judged, counts = authors.responses(pairs, 0, authors.JUDGED_UP_TO)
    assert counts["rows"] == 23
    for instruction, response in judged.select("instruction", "response").iter_rows():
        assert response == f"response 0 to {instruction}"  # without the rest, which the release's judge never read


def test_judgements_find_their_pairs(tmp_path: Path, named: list[Any]) -> None:
    """Their numbers count pairs in the release's order; the last batch is missing, and no incomplete pair is kept."""
    files = publish_responses(tmp_path, PROMPTS)
    file = publish_preferences(tmp_path, files, drop=4)
    pairs = authors.read_pairs(paths(files), "sampling.paths")
    table, counts = authors.judgements(str(file), pairs, named, "judge.path")
    check(table, JUDGEMENTS, tmp_path / "j.parquet")
    assert counts == {
        **{"pairs": 23, "too_short": 4, "not_judged": 1, "incomplete": 1, "duplicate": 0, "judged": 17},
        **{"read": 19 * 3 - 4, "rows": 17 * 3},
    }
    responses, _ = authors.responses(pairs, 0)
    asked = dict(responses.select("prompt_id", "instruction").iter_rows())
    for prompt_id, dimension, s12, s21 in table.iter_rows():
        assert (s12, s21) == score_of(asked[prompt_id], dimension)
    assert table["dimension"].to_list() == list(reversed(DIMENSIONS)) * 17  # as in the file of principles


def test_judgements_and_responses_are_aggregated(tmp_path: Path, named: list[Any]) -> None:
    """If the files are exchanged, so is the preference: their order says which one was output 1 (defect 1)."""
    files = publish_responses(tmp_path, PROMPTS)
    file = publish_preferences(tmp_path, files)
    settings = Aggregation(dimensions=list(DIMENSIONS), label_noise=0, rule_label_noise=0, language_rule=False)
    preferred = []
    for order in (files, files[::-1]):
        pairs = authors.read_pairs(paths(order), "sampling.paths")
        for index in (0, 1):
            table, _ = authors.responses(pairs, index, authors.JUDGED_UP_TO)
            check(table, RESPONSES, tmp_path / f"{index}.parquet")
        check(authors.judgements(str(file), pairs, named, "judge.path")[0], JUDGEMENTS, tmp_path / "j.parquet")
        (tmp_path / "parts").mkdir(exist_ok=True)
        records, counts = aggregation.aggregate(
            *(tmp_path / name for name in ("j.parquet", "0.parquet", "1.parquet")),
            principles=named,
            settings=settings,
            turn_markers=[],
            folder=tmp_path / "parts",
        )
        found = records.collect()
        assert counts["pairs_not_judged"] == 4
        assert found.height == counts["records"] > 20
        better = pl.when(pl.col("preference") == 1).then("output_1").otherwise("output_2")
        preferred.append(found.select("record_id", text=better.str.slice(0, 10)).sort("record_id"))
        assert not found["output_1"].str.contains("###").any()
    first, second = preferred
    assert first["record_id"].equals(second["record_id"])
    assert all(one != other for one, other in zip(first["text"], second["text"], strict=True))


def test_doubled_prompts_keep_their_first_pair(tmp_path: Path, named: list[Any]) -> None:
    files = publish_responses(tmp_path, [*PROMPTS, PROMPTS[2]])
    pairs = authors.read_pairs(paths(files), "sampling.paths")
    table, counts = authors.responses(pairs, 0)
    assert counts == {"read": 24, "duplicate": 1, "rows": 23}
    found, counts = authors.judgements(str(publish_preferences(tmp_path, files)), pairs, named, "judge.path")
    assert counts["duplicate"] == 1
    assert counts["pairs"] == sum(
        counts[name] for name in ("too_short", "not_judged", "incomplete", "duplicate", "judged")
    )
    assert set(found["prompt_id"]) <= set(table["prompt_id"])


@pytest.mark.parametrize("numpy", [False, True])
def test_records_become_a_table(tmp_path: Path, named: list[Any], numpy: bool) -> None:
    asked = PROMPTS[:12]
    table, counts = authors.records(str(publish_records(tmp_path, asked, numpy)), named, "aggregation.path")
    check(table, PRINCIPLE_RECORDS, tmp_path / "r.parquet")
    assert counts == {"read": 24, "records": 24}
    for at, (instruction, extra) in enumerate(asked):
        prompt_id = digest("authors", instruction.strip(), extra)
        two = table.filter(prompt_id=prompt_id)
        assert two["record_id"].to_list() == [f"{prompt_id}-0", f"{prompt_id}-1"]
        assert two["output_1"].to_list() == ["one 0", "one 1"]
        row = two.row(0, named=True)
        shown = DIMENSIONS[: 1 + at % 3]
        assert row["dimensions"] == list(shown)
        assert row["scores"] == [0.5, -0.5, -1.5][: len(shown)]
        assert row["negated"] == [bool((at + each) % 2) for each in range(len(shown))]
        texts = [f"It is {'not ' if turned else ''}{name}." for name, turned in zip(shown, row["negated"], strict=True)]
        assert row["definitions"] == texts
        assert row["rule"] == {3: "language", 7: "refusal", 11: "language"}.get(at)
        assert row["deciding"] == (None if row["rule"] else shown[at % 3])
        assert (row["preference"], row["flipped"], row["swapped"]) == (1 + at % 2, at % 3 == 0, None)


def test_pmp_data_and_prompts_are_sources(tmp_path: Path) -> None:
    """Formats `pairs` and `prompts`."""
    rows = [
        {"score": 3.0, "instruction": "post", "input": "", "output_1": "a", "output_2": "b", "preference": 1},
        {"instruction": "Human: hi", "input": "", "output_1": "c", "output_2": "d", "preference": 2},
        {"score": 1.5, "instruction": "other", "input": "", "output_1": "e", "output_2": "f", "preference": 1},
    ]
    (tmp_path / "pmp.json").write_text(json.dumps(rows))
    counts: Any = preference_data.Counter()
    settings = PmpData.model_validate({"sources": {"a": {"format": "pairs", "path": str(tmp_path / "pmp.json")}}})
    found = list(preference_data.comparison_records(settings.sources, settings.min_score_ratio, settings.seed, counts))
    assert {(row["instruction"], row[f"output_{row['preference']}"]) for row in found} == {
        ("post", "a"),
        ("Human: hi", "d"),
    }
    assert counts == {"a: rows": 3, "a: score ratio too small": 1}
    asked = [
        {"instruction": f"q{n}", "input": "", "output": "", "length_bonus": 0.5, "question_type": n} for n in range(3)
    ]
    (tmp_path / "rl.json").write_text(json.dumps(asked))
    rl = RlPrompts.model_validate({"sources": {"a": {"format": "prompts", "path": str(tmp_path / "rl.json")}}})
    table, _ = collect_prompts(rl, bonuses=rl.length_bonus)
    assert table["question_type"].to_list() == ["general", "reasoning", "red_teaming"]
    assert set(table["length_bonus"]) == {0.5}


# ---- What does not fit


def last_line(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Rows], Rows]:
    return lambda rows: [*rows[:-1], change(rows[-1])]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:-1], "has 23 rows and .* 22: their prompts differ"),
        (lambda rows: [*rows, rows[0]], "23 rows and .* 24"),
        (last_line(lambda row: row | {"instruction": "Zzz?"}), "the prompts of .* differ: sorted .* line 23"),
        (last_line(lambda row: row | {"input": "other"}), "the prompts of .* differ: sorted .* line 23"),
        (last_line(lambda row: row | {"output": "text"}), 'line 23: column output: .*"generation"'),
        (lambda rows: [row["output"] for row in rows], r"23 bad rows; sampling.paths reads JSON lines of .*generation"),
        (lambda rows: [], "holds no rows"),
    ],
)
def test_responses_that_do_not_fit(tmp_path: Path, change: Callable[[Rows], Rows], said: str) -> None:
    files = publish_responses(tmp_path, PROMPTS)
    write_lines(files[1], change(read_lines(files[1])))
    with pytest.raises(UserError, match=f"(?s){said}") as told:
        authors.read_pairs(paths(files), "sampling.paths")
    assert "response 1 to" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (last_line(lambda row: row | {"example_idx": 19}), "line 57: example_idx is 19, but .* have 19 pairs"),
        (last_line(lambda row: row | {"example_idx": -1}), "example_idx is -1"),
        (last_line(lambda row: row | {"dimension": "New"}), "'New' is not in judge.principles"),
        (last_line(lambda row: row | {"relative_score": [1.0]}), "has 1 numbers"),
        (last_line(lambda row: row | {"relative_score": [float("nan"), 1.0]}), "column relative_score"),
        (last_line(lambda row: row | {"relative_score": [1, 1], "prompt_preference": 2}), "contradicts relative_score"),
        (
            lambda rows: [*rows, rows[0] | {"relative_score": [9, 9], "prompt_preference": 1}],
            "two different judgements under",
        ),
        (lambda rows: [{"instruction": "x"}], "1 bad rows; judge.path reads JSON lines of .*example_idx"),
    ],
)
def test_judgements_that_do_not_fit(
    tmp_path: Path, named: list[Any], change: Callable[[Rows], Rows], said: str
) -> None:
    files = publish_responses(tmp_path, PROMPTS)
    file = publish_preferences(tmp_path, files)
    write_lines(file, change(read_lines(file)))
    pairs = authors.read_pairs(paths(files), "sampling.paths")
    with pytest.raises(UserError, match=f"(?s){said}"):
        authors.judgements(str(file), pairs, named, "judge.path")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dimensions": "('New',)"}, "'New' is not in judge.principles"),
        ({"dimensions": "__import__('os').mkdir('payload-ran')"}, "dimensions is not the text of a Python tuple"),
        ({"dimension_scores": "(nan,)"}, "dimension_scores is not the text"),
        ({"dimension_scores": "(0.1, 0.2)"}, "do not match"),
        ({"negative_definitions": "(2,)"}, "do not match"),
        ({"doinate_dimension_idx": 1}, "do not match"),
        ({"preference": 0}, "column preference"),
    ],
)
def test_records_that_do_not_fit(
    tmp_path: Path, named: list[Any], change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = publish_records(tmp_path, PROMPTS[:1])
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[0] | change]))
    with pytest.raises(UserError, match=f"(?s)row 1.*{said}"):
        authors.records(str(file), named, "aggregation.path")
    assert not (tmp_path / "payload-ran").exists()


def test_a_folder_is_no_response_file(tmp_path: Path) -> None:
    """A listing would decide which of its files is which."""
    files = publish_responses(tmp_path, PROMPTS)
    with pytest.raises(UserError, match=r"sampling\.paths: .* must be a local file"):
        authors.read_pairs([str(tmp_path), str(files[1])], "sampling.paths")
