"""Measurements of judge and reward models: each number is recomputed the slow way; the scripts run on real files."""

import itertools
import json
import math
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

import clean_evaluation_pairs
import draw_reward_model
import evaluate_policies
import evaluate_reward_model
from evaluate_reward_model import clean_records
from salmon import checked, configuration, evaluation, figures, intervals, plan, principles
from salmon.artifacts import manifest_path, write_table
from salmon.config import Evaluation, RewardModel
from salmon.errors import UserError
from salmon.formats import Comparison
from salmon.preference_data import record
from salmon.tables import (
    ANSWERS,
    EVALUATION_PAIRS,
    JUDGEMENTS,
    PREFERENCE_RECORDS,
    PRINCIPLE_RECORDS,
    SCORES,
    VERDICTS,
    Table,
)
from tests.ppo_world import World
from tests.running import merge
from tests.small_run import snakemake

ROOT = Path(__file__).parents[1]

NAMES = ["Concise", "Ethical"]
OPPOSITE = {name: (f"Be {name}.", f"Do not be {name}.") for name in NAMES}


def test_an_interval_does_not_depend_on_how_much_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws in blocks are different draws from the same distribution."""
    values = np.random.default_rng(0).random(300) < 0.3
    groups = [f"p{number}" for number in range(300)]
    whole = intervals.estimate(values, groups, 0)
    monkeypatch.setattr(intervals, "HELD", 7_000)
    parts = intervals.estimate(values, groups, 0)
    assert parts["low"] == pytest.approx(whole["low"], abs=0.01)
    assert parts["high"] == pytest.approx(whole["high"], abs=0.01)


def test_an_interval_is_that_of_prompts_and_not_of_rows() -> None:
    """If all rows of a prompt are equal, the mean's interval is as wide as theory says, for any number of rows."""
    generator = np.random.default_rng(0)
    values = generator.random(200) < 0.3
    groups = [f"p{number}" for number in range(200)]
    once = intervals.estimate(values, groups, 0)
    often = intervals.estimate(np.repeat(values, 5), np.repeat(groups, 5).tolist(), 0)
    share = values.mean()
    width = 2 * 1.96 * math.sqrt(share * (1 - share) / 200)
    for found in (once, often):
        assert found["value"] == pytest.approx(share)
        assert found["high"] - found["low"] == pytest.approx(width, rel=0.1)
    assert (once["number"], often["number"]) == (200, 1000)
    assert intervals.estimate(values, groups, 0) == once
    assert intervals.estimate([math.nan], ["p"], 0) == {"value": None, "low": None, "high": None, "number": 0}
    assert intervals.estimate([1.0, math.nan], ["p", "q"], 0)["number"] == 1


def test_no_interval_has_the_width_of_nothing() -> None:
    """Shares of 0 and 1, few prompts, and many rows of a few prompts all have intervals of some width."""
    names = [f"p{number}" for number in range(40)]
    for value in (0.0, 0.5, 1.0):
        for groups in (names, names[:3], [*"ab"] * 20, ["a"], [*names, *names]):
            found = intervals.share([value] * len(groups), groups, 0)
            low, high = found["low"], found["high"]
            assert low is not None
            assert high is not None
            assert 0 <= low <= value <= high <= 1
            assert high - low > 0.08
            assert (found["value"], found["number"]) == (value, len(groups))
    few = intervals.estimate([1.0, 2.0, 4.0], [*"abc"], 0)
    assert few == {"value": pytest.approx(7 / 3), "low": None, "high": None, "number": 3}
    assert intervals.share([], [], 0)["value"] is None
    won = [1.0, 0.5, 0.0, 1.0] * 10  # halves: not a plain share
    assert intervals.share(won, names, 0) == intervals.estimate(won, names, 0)
    # Four decided prompts, all won: chance gives so clear a result one time in eight.
    rare = intervals.share([1.0] * 4 + [0.5] * 28, names[:32], 0)
    assert rare["low"] < 0.5 < rare["high"]


