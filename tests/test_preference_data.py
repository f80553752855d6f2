"""Preferences for PMP: queries and outputs, pairs left out, order drawn by hash, shuffling in bounded memory."""

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from salmon import preference_data as data
from salmon.config import PmpData
from salmon.formats import Comparison
from salmon.tables import PMP_RECORDS
from tests import forks, synthetic

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"


def shp(**more: Any) -> dict[str, Any]:
    row = {"history": "post", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 3.0}
    return {**row, **more}


def records(settings: PmpData, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    return data.comparison_records(settings.sources, settings.min_score_ratio, settings.seed, counts)


def taken(kind: str, row: dict[str, Any]) -> Any:
    """Query, preferred and other output of a row, or the reason why it gives none."""
    counts: Counter[str] = Counter()
    found = [tuple(comparison[:3]) for comparison in data.extract(kind, [("row 1", row)], 2.0, counts)]
    assert len(found) + counts.total() == 1
    return found[0] if found else next(iter(counts))


def test_shp_label_1_prefers_a() -> None:
    assert taken("shp", shp(labels=1)) == ("post", "a", "b")
    assert taken("shp", shp(labels=0)) == ("post", "b", "a")


PAIR = {"instruction": "post", "input": "", "output_1": "a", "output_2": "b", "preference": 1}


@pytest.mark.parametrize(
    ("kind", "row", "found"),
    [
        ("pairs", PAIR, ("post", "a", "b")),
        ("pairs", PAIR | {"preference": 2, "input": "text"}, ("post\n\ntext", "b", "a")),
        ("pairs", PAIR | {"output_1": None}, "empty output"),
        ("rewardbench", {"prompt": "post", "chosen": "a", "rejected": "b"}, ("post", "a", "b")),
        ("rewardbench", {"prompt": None, "chosen": "a", "rejected": "b"}, "empty query"),
        ("hhh", {"input": "post", "target_scores": {"b": 0, "a": 1}}, ("post", "a", "b")),
        ("hhh", {"input": "post", "target_scores": {"b": 1, "a": 1}}, "not one right answer of two"),
    ],
)
def test_pairs_of_other_formats(kind: str, row: dict[str, Any], found: Any) -> None:
    assert taken(kind, row) == found


def test_the_examples_of_hhh_as_published() -> None:
    counts: Counter[str] = Counter()
    source = {"format": "hhh", "path": str(DATA / "hhh_alignment")}
    found = list(records(PmpData.model_validate({"sources": {"hhh": source}}), counts))
    assert len(found) == counts["hhh: rows"] - counts["hhh: identical outputs"] > 20
    assert {row["preference"] for row in found} == {1, 2}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"score_ratio": 2.0}, "score ratio too small"),
        ({"score_ratio": 1.0}, "score ratio too small"),
        ({"history": " "}, "empty query"),
        ({"history": None}, "empty query"),
        ({"human_ref_A": "\n"}, "empty output"),
        ({"human_ref_B": None}, "empty output"),
        ({"human_ref_A": "b "}, "identical outputs"),
    ],
)
def test_shp_pairs_left_out(more: dict[str, Any], reason: str) -> None:
    assert taken("shp", shp(**more)) == reason


START = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: how?\n\nAssistant:"
QUERY = "Human: hello\n\nAssistant: hi\n\nHuman: how?"


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (f"{START} so", f"{START} thus", (QUERY, "so", "thus")),
        # one is a prefix of the other (defect 4 of the authors' release)
        (f"{START} so", f"{START} so and so", (QUERY, "so", "so and so")),
        (f"{START} so and so", f"{START} so", (QUERY, "so and so", "so")),
        (f"{START} so", f"{START} so\n\nHuman: ok", (QUERY, "so", "so\n\nHuman: ok")),
        # both have the same beginning
        (f"{START} so it is", f"{START} so it was", (QUERY, "so it is", "so it was")),
        # they diverge before the last turn
        (f"{START} so\n\nHuman: a\n\nAssistant: b", f"{START} c", (QUERY, "so\n\nHuman: a\n\nAssistant: b", "c")),
        # the same text may occur in both after they diverge
        (f"{START} b{START} x", f"{START} c{START} x", (QUERY, f"b{START} x", f"c{START} x")),
        (f"{START} so", f"{START} so ", "identical outputs"),
        (f"{START} so", START, "empty output"),
        (f"{START} so", f"{START} \n", "empty output"),
        # a human turn in which nothing is said
        (f"{START} so\n\nHuman: ", f"{START} thus", (QUERY, "so", "thus")),
        (f"{START} so\n\nHuman:", f"{START} thus \n\nHuman:\n\nHuman: \n", (QUERY, "so", "thus")),
        (f"{START} so\n\nHuman:", f"{START} so", "identical outputs"),
        (f"{START}\n\nHuman:", f"{START} so", "empty output"),
        (f"{START} hi\n\nHuman: \n\nAssistant: a", f"{START} hi\n\nHuman: \n\nAssistant: b", "empty human turn"),
        ("\n\nHuman:\n\nAssistant: so", "\n\nHuman:\n\nAssistant: thus", "empty human turn"),
        ("\n\nAssistant: so", "\n\nAssistant: thus", "empty query"),
        ("\n\nHuman: hello", "\n\nHuman: hello", "no assistant turn in common"),
        ("\n\nHuman: a\n\nAssistant: so", "\n\nHuman: b\n\nAssistant: so", "no assistant turn in common"),
        ("", f"{START} so", "no assistant turn in common"),
        (None, None, "no assistant turn in common"),
    ],
)
def test_hh_rlhf_parts_at_the_last_common_assistant_turn(chosen: str, rejected: str, expected: Any) -> None:
    assert taken("hh_rlhf", {"chosen": chosen, "rejected": rejected}) == expected


