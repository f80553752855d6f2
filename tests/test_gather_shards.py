"""Gathering shards: the table does not depend on their number, and faulty shards are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import gather_shards
from salmon import artifacts
from salmon.errors import UserError
from salmon.shards import in_order, in_order_of_keys, read_rows, sort_rows
from salmon.tables import JUDGEMENTS, RESPONSES

Schema = dict[str, Any]


def responses(rows: int = 11) -> pl.DataFrame:
    ids = [f"{number:03x}" for number in np.random.default_rng(0).permutation(4096)[:rows]]
    values: dict[str, Any] = dict.fromkeys(RESPONSES.columns, "text") | {
        "prompt_tokens": range(rows),
        "response_tokens": 2,
    }
    return pl.DataFrame(values | {"prompt_id": ids}, schema=RESPONSES.schema)


def judgements(rows: int = 11) -> pl.DataFrame:
    """Some prompts are left out, and the dimensions are not in alphabetical order."""
    kept = responses(rows).filter(pl.col("prompt_tokens") % 4 > 0).select("prompt_id", s12=pl.col("prompt_tokens"))
    table = kept.join(pl.DataFrame({"dimension": ["Concise", "Creative", "Candid"]}), how="cross")
    return (
        table.with_columns(s21=-pl.col("s12"))
        .cast({"s12": pl.Float64, "s21": pl.Float64})
        .select(list(JUDGEMENTS.columns))
    )


def write(folder: Path, table: pl.DataFrame, shards: int, **changed: Any) -> list[Path]:
    """Shards of a table with their manifests, each prompt's rows in one shard."""
    folder.mkdir(exist_ok=True)
    number = {key: row % shards for row, key in enumerate(responses()["prompt_id"])}
    shard_of = pl.col("prompt_id").replace_strict(number)
    paths = []
    for shard in range(shards):
        path = folder / f"{shard}.parquet"
        part = table.filter(shard_of == shard)
        part.write_parquet(path)
        settings = {"temperature": 0.7, "shard": shard, "shards": shards} | changed.get("settings", {})
        counts = {"rows": part.height, f"of {shard}": 1} | ({"judged": 1} if "s12" in table.columns else {})
        manifest = artifacts.manifest(settings, {"prompts": "abc"}, counts)
        artifacts.write_json(artifacts.manifest_path(path), manifest)
        paths.append(path)
    return paths


def gather(paths: list[Path], output: Path) -> pl.DataFrame:
    gather_shards.main(gather_shards.Arguments(shards=paths, output=output))
    return pl.read_parquet(output)


@pytest.mark.parametrize("table", [responses(), judgements()])
def test_number_and_order_of_shards_do_not_show(tmp_path: Path, table: pl.DataFrame) -> None:
    whole = gather(write(tmp_path / "1", table, 1), tmp_path / "whole.parquet")
    assert whole.schema == table.schema
    assert whole.equals(table.sort("prompt_id", maintain_order=True))
    for shards in (2, 3, 7, 20):
        paths = write(tmp_path / str(shards), table, shards)
        gather(paths[::-1], tmp_path / "out.parquet")
        assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_many_rows_are_sorted_in_parts_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    ids = [f"{number:06x}" for number in rng.permutation(5000)]
    files = []
    for shard in range(3):
        keys = ids[shard::3]
        table = pl.DataFrame({"prompt_id": keys * 2, "number": range(2 * len(keys))})
        files.append(tmp_path / f"{shard}.parquet")
        table.write_parquet(files[-1], row_group_size=700)
    expected = pl.concat([pl.read_parquet(file) for file in files]).sort("prompt_id", maintain_order=True)
    with caplog.at_level("INFO"):
        parts = sort_rows(files, expected.columns, tmp_path / "sorted")
    assert "3/3" in caplog.text
    heights = [pl.read_parquet(part).height for part in parts]
    assert max(heights) < 2 * min(heights) < 2 * 10_000 / 15
    assert pl.concat([pl.read_parquet(part) for part in parts]).equals(expected)
    assert in_order_of_keys(parts[0], tmp_path / "again") == [parts[0]]
    copies = in_order_of_keys(files[0], tmp_path / "again")
    assert (
        list(read_rows(copies, ["number"]))
        == pl.read_parquet(files[0]).sort("prompt_id", maintain_order=True).select("number").rows()
    )


def test_manifest_sums_the_counts(tmp_path: Path) -> None:
    paths = write(tmp_path, responses(), 2)
    gather(paths, tmp_path / "out.parquet")
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["counts"] == {"rows": 11, "of 0": 1, "of 1": 1}
    assert manifest["settings"] == {"temperature": 0.7}
    assert manifest["inputs"] == {"prompts": "abc"} | {str(path): artifacts.hash_path(path) for path in paths}


