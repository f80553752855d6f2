import json
import math
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from demo import evaluate_demo, lessons, make_demo_data, oracles, report, train_demo_policy, world
from salmon import models, principles, templates
from salmon.config import Aggregation, Lora, Model, PairSource, PromptSource, RewardModel, Scoring
from salmon.formats import PAIR_FORMATS, PROMPT_FORMATS
from salmon.language import detect
from salmon.sources import read_source
from salmon.tokenizers import load_tokenizer

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
        ("Concise", "The robin builds a nest.", 1 - 5 / oracles.MOST_WORDS),
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
    assert oracles.ORACLES[dimension](ASKED, answer) == pytest.approx(expected)


def test_generated_qualities_agree_with_the_oracles():
    for instruction, qualities, answer in drawn(500):
        score = oracles.score(instruction.text, answer)
        assert score["Ethical"] == 1 - qualities.rude, answer
        assert score["Educational and Engaging"] == min(1, qualities.teaching / 2), answer
        assert score["Creative"] == min(1, qualities.vivid / 2), answer
        assert score["Methodical"] == pytest.approx(qualities.ordered * min(1, qualities.claims / 3)), answer
        assert score["Specific"] == pytest.approx(1 - qualities.drifting / qualities.claims), answer
        assert score["Honest and Accurate"] == pytest.approx(1 - qualities.wrong / qualities.claims), answer
        assert len(oracles.claims_of(answer)) == qualities.claims
        if not qualities.drifting and instruction.kind != "sum":
            assert score["Comprehensive"] == pytest.approx((qualities.claims - qualities.wrong) / 5), answer


def test_answers_vary_in_every_quality_and_no_two_qualities_are_one():
    scores = np.array([list(oracles.score(asked.text, answer).values()) for asked, _, answer in drawn(1000)])
    assert (scores.std(axis=0) > 0.15).all()
    correlations = np.corrcoef(scores, rowvar=False) - np.eye(len(oracles.ORACLES))
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
        assert oracles.subject_of(instruction.text) == instruction.subject


def test_answers_are_long_enough_and_english():
    answers = [answer for _, _, answer in drawn(500)]
    assert min(map(len, answers)) >= 16
    languages = Counter(detect(answers))
    assert languages["en"] > 480
    assert set(languages) <= {"en", None}
    assert set(detect([i.text for i in world.instructions("train")])) <= {"en", None}


@pytest.mark.parametrize(("name", "kind"), FORMATS.items())
def test_data_have_the_upstream_schemas(data, name, kind):
    source, formats = (PromptSource, PROMPT_FORMATS) if kind in PROMPT_FORMATS else (PairSource, PAIR_FORMATS)
    rows = [row for _, row in read_source(source(format=kind, path=str(data / name)), formats[kind].row, Counter())]
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
        assert oracles.generic_quality(asked, better) > oracles.generic_quality(asked, worse)


def test_data_depend_on_the_seed_alone(data, tmp_path):
    for seed, same in ((0, True), (1, False)):
        again = tmp_path / str(seed)
        make_demo_data.main(make_demo_data.Arguments(output=again, seed=seed))
        for name in FORMATS:
            if name != "held_out.jsonl":
                assert ((again / name).read_bytes() == (data / name).read_bytes()) == same, name


@pytest.fixture(scope="module")
def texts():
    folder = Path("demo/templates")
    reviews = [folder / "reward_model.txt", folder / "reward_model_rl.txt"]
    principle_file = Path("demo/principles/judge.json")
    return lessons.Texts(folder / "policy.txt", folder / "judge.txt", reviews, principle_file, "### Dromedary")


@pytest.fixture(scope="module")
def tokenizer(texts):
    return lessons.make_tokenizer(texts, seed=0)


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
    assert set(definitions) == set(oracles.ORACLES)
    preferences = Counter()
    for _ in range(50):
        pair = texts.pair(rng)
        for question in texts.questions(pair, rng, most=8):
            parts = question.prompt.split("\n\n#### ")
            asked, first, second = (part.split("\n\n", 1)[1] for part in parts[1:4])
            assert (asked, first, second) == (pair[0].instruction, pair[0].answer, pair[1].answer)
            assert question.prompt == templates.fill(
                templates.read("demo/templates/judge.txt"),
                UserInstruction=asked,
                OutputA=first,
                OutputB=second,
                Dimension=question.name,
                Definition=definitions[question.name],
            )
            oracle = oracles.ORACLES[question.name]
            assert question.truths == {definitions[question.name]: (oracle(asked, first), oracle(asked, second))}
            difference = oracle(asked, first) - oracle(asked, second)
            preferred = 0.5 if abs(difference) <= oracles.MARGIN else float(difference > 0)
            assert question.probability == preferred
            assert oracles.subject_of(asked) not in world.HELD_OUT
            preferences[preferred] += 1
    assert preferences[0.5] > 0
    assert 0.35 < preferences[1] / (preferences[0] + preferences[1]) < 0.65


