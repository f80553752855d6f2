"""Every count in a manifest adds up to the rows that were read, and to those of the table next to it."""

import json
from typing import Any

import polars as pl
import pytest

from salmon import checked
from salmon.artifacts import manifest_path
from salmon.tables import (
    JUDGEMENTS,
    PMP_RECORDS,
    PRINCIPLE_RECORDS,
    PROMPTS,
    RESPONSES,
    RL_PROMPTS,
    SFT_EXAMPLES,
    Table,
)
from tests.border_world import NAMES, BorderWorld


class Counted:
    """Counts and tables of the scripts' runs."""

    def __init__(self, world: BorderWorld) -> None:
        self.world = world

    def counts(self, artifact: str) -> dict[str, int]:
        found: dict[str, int] = json.loads(manifest_path(self.world.folder / artifact).read_text())["counts"]
        return found

    def rows(self, table: str) -> pl.DataFrame:
        return pl.read_parquet(self.world.folder / table)


@pytest.fixture(scope="module")
def counted(border_world: BorderWorld) -> Counted:
    return Counted(border_world)


def test_sample_responses(counted: Counted) -> None:
    prompts = counted.rows("prompts.parquet").height
    total = 0
    for shard in (0, 1):
        counts = counted.counts(f"responses0/{shard}.parquet")
        table = counted.rows(f"responses0/{shard}.parquet")
        reasons = dict(table["finish_reason"].value_counts().iter_rows())
        assert counts == {"rows": table.height, **reasons, "thinking_cut": 0}
        assert sum(reasons.values()) == counts["rows"]
        total += counts["rows"]
    assert total == prompts


def test_judge_preferences(counted: Counted) -> None:
    pairs = 0
    for shard in (0, 1):
        counts = counted.counts(f"judgements/{shard}.parquet")
        left_out = counts["prompt_too_long"] + counts["too_short"] + counts["no_room"]
        assert counts["pairs"] == left_out + counts["judged"]
        assert counts["rows"] == counts["judged"] * len(NAMES) == counted.rows(f"judgements/{shard}.parquet").height
        assert left_out, "a count of nothing adds up in any case"
        pairs += counts["pairs"]
    assert pairs == counted.rows("response0.parquet").height


@pytest.mark.parametrize(("table", "folder"), [("response0", "responses0"), ("preferences", "judgements")])
def test_gather_shards(counted: Counted, table: str, folder: str) -> None:
    shards = [counted.counts(f"{folder}/{shard}.parquet") for shard in (0, 1)]
    counts = counted.counts(f"{table}.parquet")
    assert counts == {name: sum(each.get(name, 0) for each in shards) for name in shards[0] | shards[1]}
    assert counts["rows"] == counted.rows(f"{table}.parquet").height


def test_aggregate_preferences(counted: Counted) -> None:
    counts, passes = counted.counts("principle.parquet"), 12
    judged = counted.rows("preferences.parquet")["prompt_id"].n_unique()
    assert counts["pairs"] == counted.rows("response0.parquet").height == judged + counts["pairs_not_judged"]
    skipped = sum(number for name, number in counts.items() if name.startswith("skipped_"))
    decided = sum(number for name, number in counts.items() if name.startswith("decided_by_"))
    assert judged * passes == counts["records"] + skipped
    records = counted.rows("principle.parquet")
    assert decided == counts["records"] == records.height
    assert counts["flipped"] == records["flipped"].sum()


def test_train_reward_model(counted: Counted) -> None:
    counts = counted.counts("trained")
    used = counts["trained_on"] + counts["held_out"] + counts["left_out_of_last_batch"]
    assert counts["records"] == counted.rows("principle.parquet").height == used + counts["skipped_empty_output"]
    assert counts["trained_on"] == counts["steps"] * 4  # pairs per step
    metrics = json.loads((counted.world.folder / "trained" / "metrics.json").read_text())
    assert metrics["evaluation"]["number"] == counts["held_out"]
    assert len(metrics["training"]) == counts["steps"]


def test_train_sft(counted: Counted) -> None:
    counts = counted.counts("sft")
    used = counts["trained_on"] + counts["held_out"] + counts["left_out_of_last_batch"]
    left_out = counts["no_room_for_an_answer"] + counts["no_answer"]
    assert counts["examples"] == counted.rows("examples.parquet").height == used + left_out
    metrics = json.loads((counted.world.folder / "sft" / "metrics.json").read_text())
    assert metrics["evaluation"]["number"] == counts["held_out"]
    assert len(metrics["training"]) == counts["steps"]


def test_train_policy(counted: Counted) -> None:
    counts = counted.counts("policy")
    assert counts["rows"] == counted.rows("rl.parquet").height
    assert counts["rows"] == counts["prompts"] + counts["longer_than_query_length"]
    lines = (counted.world.folder / "policy" / "metrics.jsonl").read_text().splitlines()
    assert counts["steps"] == len(lines)


@pytest.mark.parametrize(
    ("file", "table"),
    [
        ("prompts", PROMPTS),
        ("examples", SFT_EXAMPLES),
        ("rl", RL_PROMPTS),
        ("responses1/0", RESPONSES),
        ("response1", RESPONSES),
        ("judgements/1", JUDGEMENTS),
        ("preferences", JUDGEMENTS),
        ("pmp", PMP_RECORDS),
        ("principle", PRINCIPLE_RECORDS),
    ],
)
def test_every_manifest_says_how_many_rows_its_table_has(counted: Counted, file: str, table: Table) -> None:
    path = counted.world.folder / f"{file}.parquet"
    assert checked.rows_counted(counted.counts(path.name if "/" not in file else f"{file}.parquet"))[table.name] == (
        pl.read_parquet(path).height
    )
    rows: Any = checked.read(path, table).collect()
    assert rows.height
