import json
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from demo import make_demo_data, measure_demo_judge, train_demo_policy, world

from salmon import principles, templates
from salmon.config import Source
from salmon.language import detect
from salmon.sources import read_source

ASKED = "Tell me some facts about the robin."
FORMATS = {
    "oasst1.jsonl": "oasst1",
    "shp.jsonl": "shp",
    "hh_rlhf.jsonl": "hh_rlhf",
    "openorca.parquet": "openorca",
    "sharegpt.json": "sharegpt",
    "sharegpt_90k.json": "sharegpt",
    "dolly.jsonl": "dolly",
    "math.jsonl": "math",
    "held_out.jsonl": "prompts",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data.main(make_demo_data.Arguments(output=folder))
    return folder


def drawn(count, seed=0, split="train"):
    rng = np.random.default_rng(seed)
    asked = world.instructions(split)
    for _ in range(count):
        instruction, qualities = world.pick(rng, asked), world.draw_qualities(rng)
        yield instruction, qualities, world.write_answer(instruction, qualities, rng)


@pytest.mark.parametrize(
    ("dimension", "answer", "expected"),
    [
        ("Concise", "The robin builds a nest.", 1 - 5 / world.MOST_WORDS),
        ("Concise", "word " * 500, 0),
        ("Comprehensive", "The robin builds a nest. The robin has soft feathers.", 2 / 5),
        ("Comprehensive", "The robin builds a nest. We know that the robin builds a nest.", 1 / 5),
        ("Comprehensive", "The owl builds a nest. The robin has deep roots.", 0),
        ("Honest and Accurate", "The robin builds a nest. The robin has deep roots.", 1 / 2),
        ("Honest and Accurate", "The oak has deep roots.", 1),
        ("Honest and Accurate", "I cannot say.", 1 / 2),
        ("Honest and Accurate", "The sum of 2 and 2 is equal to 5.", 0),
        ("Honest and Accurate", "For the soup you heat the stove.", 1),
        ("Ethical", "The robin builds a nest.", 1),
        ("Ethical", "The robin builds a nest. What a Wobblebrain you are!", 0),
        ("Specific", "The robin builds a nest. The oak has deep roots.", 1 / 2),
        ("Specific", "There is more to it.", 0),
        ("Educational and Engaging", "Did you ever wonder why?", 1 / 2),
        ("Educational and Engaging", "The reason behind it is simple. Did you notice? Did you ever?", 1),
        ("Methodical", "First, the robin builds a nest. Second, the robin has soft feathers.", 2 / 3),
        ("Methodical", "Step 1: A. Step 2: B. Step 3: C. Step 4: D.", 1),
        ("Methodical", "Second, B. First, A.", 1 / 3),
        ("Methodical", "The robin builds a nest.", 0),
        ("Creative", "Imagine a lantern in the fog. It is as if the moon danced.", 1),
        ("Creative", "The robin builds a nest.", 0),
    ],
)
def test_oracles_on_hand_made_answers(dimension, answer, expected):
    assert world.ORACLES[dimension](ASKED, answer) == pytest.approx(expected)


def test_generated_qualities_agree_with_the_oracles():
    for instruction, qualities, answer in drawn(500):
        score = world.score(instruction.text, answer)
        assert score["Ethical"] == 1 - qualities.rude, answer
        assert score["Educational and Engaging"] == min(1, qualities.teaching / 2), answer
        assert score["Creative"] == min(1, qualities.vivid / 2), answer
        assert score["Methodical"] == pytest.approx(qualities.ordered * min(1, qualities.claims / 3)), answer
        assert score["Specific"] == pytest.approx(1 - qualities.drifting / qualities.claims), answer
        assert score["Honest and Accurate"] == pytest.approx(1 - qualities.wrong / qualities.claims), answer
        assert len(world.claims_of(answer)) == qualities.claims
        if not qualities.drifting and instruction.kind != "sum":
            assert score["Comprehensive"] == pytest.approx((qualities.claims - qualities.wrong) / 5), answer


def test_answers_vary_in_every_quality_and_no_two_qualities_are_one():
    scores = np.array([list(world.score(asked.text, answer).values()) for asked, _, answer in drawn(1000)])
    assert (scores.std(axis=0) > 0.15).all()
    correlations = np.corrcoef(scores, rowvar=False) - np.eye(len(world.ORACLES))
    assert np.abs(correlations).max() < 0.7


def test_facts_are_true_of_one_group_only():
    texts = Counter(fact for group, facts in world.FACTS.items() if "sums" not in group for fact in facts)
    assert set(texts.values()) == {1}
    for group, facts in world.FACTS.items():
        assert len(set(facts)) == len(facts) >= 4, group


def test_the_split_holds_out_templates_and_subjects():
    train, held_out = world.instructions("train"), world.instructions("held_out")
    assert not {i.text for i in train} & {i.text for i in held_out}
    assert not {i.subject for i in train} & {i.subject for i in held_out}
    assert not {i.text.replace(i.subject, "{}") for i in train} & {i.text.replace(i.subject, "{}") for i in held_out}
    assert not {i.text for i in world.known_instructions()} & {i.text for i in train + held_out}
    held_groups = {world.GROUP_OF[subject] for subject in world.HELD_OUT}
    assert held_groups <= {world.GROUP_OF[i.subject] for i in train}, "nothing is known of a group"
    assert {i.kind for i in train} == {i.kind for i in held_out}


def test_every_instruction_says_its_subject():
    for instruction in world.instructions("train") + world.instructions("held_out"):
        assert world.subject_of(instruction.text) == instruction.subject


def test_answers_are_long_enough_and_english():
    answers = [answer for _, _, answer in drawn(500)]
    assert min(map(len, answers)) >= 16
    languages = Counter(detect(answers))
    assert languages["en"] > 480
    assert set(languages) <= {"en", None}
    assert set(detect([i.text for i in world.instructions("train")])) <= {"en", None}


@pytest.mark.parametrize(("name", "kind"), FORMATS.items())
def test_data_have_the_upstream_schemas(data, name, kind):
    rows = [row for _, row in read_source(Source(format=kind, path=str(data / name)))]
    assert rows
    if kind == "oasst1":
        parents = {row["parent_id"] for row in rows}
        assert all(row["message_id"] in parents for row in rows if row["parent_id"] is None)
    if kind == "openorca":
        assert {row["id"].split(".")[0] for row in rows} == {"niv", "flan", "t0", "cot"}
    if kind == "shp":
        assert {row["labels"] for row in rows} == {0, 1}
        assert all(row["score_ratio"] >= 1 for row in rows)


def test_only_training_instructions_are_in_the_training_data(data):
    held_out = {i.text for i in world.instructions("held_out")}
    for name in FORMATS:
        if name == "held_out.jsonl":
            continue
        path = data / name
        text = pl.read_parquet(path).write_json() if path.suffix == ".parquet" else path.read_text()
        assert not [instruction for instruction in held_out if instruction in text], name


def test_preferences_follow_the_generic_quality(data):
    for line in (data / "hh_rlhf.jsonl").open():
        row = json.loads(line)
        (asked, better), (_, worse) = (row[key].split("\n\nAssistant: ") for key in ("chosen", "rejected"))
        asked = asked.removeprefix("\n\nHuman: ")
        assert world.generic_quality(asked, better) > world.generic_quality(asked, worse)


def test_data_depend_on_the_seed_alone(data, tmp_path):
    for seed, same in ((0, True), (1, False)):
        again = tmp_path / str(seed)
        make_demo_data.main(make_demo_data.Arguments(output=again, seed=seed))
        for name in FORMATS:
            if name != "held_out.jsonl":
                assert ((again / name).read_bytes() == (data / name).read_bytes()) == same, name


@pytest.fixture(scope="module")
def texts():
    return train_demo_policy.Texts(train_demo_policy.Arguments(output=Path("unused")))


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_demo_policy.make_tokenizer(texts, seed=0)


def test_tokenizer_gives_words_a_token_and_reads_any_text(tokenizer):
    for instruction, _, answer in drawn(50, split="held_out"):
        ids = tokenizer(f"{instruction.text}\n{answer}", add_special_tokens=False)["input_ids"]
        assert len(ids) <= 1.8 * len(answer.split()) + 20
    strange = "Żółw {x} 語 \x00 ### \r\n\n  𝔘nseen"
    encoded = tokenizer(strange, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == strange
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in encoded["input_ids"]
    assert encoded["offset_mapping"][-1][1] == len(strange)


def test_questions_are_the_prompts_of_the_judge_and_the_oracle_answers_them(texts):
    rng = np.random.default_rng(0)
    definitions = {p.dimension: p.definition for p in principles.read_judged("demo/principles/judge.json")}
    assert set(definitions) == set(world.ORACLES)
    preferences = Counter()
    for _ in range(50):
        for question in texts.questions(rng, most=8):
            parts = question.prompt.split("\n\n#### ")
            asked, first, second = (part.split("\n\n", 1)[1] for part in parts[1:4])
            assert question.prompt == templates.fill(
                templates.read("demo/templates/judge.txt"),
                UserInstruction=asked,
                OutputA=first,
                OutputB=second,
                Dimension=question.dimension,
                Definition=definitions[question.dimension],
            )
            oracle = world.ORACLES[question.dimension]
            difference = oracle(asked, first) - oracle(asked, second)
            preferred = 0.5 if abs(difference) <= world.MARGIN else float(difference > 0)
            assert question.preference == preferred
            assert world.subject_of(asked) not in world.HELD_OUT
            preferences[preferred] += 1
    assert preferences[0.5] > 0
    assert 0.35 < preferences[1] / (preferences[0] + preferences[1]) < 0.65


def test_branches_of_a_batch_are_scored_as_if_each_stood_alone(texts, tokenizer):
    torch.manual_seed(0)
    arguments = train_demo_policy.Arguments(output=Path("unused"), hidden_size=32, layers=2)
    model = train_demo_policy.make_model(arguments, tokenizer).eval()
    encoder = train_demo_policy.Encoder(tokenizer, texts.judge)
    rng = np.random.default_rng(1)
    examples = [encoder.judgements(texts.questions(rng, most=8)) for _ in range(3)]
    examples += [encoder.answer(*texts.answer(rng)), encoder.exercise(*texts.exercise(rng))]
    loss, margins = train_demo_policy.loss_of(model, train_demo_policy.collate(examples), encoder.options)

    expected, found = 0.0, []
    a, b = encoder.options
    with torch.no_grad():
        for example in examples:
            logs = model(torch.tensor([example.prefix])).logits[0].double().log_softmax(dim=-1)
            for place in range(1, len(example.prefix)):
                expected -= example.weights[place] * float(logs[place - 1, example.prefix[place]])
            for question in example.questions:
                ids = tokenizer(question.prompt)["input_ids"]
                last = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(dim=-1)
                expected -= float(question.preference * last[a] + (1 - question.preference) * last[b])
                found.append(float(last[a] - last[b]))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert margins.tolist() == pytest.approx(found, abs=1e-4)


def test_measuring_a_judge_counts_what_the_oracle_and_the_orders_say():
    instruction = world.Instruction(ASKED, "facts", "robin")
    polite, rude = "The robin builds a nest.", "The robin builds a nest. Only a noodlehead would ask this."
    pairs = [measure_demo_judge.Pair(str(row), ASKED, *outputs) for row, outputs in enumerate([(polite, rude)] * 4)]
    pairs.append(measure_demo_judge.Pair("tie", ASKED, polite, polite))
    judged = [[(1.0, 2.0)], [(-1.0, -2.0)], [(1.0, -2.0)], [(0.5, 0.5)], [(1.0, 1.0)]]
    found = measure_demo_judge.accuracy([instruction] * 5, pairs, judged, ["Ethical"])
    assert found == {"Ethical": {"differing_pairs": 4, "orders_agree": 3 / 4, "right": pytest.approx(2 / 3)}}


def test_training_depends_on_the_seed_alone(tmp_path):
    hashes = []
    for name, seed in product(("first", "second"), (0, 1)):
        folder = tmp_path / f"{name}{seed}"
        train_demo_policy.main(
            train_demo_policy.Arguments(
                output=folder, seed=seed, steps=2, sequences=4, hidden_size=16, layers=1, heads=2, threads=1
            )
        )
        hashes.append((folder / "model.safetensors").read_bytes())
    assert hashes[0] == hashes[2]
    assert hashes[1] == hashes[3]
    assert hashes[0] != hashes[1]