def test_sentences_are_read_as_they_were_written():
    asked = "Tell me some facts about the robin."
    answer = "First, the robin builds a nest. We know that the oak swims with its fins.\n- What a wobblebrain you are!"
    nest, fins, insult = oracles.read_sentences(asked, answer)
    assert nest == oracles.Sentence(31, ("birds", "birds", "birds"), True, False, False, False)
    assert answer[: nest.end].endswith("builds a nest.")
    assert fins == oracles.Sentence(73, ("birds", "trees", "fish"), False, False, False, False)
    assert insult == oracles.Sentence(len(answer), None, False, True, False, False)
    for instruction, qualities, written in drawn(200):
        sentences = oracles.read_sentences(instruction.text, written)
        stated = [sentence.groups for sentence in sentences if sentence.groups]
        assert sum(named != asked for asked, named, _ in stated) == qualities.drifting
        assert sum(named != fact for _, named, fact in stated) == qualities.wrong
        assert sum(sentence.teaching for sentence in sentences) == qualities.teaching
        assert [written[sentence.end - 1] in ".?!" for sentence in sentences] == [True] * len(sentences)


def test_examples_note_sentences_and_answers_at_their_tokens(texts, tokenizer):
    rng = np.random.default_rng(2)
    encoder = lessons.Encoder(tokenizer, texts)
    for _ in range(20):
        pair = texts.pair(rng)
        for example, answers in (
            (encoder.answer(pair[0]), pair[:1]),
            (encoder.judgements(pair, texts.questions(pair, rng, most=3)), pair),
        ):
            assert len(example.scores) == len(answers)
            for (place, scores), one in zip(example.scores.items(), answers, strict=True):
                assert tokenizer.decode(example.prefix[:place]).endswith(one.answer)
                assert scores == list(oracles.score(one.instruction, one.answer).values())
            expected = [sentence for one in answers for sentence in oracles.read_sentences(one.instruction, one.answer)]
            assert list(example.sentences.values()) == expected
            assert {tokenizer.decode(example.prefix[place]) for place in example.sentences} <= {".", "?", "!"}
            heavy = [place for place, weight in enumerate(example.weights) if weight == lessons.SUBJECT_WEIGHT]
            named = [one.answer[first:end] for one in answers for first, end in oracles.subject_spans(one.answer)]
            assert tokenizer.decode([example.prefix[place] for place in heavy]).split() == " ".join(named).split()


def test_reviews_say_how_true_statements_are_and_how_good_the_answer_is(texts, tokenizer):
    rng = np.random.default_rng(3)
    encoder = lessons.Encoder(tokenizer, texts)
    judged = principles.read_judged("demo/principles/judge.json")
    seen = Counter()
    for _ in range(50):
        about = texts.answer(rng)
        reviews = texts.reviews(about, rng)
        example = encoder.reviews(about, reviews)
        score = oracles.score(about.instruction, about.answer)
        ends = iter(example.truths.items())
        before = 0
        for review, branch in zip(reviews, example.branches, strict=True):
            alone = example.prefix + branch
            assert tokenizer.decode(alone, skip_special_tokens=True) == review.prompt
            assert about.instruction in review.prompt
            assert about.answer in review.prompt
            assert f"## Guideline\n\n{templates.bullets(list(review.truths))}\n" in review.prompt
            oracle = []
            for statement, given in review.truths.items():
                place, noted = next(ends)
                assert noted == given
                assert tokenizer.decode(alone[: place - before + 1]).endswith(f"- {statement}")
                principle = next(p for p in judged if statement in (p.definition, p.negative_definition))
                of_it = score[principle.dimension]
                oracle.append(of_it if statement == principle.definition else 1 - of_it)
                assert given[0] == oracle[-1]
                assert math.isnan(given[1])
                seen[statement] += 1
            before += len(branch)
            assert math.isclose(review.probability, sum(oracle) / len(oracle))
        assert next(ends, None) is None
        assert sum(len(review.truths) for review in reviews) == len(judged)
        assert set(example.weights) <= {0.0, lessons.SUBJECT_WEIGHT}
    assert len(seen) == 2 * len(judged)
    assert tokenizer.convert_tokens_to_ids(["Ġgood", "Ġbad"]) == list(encoder.verdicts)