def test_wilsons_interval_holds_what_it_says() -> None:
    """Its ends are the shares under which the observed one is just 1.96 standard errors away (Wilson, 1927)."""
    for value, number in ((0.3, 20), (0.9, 50), (0.02, 100)):
        for end in intervals.wilson(value, number):
            assert abs(value - end) / math.sqrt(end * (1 - end) / number) == pytest.approx(1.959964)
    assert intervals.wilson(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    names = [f"p{number}" for number in range(50)]
    values = np.arange(50) < 15
    found = intervals.share(values, names, 0)
    assert (found["low"], found["high"]) == intervals.wilson(0.3, 50)


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


def test_policies_are_compared_on_the_prompts_that_both_answered() -> None:
    """Three policies, one of which answered one prompt fewer: all pairs, each from both sides."""
    columns = {
        "first": {"p": 1.0, "q": 1.0, "r": 5.0},
        "second": {"p": 2.0, "q": 1.0},
        "third": {"p": 3, "q": 0, "r": 9},
    }
    scores = {
        name: pl.DataFrame(
            [("m", "Concise", False, prompt, float(score)) for prompt, score in column.items()],
            schema=["reward_model", "dimension", "opposite", "prompt_id", "score"],
            orient="row",
        )
        for name, column in columns.items()
    }
    wins = evaluation.score_wins(scores, 0)["m"]["Concise"]["plain"]
    for name, other in itertools.permutations(columns, 2):
        both = columns[name].keys() & columns[other].keys()
        won = [0.5 + 0.5 * np.sign(columns[name][prompt] - columns[other][prompt]) for prompt in both]
        assert wins[name][other]["value"] == pytest.approx(np.mean(won))
        assert wins[name][other]["number"] == len(both)
    means = evaluation.score_means(scores, 0)["m"]["Concise"]["plain"]
    assert {name: one["value"] for name, one in means.items()} == {
        name: pytest.approx(np.mean([*column.values()])) for name, column in columns.items()
    }


def test_distinct_words_do_not_depend_on_the_length() -> None:
    """In windows, and over all answers; each is recomputed the slow way."""
    chance = random.Random(0)
    texts = [" ".join(chance.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(30 + one % 40)) for one in range(40)]
    texts += ["short", ""]

    def measured(texts: list[str]) -> dict[str, intervals.Estimate]:
        rows = [{**ANSWER, "prompt_id": f"p{place}", "response": text} for place, text in enumerate(texts)]
        return evaluation.behaviour(pl.DataFrame(rows, schema=ANSWERS.schema), 0)

    found = measured(texts)
    words = [text.split() for text in texts]
    width = evaluation.WINDOW
    of_windows = [
        np.mean([len({*itertools.pairwise(row[at : at + width])}) / (width - 1) for at in range(len(row) - width + 1)])
        for row in words
        if len(row) >= width
    ]
    assert found["window_distinct_2"]["value"] == pytest.approx(np.mean(of_windows))
    assert found["window_distinct_2"]["number"] == 40
    pairs = [pair for row in words for pair in itertools.pairwise(row)]
    drawn = [len({*chance.sample(pairs, evaluation.SAMPLE)}) / evaluation.SAMPLE for _ in range(300)]
    assert found["corpus_distinct_2"]["number"] == len(pairs)
    assert found["corpus_distinct_2"]["value"] == pytest.approx(np.mean(drawn), abs=0.003)
    assert measured(texts[:2])["corpus_distinct_2"] == {**intervals.estimate([], [], 0), "number": 30 + 31 - 2}
    longer = measured([f"{text} {text}" for text in texts])  # says everything twice
    assert longer["distinct_1"]["value"] < 0.75 * found["distinct_1"]["value"]  # type: ignore[operator]
    assert longer["window_distinct_1"]["value"] == pytest.approx(found["window_distinct_1"]["value"], abs=0.03)
    assert longer["corpus_distinct_1"]["value"] == pytest.approx(found["corpus_distinct_1"]["value"], abs=0.03)


def test_what_answers_are_like() -> None:
    """Each column by hand: (instruction, answer, tokens, how it ended, its language kept or unknown, a refusal)."""
    english = "Which is the best way to learn how to swim, and how long does it take?"
    german = "Wie lerne ich am besten schwimmen, und wie lange dauert es wohl, bis man es kann?"
    long_english = "The best way to learn it is to go to the pool with a teacher, as often as you can."
    rows: list[tuple[str, str, int, str, float | None, float]] = [
        (english, "Paris has an airport, and the Spitfire was an aircraft that people remember.", 30, "eos", 1.0, 0.0),
        (german, long_english, 22, "length", 0.0, 0.0),
        (german, "Am besten lernt man das Schwimmen mit einem Lehrer, und zwar jeden Tag.", 17, "stop", 1.0, 0.0),
        (
            english,
            "I\u2019m sorry, but I can\u2019t help with that, since it may be dangerous for you.",
            9,
            "eos",
            1.0,
            1.0,
        ),
        (english, "As an AI, I cannot swim, and so I do not know how long it takes.", 8, "eos", 1.0, 1.0),
        (english, "Use a list as an aid. " + "It is long. " * 20 + "I cannot say more.", 90, "eos", 1.0, 0.0),
        (english, "7 7 7", 3, "eos", None, 0.0),
        (english, "", 1, "eos", None, 0.0),
    ]
    table = [
        {**ANSWER, "prompt_id": f"p{place}", "instruction": asked, "response": said}
        | {"response_tokens": tokens, "finish_reason": reason, "kl": float(place)}
        for place, (asked, said, tokens, reason, _, _) in enumerate(rows)
    ]
    found = evaluation.behaviour(pl.DataFrame(table, schema=ANSWERS.schema), 0)

    def mean(values: Iterable[float]) -> float:
        collected = list(values)
        return sum(collected) / len(collected)

    kept = [language for *_, language, _ in rows if language is not None]
    expected = {
        "words": mean(len(said.split()) for _, said, *_ in rows),
        "tokens": mean(tokens for _, _, tokens, *_ in rows),
        "finished": mean(reason != "length" for *_, reason, _, _ in rows),
        "language_kept": mean(kept),
        "refusals": mean(refused for *_, refused in rows),
        "kl": mean(range(len(rows))),
    }
    assert {name: found[name]["value"] for name in expected} == pytest.approx(expected)
    assert found["language_kept"]["number"] == len(kept)
    for size in (1, 2, 3):
        shares = []
        for _, said, *_ in rows:
            words = said.lower().split()
            grams = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
            shares += [len(set(grams)) / len(grams)] if grams else []
        assert found[f"distinct_{size}"]["value"] == pytest.approx(mean(shares))
        assert found[f"distinct_{size}"]["number"] == len(shares)


def test_agreement_is_measured_by_subset(tmp_path: Path) -> None:
    """RewardBench names subsets; each is checked by hand, and a whole source as before."""
    rows = [
        {"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No.", "subset": name}
        for number, name in enumerate(["chat", "chat", "code", "code", "code"])
    ]
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    plain = [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}]
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    sources = {name: {"format": "rewardbench", "path": str(tmp_path / f"{name}.json")} for name in ("bench", "plain")}
    given = {"output": tmp_path / "pairs.parquet", "evaluation": Evaluation(pairs=sources)}
    clean_evaluation_pairs.main(clean_evaluation_pairs.Arguments(**given))
    table = checked.read(tmp_path / "pairs.parquet", EVALUATION_PAIRS).collect()
    number = table["instruction"].str.extract(r"(\d)").cast(pl.Int64).fill_null(0).to_numpy()
    sign = np.where(table["preference"] == 1, 1.0, -1.0)
    margins = sign * np.where(number % 2, 1.0, -1.0)  # right about 1 and 3
    found = evaluation.agreement_by_subset(table, margins, 0)
    assert list(found) == ["bench"]
    right = {name: (one["value"], one["number"]) for name, one in found["bench"].items()}
    assert right == {"chat": (0.5, 2), "code": (pytest.approx(1 / 3), 3)}
    assert evaluation.agreement(table, margins, 0)["bench"]["value"] == pytest.approx(2 / 5)


