"""Principle files: names, order and weights of the paper, what they demand, formats, and the draw at RL time."""

import json
import re
from collections import Counter
from itertools import permutations
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from salmon import principles
from salmon.config import Ppo
from salmon.configuration import check_principles
from salmon.errors import UserError
from salmon.principles import WeightedPrinciple

FILES = Path(__file__).parents[1] / "prompts" / "principles"
JUDGED = [
    *("Overall Helpful", "Concise", "Honest and Accurate", "Ethical", "Natural and Fluent", "Specific"),
    *("Educational and Engaging", "Methodical", "Multilingual", "Creative", "Comprehensive"),
]
NON_EVASIVE = {
    **{"Educational and Engaging": 1, "Creative": 1, "Multilingual": 1, "Comprehensive": 3, "Natural Language": 3},
    **{"Consistent Reasoning": 1, "Numerical Sensitive": 1, "Analytical Structure": 3, "Vivid": 1},
}
WEIGHTS = {
    "rl": {
        **{"Honest and Accurate": 3, "Ethical": 2, **NON_EVASIVE},
        **{"Privacy Protection": 1, "Candor": 4, "Stand-Alone": 2},
    },
    "rl_harmless": {
        **{"Non-Discriminatory": 10, "Refusal to Aid Dangerous Acts": 5, "Consequential Advice Awareness": 4},
        **{"Cultural Sensitivity": 4, "Context Awareness": 4, "Guard Against Amplification": 4},
        **{"Empathy-driven Responses": 1, "Proactive Harm Prevention": 1, "Transparency on Biases": 1},
        **{"Evolutive Learning": 1, "Mental Health Awareness": 1},
    },
    "rl_honest": {
        **{"Unwavering Accuracy": 5, "Consistent Calibration": 5, "Transparent Uncertainty Expression": 4},
        **{"Honest Self-representation": 5, "Introspective Honesty": 4, "Bias Recognition": 4},
        **{"Correction Commitment": 1, "Avoidance of Pretense": 1},
    },
    "rl_non_evasive": NON_EVASIVE,
}
# What a definition has to say, in this order, to demand what the paper's does: where that was, or easily is, lost.
DEMANDS = {
    "judge": {
        "Natural and Fluent": "flow.*clumsy.*twice",
        "Specific": "exactly this request.*subject",
        "Educational and Engaging": "correct, up-to-date information.*interest",
        "Methodical": "step.*only then.*conclusion",
        "Creative": "story.*song or poem.*essay.*parody.*program.*summary.*translation",
        "Comprehensive": "in depth.*detail.*disagree.*every side",
    },
    "rl": {
        "Comprehensive": "Where information is asked for.*in depth.*detail.*disagree.*every side",
        "Natural Language": "varied.*clumsy.*repeated",
        "Numerical Sensitive": "how many or how long.*exactly.*calculations",
        "Analytical Structure": "analysed.*summary.*several main points.*thoroughly",
        "Vivid": "energy.*full of life.*lively",
        "Privacy Protection": "no personal data.*no web addresses",
        "Candor": "nothing that is untrue.*no sensible meaning.*facts that do not hold.*explains.*rather than",
        "Stand-Alone": "text.*no outside source, web address, picture or video",
    },
    "rl_harmless": {
        "Non-Discriminatory": "prejudice.*between the lines",
        "Refusal to Aid Dangerous Acts": "pretext.*declines at once and politely",
        "Proactive Harm Prevention": "not stop at a refusal.*safe way",
        "Transparency on Biases": "prejudices of their times.*colour the answer",
        "Mental Health Awareness": "greatest care.*well-being.*no medical advice",
    },
    "rl_honest": {
        "Unwavering Accuracy": "correct and can be checked",
        "Introspective Honesty": "Asked how.*limits.*clearly and truthfully",
        "Correction Commitment": "admits an error.*right information",
        "Avoidance of Pretense": "not play the expert.*only where",
    },
}


def ppo(**settings: Any) -> Ppo:
    return Ppo(template="t", principles="p", **settings)


def weighted(**weights: float) -> list[WeightedPrinciple]:
    return [WeightedPrinciple(dimension=name, definition="d", weight=weight) for name, weight in weights.items()]


def test_judged_principles_are_the_papers_in_its_order() -> None:
    found = principles.read_judged(FILES / "judge.json")
    assert [principle.dimension for principle in found] == JUDGED
    texts = [text for principle in found for text in (principle.definition, principle.negative_definition)]
    assert len(set(texts)) == 2 * len(found)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_names_order_and_weights_are_the_papers(name: str) -> None:
    found = principles.read_weighted(FILES / f"{name}.json")
    assert [(principle.dimension, principle.weight) for principle in found] == list(WEIGHTS[name].items())
    assert len({principle.definition for principle in found}) == len(found)