def test_reasons_are_counted() -> None:
    counts: Counter[str] = Counter()
    rows = [("a", shp()), ("b", shp(score_ratio=1.5)), ("c", shp(history=""))]
    assert len(list(data.extract("shp", rows, 2.0, counts))) == 1
    assert counts == {"score ratio too small": 1, "empty query": 1}


MANY = [Comparison(f"query {number // 2}", f"good {number}", f"bad {number}") for number in range(3000)]


def table(comparisons: Sequence[Comparison], folder: Path, seed: int = 0) -> pl.DataFrame:
    folder.mkdir()
    counts: Counter[str] = Counter()
    files = data.shuffle((data.record("it", comparison, seed) for comparison in comparisons), seed, folder, counts)
    distinct = len(set(comparisons))
    assert counts == Counter({"it: kept": distinct, "it: duplicate": len(comparisons) - distinct})
    assert sorted(folder.iterdir()) == files  # no part is left
    return pl.concat([pl.read_parquet(file) for file in files])


def test_a_record_prefers_the_preferred_output_in_either_place() -> None:
    records = [data.record("it", comparison, 0) for comparison in MANY]
    for record, comparison in zip(records, MANY, strict=True):
        assert record["preference"] in (1, 2)
        assert record[f"output_{record['preference']}"] == comparison.preferred
        assert record[f"output_{3 - record['preference']}"] == comparison.other
        assert record["instruction"] == comparison.query
    assert 1350 < sum(record["preference"] == 1 for record in records) < 1650
    assert len({record["prompt_id"] for record in records}) == 1500
    assert len({record["record_id"] for record in records}) == 3000


def test_the_table_depends_on_the_records_not_on_their_order(tmp_path: Path) -> None:
    found = table(MANY, tmp_path / "a")
    shuffled = [*MANY, *MANY[:100]]
    random.Random(5).shuffle(shuffled)
    assert table(shuffled, tmp_path / "b").equals(found)
    assert dict(found.schema) == PMP_RECORDS.schema
    assert len(found) == 3000
    reseeded = table(MANY, tmp_path / "c", seed=1)
    assert set(reseeded["record_id"]) == set(found["record_id"])
    assert sum(reseeded["record_id"] == found["record_id"]) < 20
    both = found.join(reseeded, on="record_id")
    assert 1350 < (both["preference"] == both["preference_right"]).sum() < 1650


def test_the_table_is_shuffled(tmp_path: Path) -> None:
    places = [int(query.split()[1]) for query in table(MANY, tmp_path / "a")["instruction"]]
    parts = [places[start : start + 500] for start in range(0, 3000, 500)]
    for part in parts:
        # mean of 500 of the uniform distribution over 0 … 1499: 749.5 with a standard error of 19
        assert abs(sum(part) / len(part) - 749.5) < 100


def test_a_limit_draws_distinct_records_whatever_their_order() -> None:
    records = [data.record("it", comparison, 0) for comparison in [*MANY, *MANY[:500]]]
    counts: Counter[str] = Counter()
    found = data.draw_records(records, 200, 0, counts)
    random.Random(7).shuffle(records)
    assert data.draw_records(records, 200, 0, Counter()) == found
    assert len({record["record_id"] for record in found}) == 200
    assert counts == {"over the limit": 3300}
    assert len(data.draw_records(records, 5000, 0, Counter())) == 3000
    # two draws of 200 of 3000 share 200 * 200 / 3000 = 13 on average
    other = {record["record_id"] for record in data.draw_records(records, 200, 1, Counter())}
    assert len(other & {record["record_id"] for record in found}) < 40


def test_real_hh_rlhf() -> None:
    marker, skipped, prefixes = "\n\nAssistant:", 0, 0
    with gzip.open(DATA / "hh-rlhf" / "helpful_test_sample.jsonl.gz", "rt", encoding="utf-8", newline="\n") as stream:
        for row in map(json.loads, stream):
            chosen, rejected = row["chosen"], row["rejected"]
            found = taken("hh_rlhf", row)
            if isinstance(found, str):
                skipped += 1
                continue
            prefixes += chosen.startswith(rejected) or rejected.startswith(chosen)
            # every turn of the assistant at which both could be cut; the last of them counts
            cuts = [
                chosen[:end]
                for end in range(len(chosen) + 1)
                if chosen[:end].endswith(marker) and rejected.startswith(chosen[:end])
            ]
            expected = cuts[-1].removesuffix(marker), chosen.removeprefix(cuts[-1]), rejected.removeprefix(cuts[-1])
            assert [part == text.strip() for part, text in zip(found, expected, strict=True)] == [True] * 3
            assert all(map(len, found))
    assert skipped < 10
    assert prefixes