def test_verdicts_are_win_rates(tmp_path: Path) -> None:
    """Both orders count: half a win if they disagree or find a tie; in policies.json, policies.md and the report."""
    both = {"a": ("policy", "policy"), "b": ("policy", "initial"), "c": ("initial", "initial"), "d": ("tie", "tie")}
    both |= {"e": ("policy", "tie"), "f": ("policy", None), "g": ("initial", "policy")}
    rows = [
        ("prompts", prompt, first, preferred, None if preferred else "unreadable")
        for prompt, pair in both.items()
        for first, preferred in zip((True, False), pair, strict=True)
    ]
    rows += [("mt_bench", "81", first, "policy", None) for first in (True, False)]
    table = pl.DataFrame(rows, schema=VERDICTS.schema, orient="row").sample(fraction=1, shuffle=True, seed=1)
    found = evaluation.verdict_wins(table, 0)
    assert set(found) == {"prompts", "mt_bench"}
    ours = found["prompts"]
    assert (ours["won"]["value"], ours["won"]["number"]) == (pytest.approx((1 + 0.5 + 0 + 0.5 + 0.5 + 0.5) / 6), 6)
    assert ours["agree"]["value"] == pytest.approx(2 / 5)  # two ties do not say which is better
    first = {"a": (1, 0), "b": (1, 1), "c": (0, 1), "e": (1,), "g": (0, 0)}
    shown = [value for values in first.values() for value in values]
    assert ours["first"]["value"] == pytest.approx(sum(shown) / len(shown))
    assert ours["first"]["number"] == len(shown)
    assert found["mt_bench"]["won"]["value"] == 1.0
    assert evaluation.verdict_wins(table.head(0), 0) == {}
    (folder := tmp_path / "policies").mkdir()
    answers = [{**ANSWER, "prompt_id": prompt} for prompt in both]
    write(folder / "answers.parquet", ANSWERS, answers, {"answers": len(answers)})
    scored = {"reward_model": "default", "dimension": "Concise", "score": 1.0}
    scores = [{**scored, "opposite": opposite, "prompt_id": prompt} for prompt in both for opposite in (False, True)]
    write(folder / "scores.parquet", SCORES, scores, {"scores": len(scores)})
    judged = [{"prompt_id": prompt, "dimension": "Concise", "s12": 1.0, "s21": 1.0} for prompt in both]
    write(folder / "judgements.parquet", JUDGEMENTS, judged, {"judged": 7, "rows": 7})
    write(folder / "verdicts.parquet", VERDICTS, table.rows(named=True), {"verdicts": len(table)})
    files = {name: str(folder / f"{name}.parquet") for name in ("answers", "scores")}
    before = {"name": "initial policy", **files, "initial": None, "judgements": None}
    run = {"name": "mine", **files, "initial": "initial policy"}
    run |= {name: str(folder / f"{name}.parquet") for name in ("judgements", "verdicts")}
    run |= {"versus": {"control": run["judgements"]}}
    given = {"policies": [before, run], "output": tmp_path / "found", "evaluation": Evaluation()}
    evaluate_policies.main(evaluate_policies.Arguments(**given))
    measured = json.loads((tmp_path / "found" / "policies.json").read_text())
    assert measured["endpoint"]["mine"]["initial policy"] == json.loads(json.dumps(found))
    (versus,) = (one.rows for one in figures.policies(measured).tables if one.heading.endswith("by the judge"))
    assert [row[:3] for row in versus] == [["Concise", "mine", "control"]]
    assert versus[0][3] == measured["versus"]["Concise"]["mine"]["control"] == intervals.share([1.0] * 7, [*both], 0)
    assert "| Concise, mine against control | 1.00 (" in (tmp_path / "found" / "policies.md").read_text()
    assert measured["initial"] == {"mine": "initial policy"}
    assert "| mine, mt_bench | initial policy | 1.00 (" in (tmp_path / "found" / "policies.md").read_text()
    heading = "Answers that the model behind the endpoint prefers to the initial policy's"
    (shown_rows,) = (one.rows for one in figures.policies(measured).tables if one.heading == heading)
    assert [row[:3] for row in shown_rows] == [
        ["mine", "initial policy", kind] for kind in measured["endpoint"]["mine"]["initial policy"]
    ]
    assert str(folder / "verdicts.parquet") in json.loads((tmp_path / "found" / "manifest.json").read_text())["inputs"]
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    asked = {"evaluation": {"judge_endpoint": {"url": "http://localhost/v1", "model": "judge"}}}
    for changes, has in (({}, False), (asked, True)):
        known = plan.Plan(configuration.load(merge(raw, changes), ROOT))
        needed = {one.name for one in known.origin("default", "policy_evaluation").inputs}
        assert (known.path("default", "verdicts") in needed) is has