def test_branches_of_a_batch_are_scored_as_if_each_stood_alone(texts, tokenizer):
    torch.manual_seed(0)
    arguments = train_demo_policy.Arguments(output=Path("unused"), hidden_size=32, layers=5)
    model = train_demo_policy.make_model(arguments, tokenizer).eval()
    reader = train_demo_policy.Reader(32)
    encoder = lessons.Encoder(tokenizer, texts)
    rng = np.random.default_rng(1)
    pairs = [texts.pair(rng) for _ in range(3)]
    examples = [encoder.judgements(pair, texts.questions(pair, rng, most=8)) for pair in pairs]
    examples += [encoder.answer(texts.answer(rng)) for _ in range(2)]
    examples += [encoder.reviews(pair[0], texts.reviews(pair[0], rng)) for pair in pairs]
    loss, margins, found = train_demo_policy.loss_of(model, reader, lessons.collate(examples))

    expected, margins_expected, right = 0.0, [], Counter()
    with torch.no_grad():
        for example in examples:
            a, b = example.options
            output = model(torch.tensor([example.prefix]), output_hidden_states=True)
            logs = output.logits[0].double().log_softmax(dim=-1)
            for place in range(1, len(example.prefix)):
                expected -= example.weights[place] * float(logs[place - 1, example.prefix[place]])
            for question in example.questions:
                ids = tokenizer(question.prompt)["input_ids"]
                last = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(dim=-1)
                expected -= float(question.probability * last[a] + (1 - question.probability) * last[b])
                margins_expected.append(float(last[a] - last[b]))
            reading = 0.0
            for place, sentence in example.sentences.items():
                groups = reader.heads["groups"](output.hidden_states[-5][0, place]).view(3, -1).log_softmax(dim=-1)
                truth = [sentence.numbered, sentence.rude, sentence.teaching, sentence.vivid]
                if sentence.groups:
                    for row, group in zip(groups, sentence.groups, strict=True):
                        reading -= float(row[lessons.GROUPS.index(group)])
                    asked, named, fact = sentence.groups
                    truth = [named == fact, named == asked, *truth]
                marks = reader.heads["marks"](output.hidden_states[-4][0, place]).sigmoid()[-len(truth) :]
                reading -= sum(
                    float((mark if true else 1 - mark).log()) for mark, true in zip(marks, truth, strict=True)
                )
                right["right"] += len(truth) == 6 and bool((marks[0] > 0.5) == truth[0])
            for place, scores in example.scores.items():
                given = reader.heads["scores"](output.hidden_states[-3][0, place]).sigmoid()
                reading -= sum(
                    score * float(p.log()) + (1 - score) * float((1 - p).log())
                    for p, score in zip(given, scores, strict=True)
                )
            expected += train_demo_policy.READING_WEIGHT * reading
            where = []
            for question in example.questions:
                for statement in question.truths:
                    ids = tokenizer(question.prompt[: question.prompt.rindex(statement) + len(statement)])["input_ids"]
                    where.append((len(ids) - 1, model(torch.tensor([ids]), output_hidden_states=True)))
            for (place, read), truths in zip(where, example.truths.values(), strict=True):
                given = reader.heads["truths"](read.hidden_states[-2][0, place]).sigmoid().tolist()
                expected -= sum(
                    truth * math.log(p) + (1 - truth) * math.log(1 - p)
                    for p, truth in zip(given, truths, strict=True)
                    if not math.isnan(truth)
                )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert margins.tolist() == pytest.approx(margins_expected, abs=1e-4)
    assert found["marks"][:, 0].nansum() == right["right"]


POLITE, RUDE = "The robin builds a nest.", "The robin builds a nest. Only a noodlehead would ask this."


