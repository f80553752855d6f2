"""The rules of the evaluation, on the small run: what they wrote is recomputed the slow way."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import polars as pl
import pytest
import yaml

from salmon import evaluation, principles
from salmon.artifacts import manifest_path, write_table
from salmon.tables import ANSWERS
from tests.running import merge
from tests.small_run import snakemake

ROOT = Path(__file__).parents[1]


def test_the_evaluation_of_the_small_run(small_run: Path) -> None:
    """Held-out counts and accuracy are those that the training wrote; the rest is recomputed the slow way."""
    results = small_run / "results"
    judge = json.loads((results / "evaluation/judge/judge.json").read_text())
    table = pl.read_parquet(results / "preferences/preferences.parquet")
    judged = judge.pop("labelled")
    assert judge == json.loads(json.dumps(evaluation.judge(table, 42)))
    assert set(judged) == {"harmless", "hhh"}
    assert set(judged["harmless"]) == {"Ethical"}
    assert set(judged["hhh"]) == set(table["dimension"])
    pairs = pl.read_parquet(results / "evaluation/judge_pairs/judgements.parquet").rows(named=True)
    sources = dict(
        pl.read_parquet(results / "evaluation/judge_pairs/preferred.parquet").select("prompt_id", "source").iter_rows()
    )
    for source, ways in judged.items():
        for name, measured in ways.items():
            rows = [row for row in pairs if (sources[row["prompt_id"]], row["dimension"]) == (source, name)]
            right = [0.5 if r["s12"] * r["s21"] <= 0 else float(r["s12"] > 0) for r in rows]
            assert measured["right"]["value"] == pytest.approx(sum(right) / len(right))
    for stage, folder in (("pmp", "pmp"), ("reward_model", "reward_model")):
        found = json.loads((results / "evaluation" / folder / "reward_model.json").read_text())
        trained = json.loads((results / "models" / stage / "metrics.json").read_text())["evaluation"]
        assert found["held_out"]["accuracy"]["number"] == trained["number"]
        assert found["held_out"]["accuracy"]["value"] == pytest.approx(trained["accuracy"], abs=1e-6)
        assert set(found["people"]["all"]) == {"helpful", "hhh"}
    assert "Concise, negated" in found["people"]
    held_out = json.loads((results / "models/pmp/metrics.json").read_text())["evaluation"]["number"]
    assert sum(one["number"] for one in found["held_out_of_pmp"].values()) == held_out > 0
    for name, ways in found["held_out"]["deciding"].items():
        assert ways["plain"]["number"] + ways["negated"]["number"] == trained["by_deciding_dimension"][name]["number"]


def test_the_judge_compares_two_runs(small_run: Path, tmp_path: Path) -> None:
    """The rule runs it. The other run has the same answers, less one: under each principle, the rest is a draw."""
    folder = shutil.copytree(small_run, tmp_path / "copy")
    runs = folder / "results" / "runs"
    answers, other = (runs / name / "evaluation" / "answers.parquet" for name in ("default", "other"))
    table, manifest = pl.read_parquet(answers), json.loads(manifest_path(answers).read_text())
    other.parent.mkdir(parents=True)
    manifest["counts"]["answers"] -= 1
    write_table(table[1:], other, ANSWERS, manifest)
    raw = yaml.safe_load((small_run / "config.yaml").read_text().replace(str(small_run), str(folder)))
    raw["runs"]["other"], raw["evaluation"]["against"] = {}, "all"
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    found = runs / "default" / "evaluation" / "against" / "other.parquet"
    done = snakemake(str(found), "--configfile", str(folder / "config.yaml"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert len(re.findall("localrule", done.stdout + done.stderr)) == 1
    judged = pl.read_parquet(found)
    assert judged["prompt_id"].unique(maintain_order=True).to_list() == table["prompt_id"][1:].to_list()
    assert judged["s12"].to_list() == pytest.approx((-judged["s21"]).to_list(), abs=1e-4)
    assert judged["s12"].abs().max() > 0.01
    assert {won["value"] for won in evaluation.judge_wins(judged, 0).values()} == {0.5}
    counts = json.loads(manifest_path(found).read_text())["counts"]
    assert (counts["pairs"], counts["not_answered_by_both"]) == (len(table), 1)


def test_policies_of_the_small_run(small_run: Path) -> None:
    """Every number is recomputed from the tables that it comes from; no prompt that was trained on is answered."""
    results = small_run / "results"
    found = json.loads((results / "evaluation/policies/policies.json").read_text())
    prompts = pl.read_parquet(results / "evaluation/prompts.parquet")
    for trained in ("prompts/oasst1.parquet", "prompts/rl.parquet"):
        assert set(prompts["instruction"]).isdisjoint(pl.read_parquet(results / trained)["instruction"])
    answers = pl.read_parquet(results / "runs/default/evaluation/answers.parquet")
    before = pl.read_parquet(results / "evaluation/initial_answers.parquet")
    assert answers["prompt_id"].to_list() == before["prompt_id"].to_list()  # but for those that are too long
    assert set(answers["prompt_id"]) <= set(prompts["prompt_id"])
    assert (before["kl"] == 0).all()
    assert found["names"] == ["initial policy", "default"]
    assert found["initial"] == {"default": "initial policy"}
    behaviour = found["behaviour"]["default"]
    assert behaviour["kl"]["value"] == pytest.approx(answers["kl"].mean())
    finished = [reason != "length" for reason in answers["finish_reason"]]
    assert behaviour["finished"]["value"] == pytest.approx(sum(finished) / len(finished))
    words = [text.lower().split() for text in answers["response"]]
    pairs = [[*itertools.pairwise(row)] for row in words]
    distinct = [len({*row}) / len(row) for row in pairs if row]
    assert behaviour["distinct_2"]["value"] == pytest.approx(sum(distinct) / len(distinct))
    scores, old = (
        {tuple(row[:4]): row[4] for row in pl.read_parquet(results / path).iter_rows()}
        for path in ("runs/default/evaluation/scores.parquet", "evaluation/initial_scores.parquet")
    )
    assert scores.keys() == old.keys()
    raw = merge(
        yaml.safe_load((ROOT / "config.yaml").read_text()), yaml.safe_load((small_run / "config.yaml").read_text())
    )
    of_rl = raw["runs"]["default"].get("ppo", {}).get("principles") or raw["ppo"]["principles"]
    shown = principles.to_measure(ROOT / raw["judge"]["principles"], raw["aggregation"]["dimensions"], [ROOT / of_rl])
    assert {(name, negated) for _, name, negated, _ in scores} == shown.keys()
    assert {one.definition for one in principles.read_weighted(ROOT / of_rl)} <= set(shown.values())
    counts = json.loads((results / "runs/default/evaluation/scores.manifest.json").read_text())["counts"]
    assert set(counts) == {"scores", "default: instructions cut", "default: outputs cut"}
    for name, ways in found["wins"]["default"].items():
        for way, wins in ways.items():
            keys = [key for key in scores if key[1:3] == (name, way == "negated")]
            won = [0.5 if scores[key] == old[key] else float(scores[key] > old[key]) for key in keys]
            ours, theirs = wins["default"]["initial policy"], wins["initial policy"]["default"]
            assert ours["value"] == pytest.approx(sum(won) / len(won))
            assert ours["low"] <= ours["value"] <= ours["high"]
            assert [theirs[key] for key in ("value", "low", "high")] == pytest.approx(
                [1 - ours[key] for key in ("value", "high", "low")]
            )
            means = found["scores"]["default"][name][way]
            for policy, table in (("default", scores), ("initial policy", old)):
                assert means[policy]["value"] == pytest.approx(sum(table[key] for key in keys) / len(keys))
    counts = json.loads((results / "runs/default/evaluation/judgements.manifest.json").read_text())["counts"]
    assert (counts["pairs"], counts["too_short"]) == (len(answers), 0)  # not even the shortest answer
    judged = pl.read_parquet(results / "runs/default/evaluation/judgements.parquet").rows(named=True)
    for name, wins in found["judge"].items():
        measured = wins["default"]["initial policy"]
        rows = [row for row in judged if row["dimension"] == name]
        won = [(0.5 + 0.5 * math.copysign(1, row["s12"])) if row["s12"] * row["s21"] > 0 else 0.5 for row in rows]
        assert measured["value"] == pytest.approx(sum(won) / len(won))
    assert "| Concise, negated |" in (results / "evaluation/policies/policies.md").read_text()