ANSWER = {"source": "s", "instruction": "i", "input": "", "response": "A few words.", "finish_reason": "eos", "kl": 0.0}
ANSWER |= {"prompt_tokens": 1, "response_tokens": 3}


def write(path: Path, table: Table, rows: list[dict[str, Any]], counts: dict[str, int]) -> None:
    manifest = {"settings": {}, "inputs": {}, "counts": counts}
    write_table(pl.DataFrame(rows, schema=table.schema), path, table, manifest)


def records() -> pl.DataFrame:
    """Records of two prompts, with one and two principles; a rule decided the last one."""
    shown = [(["Concise"], [False]), (["Ethical", "Concise"], [True, False]), (["Ethical"], [False])]
    rows = []
    for number, (dimensions, negated) in enumerate(shown):
        definitions = [OPPOSITE[name][turned] for name, turned in zip(dimensions, negated, strict=True)]
        row = {"record_id": f"r{number}", "prompt_id": f"p{number // 2}", "preference": 1 + number % 2}
        row |= {"dimensions": dimensions, "negated": negated, "definitions": definitions}
        rows.append(row | {"deciding": dimensions[0] if number < 2 else None})
    return pl.DataFrame(rows)


def test_one_principle_is_turned_round_and_the_others_stay() -> None:
    variants = evaluation.turned(records(), OPPOSITE)
    assert variants.select("record", "turned", "definitions", "negated").rows() == [
        (0, "Concise", ["Do not be Concise."], [True]),
        (1, "Ethical", ["Be Ethical.", "Be Concise."], [False, False]),
        (1, "Concise", ["Do not be Ethical.", "Do not be Concise."], [True, True]),
        (2, "Ethical", ["Do not be Ethical."], [True]),
    ]