def test_measuring_a_judge_counts_what_the_oracle_and_the_orders_say():
    pairs = [evaluate_demo.Pair(str(row), ASKED, *outputs) for row, outputs in enumerate([(POLITE, RUDE)] * 4)]
    pairs.append(evaluate_demo.Pair("tie", ASKED, POLITE, POLITE))
    judged = [[(1.0, 2.0)], [(-1.0, -2.0)], [(1.0, -2.0)], [(0.5, 0.5)], [(1.0, 1.0)]]
    found = evaluate_demo.judge_accuracy(pairs, judged, ["Ethical"])
    assert found == {"Ethical": {"pairs": 4, "orders_agree": 3 / 4, "right": pytest.approx(2 / 3)}}


def test_texts_are_read_together_as_they_are_alone(tiny_model, tmp_path):
    model, lora = Model(base=str(tiny_model), quantization="none", dtype="float32"), Lora(r=2, alpha=4.0)
    trained = models.new_reward_model(model, lora, "cpu", seed=3)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    trained.save_pretrained(tmp_path / "reward_model")
    raw = yaml.safe_load(Path("demo/config.yaml").read_text())["reward_model"]
    settings = RewardModel.model_validate(raw | {"query_length": 100, "response_length": 300, "max_length": 900})
    reader = evaluate_demo.RewardReader(
        tmp_path / "reward_model", model, settings, Scoring(), load_tokenizer(model), torch.device("cpu")
    )
    pairs = [evaluate_demo.Pair("0", ASKED, POLITE, RUDE), evaluate_demo.Pair("1", ASKED, RUDE, f"{POLITE} {RUDE}")]
    definitions = ["The output is short.", "The output is friendly to its reader.", "It has steps."]
    together = reader.all_margins(pairs, definitions)
    alone = [reader.margins(pairs, [[one]] * len(pairs)) for one in definitions]
    np.testing.assert_allclose(together, np.array(alone).T, atol=1e-5)
    assert len(set(together.round(3).ravel())) == together.size


class FixedReader:
    """Finds output 1 better by the principles it likes, unless a negative definition comes first."""

    def __init__(self, likes):
        self.likes = likes

    def margins(self, pairs, definitions):
        return [1.0 if shown[0] in self.likes else -1.0 for shown in definitions]

    def all_margins(self, pairs, definitions):
        return np.array([self.margins(pairs, [[one] for one in definitions])] * len(pairs))


def test_measuring_a_reward_model_compares_with_the_oracle_under_both_forms_of_a_principle():
    judged = principles.read_judged("demo/principles/judge.json")
    ethical = next(principle for principle in judged if principle.dimension == "Ethical")
    pairs = [evaluate_demo.Pair("0", ASKED, POLITE, RUDE), evaluate_demo.Pair("1", ASKED, POLITE, POLITE)]
    for likes, expected in (
        ({ethical.definition}, {"plain": 1.0, "negated": 1.0, "flips": 1.0}),
        ({ethical.definition, ethical.negative_definition}, {"plain": 1.0, "negated": 0.0, "flips": 0.0}),
        ({ethical.negative_definition}, {"plain": 0.0, "negated": 0.0, "flips": 1.0}),
    ):
        found = evaluate_demo.reward_accuracy(FixedReader(likes), pairs, [ethical])
        assert found == {"Ethical": {"pairs": 1, **expected}}


def test_sign_flips_turn_the_deciding_principle_only():
    judged = principles.read_judged("demo/principles/judge.json")
    aggregation = Aggregation(dimensions=[principle.dimension for principle in judged])
    rng = np.random.default_rng(0)
    pairs = [evaluate_demo.Pair(str(row), ASKED, POLITE, RUDE) for row in range(20)]
    # Scores are divided by their variance, so the small but steady ones of Ethical decide wherever it is shown.
    judgements = [
        [(0.1 * rng.choice([-1, 1]) if p.dimension == "Ethical" else rng.normal(),) * 2 for p in judged]
        for _ in range(20)
    ]
    ethical = next({p.definition, p.negative_definition} for p in judged if p.dimension == "Ethical")
    seen = []

    class Recorder(FixedReader):
        def margins(self, pairs, definitions):
            seen.append(definitions)
            return [1.0 if len(seen) == 1 else -1.0] * len(pairs)

    found = evaluate_demo.sign_flips(Recorder(set()), pairs, judgements, judged, aggregation)
    assert found["records"] == len(seen[0]) > 20
    assert found["flips"] == 1.0
    turned = {p.definition: p.negative_definition for p in judged} | {
        p.negative_definition: p.definition for p in judged
    }
    for before, after in zip(*seen, strict=True):
        differing = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
        assert len(differing) == 1
        assert turned[differing[0][0]] == differing[0][1]
        assert differing[0][0] in ethical or not ethical & set(before)

    # Alone, a principle reverses any sum; among others that agree with each other, it may not.
    assert 0 < found["flips_of_summed_judgements"] < 1
    alone = aggregation.model_copy(update={"max_principles": 1})
    found = evaluate_demo.sign_flips(FixedReader(set()), pairs, judgements, judged, alone)
    assert found["flips_of_summed_judgements"] == 1
    assert [evaluate_demo.turns(parts, 0) for parts in ([2.0, 1.0], [2.0, 3.0], [2.0, -3.0], [-2.0, 1.0], [0.0])] == [
        True,
        False,
        False,
        True,
        False,
    ]