def test_the_limit_of_a_source_is_kept(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(shp(human_ref_A=f"{n}")) + "\n" for n in range(50)))
    source = {"format": "shp", "path": str(tmp_path / "s.jsonl"), "limit": 7}
    counts: Counter[str] = Counter()
    settings = PmpData.model_validate({"sources": {"posts": source}})
    assert len(list(records(settings, counts))) == 7
    assert counts == {"posts: rows": 50, "posts: over the limit": 43}


@pytest.mark.parametrize("limit", [None, 5])
def test_the_counts_add_up_to_the_rows_read(tmp_path: Path, limit: int | None) -> None:
    (tmp_path / "s.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*synthetic.shp(), *synthetic.shp(), 1])
    )
    pairs = [{"instruction": "q", "output_1": "a", "output_2": str(n % 9), "preference": 1} for n in range(20)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*pairs, 1]))
    paths = {"shp": [str(tmp_path / "s.jsonl")], "hh_rlhf": [str(DATA / "hh-rlhf"), str(tmp_path / "h.jsonl")]}
    paths["pairs"] = [str(tmp_path / "p.jsonl")]
    (tmp_path / "h.jsonl").write_text("{\n" + json.dumps({"chosen": "", "rejected": None}))
    sources = {kind: {"format": kind, "path": paths[kind], "limit": limit, "max_bad_rows": 1} for kind in paths}
    counts: Counter[str] = Counter()
    settings = PmpData.model_validate({"sources": sources})
    data.shuffle(records(settings, counts), 0, tmp_path, counts)
    for name in sources:
        here = {what.partition(": ")[2]: number for what, number in counts.items() if what.startswith(f"{name}: ")}
        assert here.pop("rows") == sum(here.values())
        assert min(here.values()) >= 0
        assert here["bad rows"] == 1
        assert here["kept"] > 0


def run(output: Path, sources: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    settings = PmpData.model_validate({"sources": sources, **more})
    script = ROOT / "workflow_scripts" / "clean_pmp_data.py"
    command = [sys.executable, str(script), "--output", str(output), "--pmp-data", settings.model_dump_json()]
    return forks.run(command)


def test_the_script_writes_both_data_sets_and_a_manifest(tmp_path: Path) -> None:
    pl.DataFrame([shp(human_ref_A=f"secret {n}", labels=n % 2) for n in range(40)]).write_parquet(
        tmp_path / "s.parquet"
    )
    dialogues = [{"chosen": f"{START} secret {n}", "rejected": f"{START} no"} for n in range(30)]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    sources = {
        "posts": {"format": "shp", "path": str(tmp_path / "s.parquet")},
        "talks": {"format": "hh_rlhf", "path": str(tmp_path / "h.jsonl")},
    }
    output = tmp_path / "out" / "pmp.parquet"
    done = run(output, sources)
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout + done.stderr
    found = pl.read_parquet(output)
    assert dict(found.schema) == PMP_RECORDS.schema
    assert dict(found["source"].value_counts().iter_rows()) == {"posts": 40, "talks": 30}
    manifest = json.loads((tmp_path / "out" / "pmp.manifest.json").read_text())
    assert manifest["counts"] == {"posts: rows": 40, "talks: rows": 30, "posts: kept": 40, "talks: kept": 30}
    assert set(manifest["inputs"]) == {str(tmp_path / "s.parquet"), str(tmp_path / "h.jsonl")}
    assert sorted(file.name for file in output.parent.iterdir()) == ["pmp.manifest.json", "pmp.parquet"]
    before = output.read_bytes()
    run(output, sources)
    assert output.read_bytes() == before


def test_the_script_fails_on_bad_input_and_leaves_nothing(tmp_path: Path) -> None:
    good = [json.dumps({"chosen": f"{START} secret {n}", "rejected": f"{START} no"}) for n in range(20_000)]
    path = tmp_path / "h.jsonl"
    for lines, said in (
        ([*good, good[0][:-9]], "line 20001: broken JSON"),
        ([*good, '{"chosen": "secret"}'], "line 20001: column rejected is missing"),
        (['{"chosen": "secret", "rejected": "other"}'], "no pair is left"),
        ([], "holds no rows"),
    ):
        path.write_text("\n".join(lines))
        done = run(tmp_path / "out" / "pmp.parquet", {"talks": {"format": "hh_rlhf", "path": str(path)}})
        assert done.returncode == 1
        assert said in done.stderr
        assert "secret" not in done.stderr
        assert not list((tmp_path / "out").iterdir())