def test_numbers_of_held_out_records() -> None:
    table = records()
    margins = np.array([1.0, 1.0, 0.0])  # right, wrong (output 2 is preferred), undecided
    after = np.array([-1.0, -2.0, 3.0, 0.5])
    found = evaluation.held_out(table, margins, evaluation.turned(table, OPPOSITE), after, 0)
    assert found["accuracy"]["value"] == pytest.approx(0.5)
    concise, ethical = found["deciding"]["Concise"], found["deciding"]["Ethical"]
    assert (concise["plain"]["value"], concise["negated"]["value"]) == (1.0, None)
    assert (ethical["plain"]["value"], ethical["negated"]["value"]) == (None, 0.0)
    assert concise["calibration"] == evaluation.calibration(margins[:1], [1])
    # In the first record, output 1 is preferred; if Concise alone is reversed, output 2 is.
    errors = {"plain": 1 - 1 / (1 + np.exp(-1)), "negated": None, "turned": 1 / (1 + np.exp(1))}
    assert concise["calibration_error"] == pytest.approx(errors)
    assert concise["turned"]["value"] == 1.0  # output 2 is better now, and is preferred
    assert ethical["turned"]["value"] == 0.0  # output 1 should be, and is not
    low, high = intervals.wilson(0.5, 1)  # both from one prompt
    assert found["flips"]["Concise"] == {"value": 0.5, "low": low, "high": high, "number": 2}
    assert "clean" not in found
    assert "clean" not in concise
    clean = np.array([True, False, True])  # the wrong one was reversed by noise
    found = evaluation.held_out(table, margins, evaluation.turned(table, OPPOSITE), after, 0, clean)
    assert (found["clean"]["value"], found["clean"]["number"]) == (0.75, 2)
    assert found["deciding"]["Concise"]["clean"]["value"] == 1.0
    assert found["deciding"]["Ethical"]["clean"]["number"] == 0
    shown = figures.reward_model("", {"held_out": found}).tables[0]
    assert shown.columns[-1] == "clean labels"
    assert [row[-1]["number"] for row in shown.rows] == [1, 0, 2]  # type: ignore[call-overload,index]
    assert found["flips"]["Ethical"]["value"] == pytest.approx(0.5)  # from the second record, not from an undecided one