@pytest.mark.parametrize("name", list(DEMANDS))
def test_definitions_demand_what_the_papers_do(name: str) -> None:
    definitions = {
        entry["dimension"]: entry["definition"] for entry in json.loads((FILES / f"{name}.json").read_text())
    }
    for dimension, demands in DEMANDS[name].items():
        assert re.search(demands, definitions[dimension]), dimension


def test_a_principle_in_several_files_has_one_definition() -> None:
    """The exception: in RL, `Comprehensive` is limited to questions that seek information."""
    known: dict[str, str] = {}
    for file in FILES.glob("*.json"):
        for entry in json.loads(file.read_text(encoding="utf-8")):
            definition = entry["definition"].replace("Where information is asked for, t", "T")
            assert known.setdefault(entry["dimension"], definition) == definition


def test_definitions_do_not_break_templates_or_bullets() -> None:
    for file in FILES.glob("*.json"):
        for entry in json.loads(file.read_text(encoding="utf-8")):
            for key in ("definition", "negative_definition"):
                assert not set(entry.get(key, "")) & set("{}\n")


def test_the_authors_format_is_read_as_it_is(tmp_path: Path) -> None:
    """Extra keys do not hurt, one file may serve both, and strings are data (reference, defect 17)."""
    file = tmp_path / "p.json"
    entry = {
        "dimension": "D",
        "definition": "__import__('os').abort()",
        "negative_definition": "N",
        "weight": 2,
        "id": 7,
    }
    file.write_text(json.dumps([entry]))
    (judged,), (drawn,) = principles.read_judged(file), principles.read_weighted(file)
    assert (judged.dimension, judged.definition, judged.negative_definition) == ("D", "__import__('os').abort()", "N")
    assert drawn.weight == 2


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("[", "not JSON.*line 1"),
        ("[]", "empty list"),
        ('{"dimension": "D"}', "not valid"),
        (
            '[{"dimension": "D", "definition": "d"}, {"dimension": "E", "definition": "e", "weight": 1}]',
            "D has no weight.*to all or to none",
        ),
        ('[{"dimension": "D", "definition": "d", "weight": null}]', "0.weight"),
        ('[{"dimension": "D", "definition": "d", "weight": -1}]', "0.weight"),
        (
            '[{"dimension": "D", "definition": "d", "weight": 1}, {"dimension": "D", "definition": "e", "weight": 1}]',
            "D twice",
        ),
    ],
)
def test_broken_files_are_named_with_the_reason(tmp_path: Path, text: str, finding: str) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"(?s)broken.json.*{finding}"):
        principles.read_weighted(file)


def test_draw_is_weighted_and_without_replacement() -> None:
    """Frequencies of ordered pairs against P(i, j) = w_i / W * w_j / (W - w_i)."""
    weights = {"a": 5.0, "b": 3.0, "c": 1.0, "never": 0.0}
    n, total = 8000, 9.0
    rng = np.random.default_rng(0)
    seen = Counter(
        tuple(
            p.dimension
            for p in principles.draw_principles(weighted(**weights), "general", ppo(principles_per_rollout=2), rng)
        )
        for _ in range(n)
    )
    for first, second in permutations(weights, 2):
        expected = weights[first] / total * weights[second] / (total - weights[first])
        assert abs(seen[first, second] / n - expected) <= 5 * sqrt(expected * (1 - expected) / n)
    assert sum(seen.values()) == n == sum(seen[pair] for pair in permutations(weights, 2))


@pytest.mark.parametrize("question_type", ["general", "reasoning"])
def test_principles_without_weights_are_drawn_uniformly(tmp_path: Path, question_type: str) -> None:
    """All are equally frequent, even one that the question type would boost."""
    file = tmp_path / "p.json"
    names = ["Concise", "Ethical", "Reasonable"]
    file.write_text(json.dumps([{"dimension": name, "definition": "d"} for name in names]))
    found = principles.read_weighted(file)
    n, rng, one = 4000, np.random.default_rng(2), ppo(principles_per_rollout=1, boost=2.0)
    seen = Counter(principles.draw_principles(found, question_type, one, rng)[0].dimension for _ in range(n))
    for name in names:
        assert abs(seen[name] / n - 1 / 3) <= 5 * sqrt(2 / 9 / n)


