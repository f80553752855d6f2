"""Measurements of a judge: each number is recomputed by plain loops."""

import json
import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import evaluate_judge
from salmon import evaluation, intervals
from salmon.config import Evaluation
from salmon.errors import UserError
from salmon.tables import JUDGEMENTS, RESPONSES
from tests.running import write_rows

NAMES = ["Concise", "Ethical"]


def judgements(pairs: int = 40) -> pl.DataFrame:
    generator = random.Random(1)
    rows = [
        (f"p{pair:02}", name, generator.gauss(0.5, 1), generator.gauss(-0.5, 1) if pair else 0.0)
        for pair in range(pairs)
        for name in NAMES
    ]
    return pl.DataFrame(rows, schema=JUDGEMENTS.schema, orient="row")


def test_numbers_of_a_judge_are_those_of_plain_loops() -> None:
    table = judgements()
    found = evaluation.judge(table, 0)
    assert list(found["principles"]) == NAMES
    means: dict[str, list[float]] = defaultdict(list)
    for name, measured in found["principles"].items():
        rows = [row for row in table.iter_rows(named=True) if row["dimension"] == name]
        agreeing = [row for row in rows if row["s12"] * row["s21"] > 0]
        first = [row for row in agreeing if row["s12"] > 0]
        means[name] = [(row["s12"] + row["s21"]) / 2 for row in rows]
        assert measured["agree"]["value"] == pytest.approx(len(agreeing) / len(rows))
        assert measured["first"]["value"] == pytest.approx(len(first) / len(agreeing))
        assert measured["first"]["number"] == len(agreeing)
        assert measured["bias"]["value"] == pytest.approx(sum(r["s12"] - r["s21"] for r in rows) / 2 / len(rows))
        assert measured["margin"]["value"] == pytest.approx(sum(map(abs, means[name])) / len(rows))
        assert measured["zeros"]["value"] == pytest.approx(1 / len(rows))
    one, other = (means[name] for name in NAMES)
    middle = [sum(values) / len(values) for values in (one, other)]
    pairs = [(a - middle[0], b - middle[1]) for a, b in zip(one, other, strict=True)]
    expected = sum(a * b for a, b in pairs) / math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))
    assert found["correlation"][0][1] == pytest.approx(expected)
    assert found["correlation"][1][1] == pytest.approx(1)
    same = pl.DataFrame([("a", "X", 1.0, 1.0), ("b", "X", 1.0, 1.0)], schema=JUDGEMENTS.schema, orient="row")
    assert evaluation.judge(same, 0)["correlation"] == [[None]]


def test_a_judge_is_held_against_people() -> None:
    """Output 1 is the one that people prefer; a source counts under the principles that its preferences are about."""
    rows = [("a", 1, 2), ("b", 1, -1), ("c", -2, -1), ("d", 3, -1), ("e", -1, -1)]
    table = pl.DataFrame(
        [(pair, name, float(s12), float(s21)) for pair, s12, s21 in rows for name in NAMES],
        schema=JUDGEMENTS.schema,
        orient="row",
    )
    sources = pl.DataFrame({"prompt_id": [*"abcde"], "source": ["mine"] * 4 + ["other"], "instruction": [*"qqrst"]})
    deeper = sources.with_columns(instruction=pl.col("instruction").replace("r", "q\n\nAssistant: yes\n\nHuman: r"))
    found = evaluation.labelled(table, sources, {"mine": ["Ethical"], "other": None}, 0)
    assert {source: list(ways) for source, ways in found.items()} == {"mine": ["Ethical"], "other": NAMES}
    ethical = found["mine"]["Ethical"]
    assert ethical["agree"]["value"] == 0.5  # a and c
    assert ethical["right"]["value"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert ethical["mean_right"]["value"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    right = [1, 0.5, 0, 0.5]
    low, high = intervals.wilson(0.5, 3)  # pairs of one instruction count once
    assert ethical["right"] == {"value": np.mean(right), "low": low, "high": high, "number": 4}
    low, high = intervals.wilson(0.5, 2)  # and so do the depths of one dialogue
    of_depths = evaluation.labelled(table, deeper, {"mine": ["Ethical"], "other": None}, 0)["mine"]["Ethical"]["right"]
    assert of_depths == {"value": np.mean(right), "low": low, "high": high, "number": 4}
    assert found["other"]["Concise"]["right"] == {
        "value": 0.0,
        "low": 0.0,
        "high": pytest.approx(0.793, abs=1e-3),
        "number": 1,
    }


def test_a_source_that_the_judge_could_not_read_is_refused(tmp_path: Path) -> None:
    """It would be missing from the tables, as if nobody had asked for it."""
    write_rows(tmp_path / "judged.parquet", JUDGEMENTS, judgements(4).rows(named=True), {"judged": 4, "rows": 8})
    filled = {"instruction": "i", "input": "", "response": "r", "finish_reason": "imported"}
    sources = {"p00": "mine", "p03": "mine", "long": "theirs"}
    chosen = [{**filled, "prompt_id": prompt, "source": source} for prompt, source in sources.items()]
    write_rows(tmp_path / "preferred.parquet", RESPONSES, chosen, {"rows": 3})
    given = {"preferences": tmp_path / "judged.parquet", "judged": tmp_path / "judged.parquet"}
    given |= {"labelled": tmp_path / "preferred.parquet", "output": tmp_path / "measured"}
    pairs = {name: {"format": "pairs", "path": "pairs.json"} for name in ("mine", "theirs")}
    with pytest.raises(UserError, match=r"the judge has read no pair of theirs .*judge.max_length"):
        evaluate_judge.main(evaluate_judge.Arguments(**given, evaluation=Evaluation(judge_pairs=pairs)))
    assert not (tmp_path / "measured").exists()
    write_rows(tmp_path / "preferred.parquet", RESPONSES, chosen[:2], {"rows": 2})
    evaluate_judge.main(evaluate_judge.Arguments(**given, evaluation=Evaluation(judge_pairs=pairs)))
    found = json.loads((tmp_path / "measured" / "judge.json").read_text())["labelled"]
    assert {name: one["agree"]["number"] for name, one in found["mine"].items()} == dict.fromkeys(NAMES, 2)
