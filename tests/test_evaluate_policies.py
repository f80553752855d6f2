"""Measurements of policies: behaviour, win rates and verdicts, each recomputed the slow way."""

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

import evaluate_policies
from salmon import configuration, evaluation, figures, intervals, plan
from salmon.config import Evaluation
from salmon.tables import ANSWERS, JUDGEMENTS, SCORES, VERDICTS
from tests.running import merge, write_rows

ROOT = Path(__file__).parents[1]


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


def test_verdicts_are_win_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    write_rows(folder / "answers.parquet", ANSWERS, answers, {"answers": len(answers)})
    scored = {"reward_model": "default", "dimension": "Concise", "score": 1.0}
    scores = [{**scored, "opposite": opposite, "prompt_id": prompt} for prompt in both for opposite in (False, True)]
    write_rows(folder / "scores.parquet", SCORES, scores, {"scores": len(scores)})
    judged = [{"prompt_id": prompt, "dimension": "Concise", "s12": 1.0, "s21": 1.0} for prompt in both]
    write_rows(folder / "judgements.parquet", JUDGEMENTS, judged, {"judged": 7, "rows": 7})
    write_rows(folder / "verdicts.parquet", VERDICTS, table.rows(named=True), {"verdicts": len(table)})
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
    write_rows(folder / "judgements.parquet", JUDGEMENTS, [], {"judged": 0, "rows": 0})
    with caplog.at_level("WARNING"):
        evaluate_policies.main(evaluate_policies.Arguments(**given | {"output": tmp_path / "unread"}))
    for other in ("initial policy", "control"):
        assert f"the judge has read no answers of mine and {other}" in caplog.text
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    asked = {"evaluation": {"judge_endpoint": {"url": "http://localhost/v1", "model": "judge"}}}
    for changes, has in (({}, False), (asked, True)):
        known = plan.Plan(configuration.load(merge(raw, changes), ROOT))
        needed = {one.name for one in known.origin("default", "policy_evaluation").inputs}
        assert (known.path("default", "verdicts") in needed) is has


ANSWER = {"source": "s", "instruction": "i", "input": "", "response": "A few words.", "finish_reason": "eos", "kl": 0.0}
ANSWER |= {"prompt_tokens": 1, "response_tokens": 3}
