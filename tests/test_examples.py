"""The overlays for common models: each is a configuration of the paper's whole run, and its architecture is tested."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from demo import oracles
from examples.own_principle import score
from examples.smollm2 import write_readme
from salmon import intervals, models
from salmon.config import Lora, Model
from salmon.tokenizers import load_tokenizer
from tests.test_workflow import PARENTS, elsewhere, jobs, snakemake
from tests.zoo import ARCHITECTURES

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
OTHERS = {"authors"}  # covered by test_imports.py
KINDS = {
    "qwen2.5-0.5b": "qwen2",
    "qwen3-8b": "qwen3",
    "llama-3.2-1b": "llama_tied",
    "llama-3.1-8b": "llama3_rope",
    "mistral-7b": "mistral_full",  # version 0.3 has no sliding window
    "gemma-3-4b": "gemma3_vision",
}
"""Overlay -> its architecture in the matrix (`tests/test_models.py`)."""


def test_every_overlay_is_of_a_tested_architecture() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} - OTHERS == set(KINDS)
    assert set(KINDS.values()) <= set(ARCHITECTURES)
    results = [yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["pathvars"]["results"] for name in KINDS]
    assert results == [f"results/{name}" for name in KINDS]


@pytest.mark.parametrize("name", KINDS)
def test_an_overlay_is_the_whole_of_the_papers_run(tmp_path: Path, name: str) -> None:
    """From the prompts to the policy, as the paper's configuration has it, with the profile of one machine."""
    overlay = ("--configfile", f"examples/{name}.yaml", "--profile", "profiles/local")
    run = snakemake("-n", *overlay, *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert {"sample_responses", "judge_preferences", "train_pmp", "train_reward_model", "train_policy"} <= set(counts)
    assert counts["train_policy"] == 1
    assert counts["sample_responses"] == 8


def test_the_example_of_a_real_model_is_whole(tmp_path: Path) -> None:
    """A dry run: one reward model for its four runs, and all that is measured."""
    overlay = ("--configfile", "examples/smollm2/config.yaml", "--profile", "profiles/cpu")
    base = tmp_path / "model"
    base.mkdir()
    (base / "config.json").write_text("{}")
    run = snakemake("-n", *overlay, *elsewhere(tmp_path / "results"), f"model={{base: {base}}}")
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    wanted = {"train_pmp": 1, "train_reward_model": 1, "train_policy": 4, "evaluate_judge": 1, "evaluate_policies": 1}
    assert {name: counts.get(name) for name in wanted} == wanted


def test_a_principle_of_ones_own_is_one_more_run_of_the_demo(tmp_path: Path) -> None:
    """A dry run: the demo's own reward model, and one policy that is shown the principle; the page shows both files."""
    overlay = ("--profile", "profiles/demo", "--configfile", "demo/config.yaml", "examples/own_principle/config.yaml")
    run = snakemake("-n", str(tmp_path / "runs/curious/policy"), *overlay, *elsewhere(tmp_path))
    assert run.returncode == 0, run.stderr
    counts = jobs(run.stdout + run.stderr)
    assert {*counts} == {*PARENTS, "make_demo_data"}
    assert (counts["train_reward_model"], counts["train_policy"]) == (1, 1)
    page = (ROOT / "docs" / "your_principles.md").read_text()
    principle = (EXAMPLES / "own_principle" / "curious.json").read_text()
    assert principle in page
    assert all(f"| {sentence} " in page for sentence in score.SENTENCES)
    shown = re.findall(r"```yaml\n(runs:\n.*?)```", page, re.S)
    assert yaml.safe_load((EXAMPLES / "own_principle" / "config.yaml").read_text()) == yaml.safe_load(shown[0])
    # A word that the demo's world lacks would be single letters to its model.
    vocabulary = {token for token, _ in json.loads((ROOT / "demo/model/tokenizer.json").read_text())["model"]["vocab"]}
    (entry,) = json.loads(principle)
    first, *words = re.findall(r"\w+", entry["definition"])
    assert {first, *(f"\u0120{word}" for word in words)} <= vocabulary


def test_sentences_are_held_against_the_oracles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward model that counts tokens dislikes what the oracle of conciseness likes, under any sentence."""
    base = Model(base=str(ROOT / "demo/model"), quantization="none", dtype="float32")
    models.new_reward_model(base, Lora(r=2), "cpu", 0).save_pretrained(str(tmp_path / "models/reward_model"))
    sentences = ["The output is short.", "It is long."]
    read: list[list[str]] = []

    def count_tokens(_: Any, tokens: Any, *__: Any) -> torch.Tensor:
        tokenizer = load_tokenizer(base)
        read.append(tokenizer.batch_decode(tokens))
        return torch.tensor([float(len(text)) for text in tokens])

    monkeypatch.setattr("salmon.reward_model.score", count_tokens)
    score.main(score.Arguments(sentences=sentences, results=tmp_path, answers=30, threads=1))
    header, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines()]
    assert header == ["sentence", *oracles.ORACLES]
    assert [row[0] for row in rows] == sentences
    assert rows[0][1:] == rows[1][1:]
    assert float(rows[0][header.index("Concise")]) < -0.8
    assert all(f"- {sentence}\n" in text for sentence, texts in zip(sentences, read, strict=True) for text in texts)


def test_correlations_are_pearsons() -> None:
    rewards, marks = np.array([[1.0, 2.0, 4.0]]), np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])

    def pearson(one: Any, other: Any) -> float:
        one, other = one - one.mean(), other - other.mean()
        return float((one * other).sum() / math.sqrt((one**2).sum() * (other**2).sum()))

    wanted = [[pearson(rewards[0], marks[:, column]) for column in (0, 1)]]
    assert score.correlations(rewards, marks) == pytest.approx(np.array(wanted))


@pytest.mark.parametrize(
    ("first", "second", "is_shorter", "is_more_orderly"),
    [
        ("one two", "one two three", 1, 0),
        ("one two three", "one two", -1, 0),
        ("a b c d e f g h i j", "a b c d e f g h i j k", 0, 0),
        ("1. a\n2. b\n3. c", "a b c d e f", 0, 1),
        ("- a\n* b\nno", "x - a\n1) b\n2. c\n3. d", 1, -1),
    ],
)
def test_what_programs_can_tell(first: str, second: str, is_shorter: int, is_more_orderly: int) -> None:
    assert write_readme.shorter("", first, second) == is_shorter
    assert write_readme.longer("", first, second) == -is_shorter
    assert write_readme.more_orderly("", first, second) == is_more_orderly


def test_a_program_knows_the_language_that_was_asked_for() -> None:
    german = "Wie kann ich am besten eine Fremdsprache lernen, und wie lange wird es dauern?"
    english = "The best way to learn a foreign language is to speak it every day with other people."
    answer = "Am besten spricht man die Sprache jeden Tag mit anderen Menschen, und liest viele Texte."
    assert write_readme.same_language(german, answer, english) == 1
    assert write_readme.same_language(german, english, answer) == -1
    assert write_readme.same_language(german, answer, german) == 0
    assert write_readme.same_language(german, answer, "7") == 0


def test_the_numbers_of_the_readme(small_run: Path, tmp_path: Path) -> None:
    """Any evaluated results give them; the judge's comparison with programs is recomputed the slow way."""
    readme = tmp_path / "README.md"
    readme.write_text(f"Before.\n{write_readme.BEGIN}\nold\n{write_readme.END}\nAfter.\n")
    results = small_run / "results"
    write_readme.main(write_readme.Arguments(results=results, output=readme))
    text = readme.read_text()
    assert text.startswith("Before.")
    assert text.endswith("After.\n")
    assert "\nold\n" not in text
    judge = json.loads((results / "evaluation/judge/judge.json").read_text())
    texts = [
        dict(pl.read_parquet(results / f"responses/response{index}.parquet")["prompt_id", "response"].iter_rows())
        for index in (0, 1)
    ]
    sure, right, mean_right = [], [], []
    for row in pl.read_parquet(results / "preferences/preferences.parquet").iter_rows(named=True):
        if row["dimension"] != "Concise":
            continue
        one, other = (len(each[row["prompt_id"]].split()) for each in texts)
        if max(one, other) < 1.25 * min(one, other):
            continue
        first = one < other
        sure.append(row["prompt_id"])
        mean_right.append(0.5 if row["s12"] + row["s21"] == 0 else float((row["s12"] + row["s21"] > 0) == first))
        if row["s12"] * row["s21"] > 0:
            right.append(float((row["s12"] > 0) == first))
    found = next(line for line in text.splitlines() if line.startswith("| Concise | ")).split(" | ")
    assert found[1] == write_readme.shown(judge["principles"]["Concise"]["agree"])
    sure_right = f"{sum(right) / len(right):.2f} (" if right else ""
    assert found[4].startswith(sure_right)
    assert found[4].endswith(f") of {len(right)}" if right else "")
    assert found[5].startswith(f"{write_readme.shown(intervals.share(mean_right, sure, 0))} of {len(sure)}")
    lists = [line.split(" | ")[2] for line in text.splitlines() if line.startswith("| default | ")]
    answers = pl.read_parquet(results / "runs/default/evaluation/answers.parquet")["response"]
    having = [
        float(sum(bool(re.match(r"\s*([-*\u2022]|\d\d?[.)])\s", line)) for line in one.split("\n")) >= 3)
        for one in answers
    ]
    assert lists == [write_readme.shown(intervals.share(having, list(range(len(having))), 0))]
    chosen, others = (
        {row["prompt_id"]: len(row["response"].split()) for row in pl.read_parquet(file).iter_rows(named=True)}
        for file in (results / "evaluation/judge_pairs" / f"{which}.parquet" for which in ("preferred", "other"))
    )
    read = {*pl.read_parquet(results / "evaluation/judge_pairs/judgements.parquet")["prompt_id"]}
    more = [1.0 if chosen[pair] > others[pair] else 0.5 * (chosen[pair] == others[pair]) for pair in read]
    assert (
        f"Of these {len(read)} pairs, people prefer the answer with more words in {sum(more) / len(more):.2f}" in text
    )
    assert "| default |" in text