def test_probabilities_of_a_calibrated_model_come_true() -> None:
    generator = np.random.default_rng(0)
    margins = generator.normal(0, 2, 20_000)
    labels = np.where(generator.random(20_000) < 1 / (1 + np.exp(-margins)), 1, 2).tolist()
    calibrated = evaluation.calibration(margins, labels)
    assert calibrated["error"] < 0.02
    assert sum(one["number"] for one in calibrated["bins"]) == 20_000
    assert all(abs(one["expected"] - one["observed"]) < 0.05 for one in calibrated["bins"])
    assert evaluation.calibration(3 * margins, labels)["error"] > 0.1
    assert evaluation.calibration([], []) == {"bins": [], "error": None}


def test_clean_labels_are_those_of_the_judge(tmp_path: Path) -> None:
    """Labels that noise has not reversed; if the mean of both orders decided, only where they agree."""
    rows = [("r0", "p0", "Concise", False), ("r1", "p0", "Ethical", True), ("r2", "p1", "Concise", False)]
    rows += [("r3", "p1", None, False), ("r4", "p2", None, False)]  # decided by a rule, and by the sum
    filled = {"instruction": "i", "input": "", "output_1": "a", "output_2": "b", "preference": 1, "swapped": False}
    filled |= {"dimensions": NAMES, "negated": [False] * 2, "definitions": NAMES, "scores": [1.0] * 2}
    table = pl.DataFrame(
        [
            {**filled, "record_id": record, "prompt_id": prompt, "deciding": name, "flipped": flipped}
            | {"rule": "language" if record == "r3" else None}
            for record, prompt, name, flipped in rows
        ],
        schema=PRINCIPLE_RECORDS.schema,
    )
    counts = {"settings": {}, "inputs": {}, "counts": {"records": 5}}
    write_table(table, tmp_path / "records.parquet", PRINCIPLE_RECORDS, counts)
    judged = [("p0", "Concise", 1.0, 2.0), ("p0", "Ethical", 1.0, 1.0), ("p1", "Concise", 3.0, -1.0)]
    judged += [("p1", "Ethical", 1.0, -1.0)]
    counts = {"settings": {}, "inputs": {}, "counts": {"judged": 2, "rows": 4}}
    frame = pl.DataFrame(judged, schema=JUDGEMENTS.schema, orient="row")
    write_table(frame, tmp_path / "preferences.parquet", JUDGEMENTS, counts)
    held = table.select(list(PREFERENCE_RECORDS.columns)).reverse()
    of_all = clean_records(tmp_path / "records.parquet", None, held)
    of_both = clean_records(tmp_path / "records.parquet", tmp_path / "preferences.parquet", held)
    assert of_all is not None
    assert of_both is not None
    assert of_all.tolist() == [True, True, True, False, True]
    assert of_both.tolist() == [False, True, False, False, True]