def test_a_shard_may_be_empty_but_not_all(tmp_path: Path) -> None:
    few = responses().head(1)
    assert gather(write(tmp_path, few, 3), tmp_path / "out.parquet").equals(few)
    with pytest.raises(UserError, match=r"all 3 shards of .* are empty; their manifests count"):
        gather(write(tmp_path / "none", few.clear(), 3), tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


def test_shards_that_are_not_one_table(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    paths = write(tmp_path, responses(), 3)
    for some, found in ((paths[:2], r"\[0, 1\] of 0 to 2"), ([*paths, paths[0]], r"\[0, 0, 1, 2\] of 0 to 2")):
        with pytest.raises(UserError, match=rf"found shards {found}; give each of them once"):
            gather(some, output)
    other = write(tmp_path / "other", responses(), 3, settings={"temperature": 0.8})
    with pytest.raises(UserError, match=r"1\.parquet and .*0\.parquet were made with other settings \(temperature\)"):
        gather([paths[0], other[1], paths[2]], output)
    assert not output.exists()


def test_one_row_in_two_shards(tmp_path: Path) -> None:
    for table, named in ((responses(), "prompt_id {}"), (judgements(), "prompt_id {}, dimension Concise")):
        paths = write(tmp_path, table, 2)
        key = pl.read_parquet(paths[0])["prompt_id"][0]
        first = pl.concat([pl.read_parquet(path).head(1) for path in paths])
        rows = pl.read_parquet(paths[1])
        pl.concat([rows[1:], first.head(1)]).write_parquet(paths[1])
        with pytest.raises(UserError, match=f"has 2 rows of {named.format(key)};"):
            gather(paths, tmp_path / "out.parquet")


def test_damaged_shards(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    paths = write(tmp_path, responses(), 3)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"1\.parquet cannot be read: parquet"):
        gather(paths, output)
    pl.read_parquet(paths[0]).drop("response").write_parquet(paths[1])
    with pytest.raises(UserError, match=r"1\.parquet lacks columns: response"):
        gather(paths, output)
    with pytest.raises(UserError, match=r"neither responses nor judgements"):
        gather([paths[1], paths[0], paths[2]], output)
    artifacts.manifest_path(paths[2]).unlink()
    with pytest.raises(UserError, match=r"2\.manifest\.json cannot be read: .* are built again"):
        gather(paths, output)
    assert not output.exists()


def test_rows_that_its_manifest_does_not_count(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    for table in (responses(), judgements()):
        paths = write(tmp_path, table, 2)
        rows = pl.read_parquet(paths[1])
        rows[1:].write_parquet(paths[1])
        counts = rf"1\.parquet has {rows.height - 1} rows, but its manifest counts {rows.height}"
        said = f"{counts}; if you made the table yourself"
        with pytest.raises(UserError, match=said):
            gather(paths, output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m | {"counts": {"rows": 4}}, "is not a manifest of the table judgements: it counts rows"),
        (lambda m: m | {"counts": {"rows": -4}}, r"counts\.rows: Input should be greater"),
        (lambda m: m | {"counts": {"rows": 1e400, "judged": 1}}, r"counts\.rows: "),
        (lambda m: m | {"settings": []}, "settings: Input should be a valid dictionary"),
        (lambda m: [m], "is not valid"),
        (lambda m: m | {"settings": {}}, "found shards"),
        (lambda m: m | {"settings": m["settings"] | {"shard": None}}, "found shards"),
        (lambda m: m | {"settings": m["settings"] | {"shards": 10**12}}, "found shards"),
    ],
)
def test_manifests_that_are_no_manifests_of_the_shard(tmp_path: Path, change: Any, said: str) -> None:
    paths = write(tmp_path, judgements(), 2)
    for path in paths:
        file = artifacts.manifest_path(path)
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(UserError, match=said):
        gather(paths, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # In each, the table has the rows that its manifest counts.
        (lambda t: t.filter(pl.int_range(pl.len()) > 0), r"1 pairs were judged by only some of 3 principles, such as"),
        (lambda t: t.with_columns(s21=pl.lit(None, pl.Float64)), r"has nulls in s21, first in the row of prompt_id"),
        (lambda t: t.with_columns(s12=pl.lit(float("nan"))), r"has numbers that are not finite, .* in s12, first in"),
        (lambda t: t.with_columns(s12=pl.lit(1e13)), r"larger than 1e\+12, in s12, first in the row of prompt_id"),
    ],
)
def test_half_of_the_judgements(tmp_path: Path, change: Any, said: str) -> None:
    paths = write(tmp_path, change(judgements()), 2)
    with pytest.raises(UserError, match=said):
        gather(paths, tmp_path / "out.parquet")


def test_rows_in_the_order_of_their_keys() -> None:
    rows = pl.DataFrame({"key": ["a", "b", "c"], "value": [1, 2, 3]})
    keys = pl.DataFrame({"key": ["c", "a", "b"]})
    assert in_order(rows, keys)["value"].to_list() == [3, 1, 2]
    for broken in (rows.head(2), pl.concat([rows, rows.head(1)])):
        with pytest.raises(RuntimeError, match="for 3 keys"):
            in_order(broken, keys)