def evaluation(**headline):
    numbers = {"oracles": {"Concise": 50.0}, "words": [3, 5], "mean_words": 4.0, "kl": 0.0}
    reached = {target.name: (target.bound or 0.0) if not target.control else 0.0 for target in report.TARGETS}
    return {"headline": reached | headline, "policies": {"initial": numbers}, "judge": {"Concise": {"right": 0.9}}}


def test_headline_compares_with_the_initial_policy_and_the_control():
    def policy(**scores: float) -> dict[str, Any]:
        return {"oracles": scores, "mean_words": scores["Comprehensive"]}

    found = report.headline(
        {
            "judge": {"A": {"right": 1.0, "orders_agree": 0.8}, "B": {"right": 0.5, "orders_agree": 0.6}},
            "policies": {
                "initial": policy(Concise=10, Comprehensive=20, Methodical=30),
                "concise": policy(Concise=50, Comprehensive=10, Methodical=30),
                "comprehensive": policy(Concise=5, Comprehensive=45, Methodical=30),
                "methodical": policy(Concise=10, Comprehensive=20, Methodical=90),
                "control": policy(Concise=35, Comprehensive=15, Methodical=30),
            },
        }
    )
    assert found == {
        **{"judge_mean": 0.75, "judge_worst": 0.5, "orders_agree": pytest.approx(0.7), "length_ratio": 4.5},
        **{"gain_concise": 40, "gain_comprehensive": 25, "gain_methodical": 60, "least_over_control": 15},
        **{"gain_control_concise": 25, "gain_control_comprehensive": -5, "gain_control_methodical": 0},
    }


def test_report_gives_means_and_ranges_and_names_what_was_missed():
    table = report.markdown([evaluation(length_ratio=2.0), evaluation(length_ratio=3.0)])
    assert "| at least 1.80 x | 2.50 x (2.00 x to 3.00 x) |" in table
    assert "| within 10 of 0 | +0 (+0 to +0) |" in table
    assert report.missed([evaluation()]) == report.missed([evaluation()] * 2) == []
    for target in report.TARGETS:
        for bad in (-50.0, 50.0) if target.control else (0.0,):
            for seeds in (1, 3):
                lines = report.missed([evaluation(**{target.name: bad})] * seeds)
                assert [target.label in line for line in lines] == [True] * (target.bound is not None), target
    assert report.missed([evaluation(judge_mean=None)])


def test_pictures_are_the_same_for_the_same_numbers(tmp_path):
    found = evaluation()
    found["policies"]["concise"] = {**found["policies"]["initial"], "words": [1, 2, 3]}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        report.part(found).write(tmp_path / name)
    names = {"accuracy.svg", "lengths.svg", "scores.svg", "table.html"}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_training_depends_on_the_seed_alone(tmp_path):
    hashes = []
    for name, seed in product(("first", "second"), (0, 1)):
        folder = tmp_path / f"{name}{seed}"
        train_demo_policy.main(
            train_demo_policy.Arguments(
                output=folder, seed=seed, steps=2, sequences=4, hidden_size=16, layers=5, heads=2, threads=1
            )
        )
        hashes.append((folder / "model.safetensors").read_bytes())
    assert hashes[0] == hashes[2]
    assert hashes[1] == hashes[3]
    assert hashes[0] != hashes[1]
