"""Measurements of a reward model: each number is recomputed the slow way; the script runs on real files."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

import clean_evaluation_pairs
import draw_reward_model
import evaluate_reward_model
from evaluate_reward_model import clean_records
from salmon import checked, configuration, evaluation, figures, intervals, plan, training
from salmon import reward_model as rewards
from salmon.artifacts import write_table
from salmon.config import Evaluation, RewardModel, RewardTraining
from salmon.errors import UserError
from salmon.formats import Comparison
from salmon.preference_data import record
from salmon.tables import EVALUATION_PAIRS, JUDGEMENTS, PMP_RECORDS, PREFERENCE_RECORDS, PRINCIPLE_RECORDS
from tests.ppo_world import World
from tests.running import merge, write_rows

ROOT = Path(__file__).parents[1]
NAMES = ["Concise", "Ethical"]
OPPOSITE = {name: (f"Be {name}.", f"Do not be {name}.") for name in NAMES}


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
    write_rows(tmp_path / "pairs.parquet", EVALUATION_PAIRS, pairs, {"kept": 6})
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
    # Of the same pairs, PMP held out some: their numbers are those of these pairs alone, with all principles shown.
    pmp_data, held = tmp_path / "pmp.parquet", tmp_path / "held.parquet"
    plain = [{name: value for name, value in row.items() if name != "subset"} for row in pairs]
    of_pmp = RewardTraining(template=settings.template, learning_rate=0.1, **lengths, eval_examples=3, seed=5)
    write_rows(pmp_data, PMP_RECORDS, plain, {"kept": 6})
    _, kept = training.split(rewards.read_records(pmp_data)[0], 3, 5, rewards.NAME)
    write_rows(held, PMP_RECORDS, [row for row in plain if row["record_id"] in [*kept["record_id"]]], {"kept": 3})
    more = {"pairs": held, "pmp_data": pmp_data, "pmp": of_pmp, "output": tmp_path / "again"}
    evaluate_reward_model.main(evaluate_reward_model.Arguments(**given | more))
    again = json.loads((tmp_path / "again" / "reward_model.json").read_text())
    assert again["held_out_of_pmp"] == again["people"]["all"]
    assert again["held_out_of_pmp"]["mine"]["number"] == 3
    manifest = json.loads((tmp_path / "again" / "manifest.json").read_text())
    assert (manifest["settings"]["pmp_eval_examples"], manifest["settings"]["pmp_seed"]) == (3, 5)
    assert manifest["counts"]["held_out_of_pmp"] == 3
    of_none = {"eval_examples": 0}
    for nothing in (
        {"records": pmp_data, "trained": settings.model_copy(update=of_none)},
        {"pmp_data": pmp_data, "pmp": of_pmp.model_copy(update=of_none)},
    ):
        with pytest.raises(UserError, match="nothing to measure"):
            evaluate_reward_model.main(evaluate_reward_model.Arguments(**given | {"pairs": None} | nothing))
    with pytest.raises(UserError, match="--pmp-data needs --pmp"):
        evaluate_reward_model.main(evaluate_reward_model.Arguments(**given | {"pmp_data": pmp_data}))


def test_what_no_training_holds_out_is_not_measured() -> None:
    """Neither people's pairs nor held-out records: no job is planned."""
    raw = yaml.safe_load((ROOT / "config.yaml").read_text())
    none = dict.fromkeys(raw["evaluation"]["pairs"])
    after_pmp, after = ("pmp_evaluation", "reward_evaluation")
    for of_pmp, of_records, pairs, found in (
        (500, 500, {}, {after_pmp, after}),
        (0, 0, {}, {after_pmp, after}),
        (0, 0, none, set()),
        (0, 500, none, {after}),
        (500, 0, none, {after_pmp, after}),
    ):
        change = {"pmp": {"eval_examples": of_pmp}, "reward_model": {"eval_examples": of_records}}
        known = plan.Plan(configuration.load(merge(raw, change | {"evaluation": {"pairs": pairs}}), ROOT))
        assert {name for name in (after_pmp, after) if known.has("default", name)} == found
        measured = known.measuring("default", "pmp_data")
        assert (measured is not None) == (of_pmp > 0)
        if after in found:
            inputs = {source.name for source in known.origin("default", after).inputs}
            assert (known.path("default", "pmp_data") in inputs) == (of_pmp > 0)
    assert plan.Plan(configuration.load(raw, ROOT)).measuring("no_pmp", "pmp_data") is None