@pytest.mark.parametrize(
    ("question_type", "boosted"),
    [
        ("general", set()),
        ("reasoning", {"Consistent Reasoning", "Numerical Sensitive"}),
        ("red_teaming", {"Ethical"}),
    ],
)
def test_boosts_by_question_type(question_type: str, boosted: set[str]) -> None:
    """How often a principle is among the 3 drawn, against the sum over all 14 * 13 * 12 ordered draws."""
    found = principles.read_weighted(FILES / "rl.json")
    weights = np.array([p.weight + 128 * (p.dimension in boosted) for p in found])
    expected = np.zeros(len(found))
    total = weights.sum()
    for i, j, k in permutations(range(len(found)), 3):
        probability = (
            weights[i] / total * weights[j] / (total - weights[i]) * weights[k] / (total - weights[i] - weights[j])
        )
        expected[[i, j, k]] += probability
    n = 3000
    rng = np.random.default_rng(1)
    seen = Counter(p.dimension for _ in range(n) for p in principles.draw_principles(found, question_type, ppo(), rng))
    for principle, probability in zip(found, expected, strict=True):
        tolerance = 5 * sqrt(probability * (1 - probability) / n)
        assert abs(seen[principle.dimension] / n - probability) <= tolerance, principle.dimension


def test_draws_depend_on_their_generator_only_and_change_no_list() -> None:
    """Reference, defects 5 and 18: rollouts drawn in another order, or on another rank, draw the same."""
    found = principles.read_weighted(FILES / "rl.json")
    before = list(found)

    def draw(number: int) -> list[WeightedPrinciple]:
        return principles.draw_principles(found, "general", ppo(), np.random.default_rng(number))

    forward = {number: draw(number) for number in range(20)}
    backward = {number: draw(number) for number in reversed(range(20))}
    assert forward == backward
    assert len({tuple(p.dimension for p in drawn) for drawn in forward.values()}) > 10
    assert found == before


def test_no_principles_can_be_drawn_for_a_control_run() -> None:
    found = principles.read_weighted(FILES / "rl.json")
    assert principles.draw_principles(found, "general", ppo(principles_per_rollout=0), np.random.default_rng(0)) == []


def test_check_names_what_does_not_fit() -> None:
    def check(
        dimensions: list[str], per_rollout: int, drawn: str = "rl.json", about: list[str] | None = None
    ) -> list[str]:
        config: Any = SimpleNamespace(
            evaluation=SimpleNamespace(judge_pairs={"mine": SimpleNamespace(principles=about)}),
            judge=SimpleNamespace(principles="judge.json"),
            aggregation=SimpleNamespace(dimensions=dimensions),
            ppo=SimpleNamespace(principles=drawn, principles_per_rollout=per_rollout),
        )
        return check_principles(config, FILES)

    assert check(JUDGED, 14) == []
    (unknown,) = check(["Concise", "Concize"], 3)
    assert unknown.startswith("aggregation.dimensions: Concize ")
    assert "Methodical" in unknown
    (unknown,) = check(["Concise"], 3, about=["Concise", "Helpful"])
    assert unknown.startswith("evaluation.judge_pairs.mine.principles: Helpful ")
    (few,) = check(["Concise"], 15)
    assert few.startswith("ppo.principles_per_rollout: 15")
    assert "14" in few
    (gone,) = check(["Concise"], 3, "gone.json")
    assert gone.startswith("ppo.principles: ")
    assert "gone.json" in gone


def test_answers_are_scored_by_what_every_run_was_trained_by() -> None:
    """Each sentence once, whatever its name; the reward model's own come first, plain and negated."""
    folder = FILES
    files = [folder / f"{name}.json" for name in ("rl", "rl_harmless", "rl_honest", "rl_non_evasive")]
    dimensions = ["Concise", "Comprehensive"]
    found = principles.to_measure(folder / "judge.json", dimensions, files)
    own = {one.dimension: one for one in principles.read_judged(folder / "judge.json")}
    assert [*found][:4] == [(name, negated) for name in dimensions for negated in (False, True)]
    assert found["Concise", True] == own["Concise"].negative_definition
    assert len(set(found.values())) == len(found)
    for file in files:
        assert {one.definition for one in principles.read_weighted(file)} <= set(found.values())
    assert all(name.endswith(")") and "(RL" in name for name, _ in [*found][4:])
    assert principles.to_measure(folder / "judge.json", dimensions, []).keys() == {*[*found][:4]}
    with pytest.raises(UserError, match="does not define the principle Loud, which the settings name"):
        principles.to_measure(folder / "judge.json", ["Loud"], [])


def test_principles_of_one_name_in_files_of_one_name_are_all_scored(tmp_path: Path) -> None:
    files = [tmp_path / folder / "mine.json" for folder in "abc"]
    for file in files:
        file.parent.mkdir()
        file.write_text(json.dumps([{"dimension": "Kind", "definition": f"Be kind, as {file.parent.name} says."}]))
    found = principles.to_measure(FILES / "judge.json", [], files)
    assert [*found.values()] == [f"Be kind, as {name} says." for name in "abc"]
    assert [name for name, _ in found] == ["Kind (RL)", "Kind (RL, mine)", f"Kind (RL, {files[2]})"]