def test_a_reward_model_of_others_is_measured_by_people(world: World, tmp_path: Path) -> None:
    """Nobody knows what it was trained on; its agreement with people is measured in every way, and drawn."""
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    known = plan.Plan(configuration.load(merge(raw, {"reward_model": {"path": "owner/theirs"}}), ROOT))
    assert known.path("default", "reward_evaluation") in known.target_paths("evaluation")
    assert known.measuring("default", "reward_data") is None
    mean = plan.Plan(configuration.load(merge(raw, {"aggregation": {"agreement": "mean"}}), ROOT))
    for one, needed in ((mean, True), (plan.Plan(configuration.load(raw, ROOT)), False)):
        made_of = {source.name for source in one.origin("default", "reward_evaluation").inputs}
        assert (one.path("default", "preferences") in made_of) is needed
    texts = [("A good answer.", "No.", None), ("Yes. " * 60, "No.", "long"), ("Yes.", "No.", "short")] * 2
    pairs = [
        record("mine", Comparison(f"Question {number}?", *outputs, subset=subset), 0)
        for number, (*outputs, subset) in enumerate(texts)
    ]
    write(tmp_path / "pairs.parquet", EVALUATION_PAIRS, pairs, {"kept": 6})
    shown = [{"dimension": n, "definition": f"Be {n}.", "negative_definition": f"Be not {n}."} for n in NAMES]
    (tmp_path / "principles.json").write_text(json.dumps(shown))
    lengths = {"max_length": 400, "query_length": 100, "response_length": 100}
    settings = RewardModel(template=str(world.folder / "reward.txt"), learning_rate=0.1, **lengths)
    given = {
        "reward_model": world.reward_model,
        "pairs": tmp_path / "pairs.parquet",
        "principles": tmp_path / "principles.json",
        "output": tmp_path / "measured",
        "model": world.model.without_adapter(),
        "trained": settings,
        "dimensions": json.dumps(NAMES),
        "evaluation": Evaluation(),
    }
    evaluate_reward_model.main(evaluate_reward_model.Arguments(**given))
    found = json.loads((tmp_path / "measured" / "reward_model.json").read_text())
    assert set(found) == {"people", "subsets"}
    assert {name: one["number"] for name, one in found["subsets"]["mine"].items()} == {"long": 2, "short": 2}
    assert set(found["people"]) == {"all", *(f"{name}{way}" for name in NAMES for way in ("", ", negated"))}
    assert found["people"]["all"]["mine"]["number"] == 6
    manifest = json.loads((tmp_path / "measured" / "manifest.json").read_text())
    assert not any("eval_examples" in name for name in manifest["settings"])
    assert manifest["counts"] == {
        **{"held_out": 0, "turned": 0, "pairs": 6, "pairs: instructions cut": 0, "pairs: outputs cut": 2}
    }
    options = {"measured": tmp_path / "measured", "title": "T", "output": tmp_path / "drawn"}
    draw_reward_model.main(draw_reward_model.Arguments(**options))
    assert "Agreement with people, by subset" in (tmp_path / "drawn" / "table.html").read_text()
    with pytest.raises(UserError, match="nothing to measure"):
        evaluate_reward_model.main(evaluate_reward_model.Arguments(**given | {"pairs": None}))


# ---- The rules, on the small run


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
