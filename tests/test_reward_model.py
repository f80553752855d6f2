"""The principle-following reward model: its text, loss, scores, split, training, ranks and resuming."""

import json
import math
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import polars as pl
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import train_reward_model
from salmon import artifacts, checkpoints, distributed, models, reward_model, training
from salmon.config import Lora, Model
from salmon.errors import UserError
from salmon.reward_model import Apart
from salmon.tables import PREFERENCE_RECORDS
from salmon.tokenizers import load_tokenizer
from salmon.work import WorkFolder
from tests import forks, zoo
from tests.running import ROOT, environment, failing, launch

TEMPLATE = "# Review\n{Output}\n# For\n{Input}\n# By\n{Dimensions}\nThe quality of the output is"
END = "The quality of the output is"
WORDS = ["one", "two", "three", "list", "and"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(Model(base=str(tiny_model), quantization="none", dtype="float32"))


@pytest.fixture(scope="module")
def template_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("template") / "template.txt"
    path.write_text(TEMPLATE + "\n")
    return path


def make_records(prompts: int, passes: int = 1, *, negate: bool = True, words: int = 2, seed: int = 0) -> pl.DataFrame:
    """Made-up preferences: one output holds the word "creative"; a negated principle prefers the other one."""
    rng, rows = random.Random(seed), []
    for prompt in range(prompts):
        for number in range(passes):
            negated = negate and rng.random() < 0.5
            outputs = [rng.choices(WORDS, k=words + rng.randrange(3)) for _ in range(2)]
            marked = rng.randrange(2)
            outputs[marked][rng.randrange(words)] = "creative"
            rows.append(
                {
                    "record_id": f"{prompt:04}-{number}",
                    "prompt_id": f"prompt {prompt}",
                    "instruction": "Please explain",
                    "input": "it" if prompt % 2 else "",
                    "output_1": " ".join(outputs[0]),
                    "output_2": " ".join(outputs[1]),
                    "preference": 1 + (marked if not negated else 1 - marked),
                    "definitions": ["not" if negated else "yes"],
                    "dimensions": ["Creative"],
                    "negated": [negated],
                    "deciding": "Creative",
                }
            )
    return pl.DataFrame(rows, schema=PREFERENCE_RECORDS.schema)


def make_arguments(records: Path, output: Path, model: Path, template: Path, **more: Any) -> dict[str, Any]:
    settings = {
        "template": str(template),
        "learning_rate": 3e-3,
        "batch_size": 8,
        "max_length": 200,
        "query_length": 20,
        "response_length": 40,
        "eval_examples": 20,
        "save_steps": 3,
        "max_grad_norm": 1.0,
        **more.pop("settings", {}),
    }
    return {
        "records": str(records),
        "output": str(output),
        "model": {"base": str(model), "quantization": "none", "dtype": "float32"},
        "lora": {"r": 8, "alpha": 16},
        "tokens_per_pass": 400,
        "reward_model": settings,
        **more,
    }


def run_here(arguments: dict[str, Any]) -> dict[str, Any]:
    train_reward_model.main(train_reward_model.Arguments(**arguments))
    return json.loads((Path(arguments["output"]) / "metrics.json").read_text())


def command(arguments: dict[str, Any]) -> list[str]:
    options = []
    for name, value in arguments.items():
        options += ["--" + name.replace("_", "-"), json.dumps(value) if isinstance(value, dict) else str(value)]
    return [sys.executable, str(ROOT / "workflow_scripts" / "train_reward_model.py"), *options]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(tiny_model, template_file, tmp_path_factory) -> dict[str, Any]:
    """One undisturbed run on one process: 10 steps of 8 pairs, each in several passes."""
    folder = tmp_path_factory.mktemp("trained")
    make_records(50, 2).write_parquet(folder / "records.parquet")
    arguments = make_arguments(folder / "records.parquet", folder / "rm", tiny_model, template_file)
    metrics = run_here(arguments)
    return {"arguments": arguments, "folder": folder / "rm", "metrics": metrics}


# --- text


def cut_lengths(query: int = 20, response: int = 40, maximum: int = 400) -> dict[str, Any]:
    return {"query_length": query, "response_length": response, "max_length": maximum, "keys": "pmp."}


def test_text_has_all_parts_in_the_order_of_the_template(tokenizer):
    [ids] = reward_model.reward_text_tokens(
        tokenizer, TEMPLATE, ["Which planets?"], ["Saturn."], [["Be brief.", "Be kind."]], **cut_lengths()
    )
    whole = "# Review\nSaturn.\n# For\nWhich planets?\n# By\n- Be brief.\n- Be kind.\nThe quality of the output is"
    assert ids == tokenizer(whole)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id


def test_instruction_is_cut_on_its_left_and_response_on_its_right(tokenizer):
    numbers = [f"n{i}" for i in range(100)]
    text = " ".join(numbers)
    [ids] = reward_model.reward_text_tokens(tokenizer, TEMPLATE, [text], [text], [[]], **cut_lengths(15, 25))
    filled = tokenizer.decode(ids, skip_special_tokens=True)
    response, query = filled.split("# Review\n")[1].split("\n# By")[0].split("\n# For\n")
    assert text.startswith(response)
    assert text.endswith(query)
    # Byte-level BPE: each cut is at a token boundary, so the parts have these lengths on their own
    assert len(tokenizer(response, add_special_tokens=False)["input_ids"]) == 25
    assert len(tokenizer(query, add_special_tokens=False)["input_ids"]) == 15


def test_texts_that_fit_are_not_changed(tokenizer):
    text = "  a line \n\n another\t"
    [ids] = reward_model.reward_text_tokens(tokenizer, TEMPLATE, [text], [text], [["x"]], **cut_lengths())
    filled = TEMPLATE.replace("{Output}", text).replace("{Input}", text).replace("{Dimensions}", "- x")
    assert ids == tokenizer(filled)["input_ids"]


def test_braces_in_texts_are_left_alone(tokenizer):
    [ids] = reward_model.reward_text_tokens(
        tokenizer, TEMPLATE, ["{Output} {x}"], ["{Input} {Dimensions} {0}"], [["{Output}"]], **cut_lengths()
    )
    assert tokenizer.decode(ids, skip_special_tokens=True) == (
        "# Review\n{Input} {Dimensions} {0}\n# For\n{Output} {x}\n# By\n- {Output}\nThe quality of the output is"
    )


@pytest.mark.parametrize("maximum", [110, 125, 140, 200])
def test_too_long_a_text_loses_response_only(tokenizer, maximum):
    instruction, principles = "Please explain it.", ["The output is brief, honest and methodical."] * 2
    cut: dict[str, set[int]] = {}
    full, short = reward_model.reward_text_tokens(
        tokenizer,
        TEMPLATE,
        [instruction] * 2,
        ["東京 list " * 100, "a"],
        [principles] * 2,
        **cut_lengths(20, 600, maximum),
        cut=cut,
    )
    assert cut == {"instructions": set(), "outputs": {0}}
    assert len(full) <= maximum
    assert len(full) > maximum - 12  # no more is cut than a character's tokens and the joint with the template cost
    filled = tokenizer.decode(full, skip_special_tokens=True)
    head, tail = TEMPLATE.split("{Output}")
    tail = tail.replace("{Input}", instruction).replace("{Dimensions}", "\n".join(f"- {p}" for p in principles))
    assert filled.startswith(head)
    assert filled.endswith(tail)
    assert "�" not in filled
    assert short == tokenizer(head + "a" + tail)["input_ids"]  # a neighbour in the batch is not touched


def test_principles_that_do_not_fit_are_an_error(tokenizer):
    with pytest.raises(UserError, match=r"max_length is 60.*2 principles"):
        reward_model.reward_text_tokens(
            tokenizer, TEMPLATE, ["Why?"], ["Because."], [["The output is brief." * 5] * 2], **cut_lengths(maximum=60)
        )


def test_no_texts_give_no_rows(tokenizer):
    assert reward_model.reward_text_tokens(tokenizer, TEMPLATE, [], [], [], **cut_lengths()) == []


# --- loss, padding, scores


def test_bradley_terry_loss_against_float64():
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 100) * 20
    expected = torch.log1p(torch.exp(-(chosen - rejected).double()))
    # float32: an error in the margin of eps/2 times its size, and in the result of a few eps
    tolerance = torch.finfo(torch.float32).eps * (4 * expected + (chosen - rejected).abs().double())
    assert ((reward_model.bradley_terry_loss(chosen, rejected).double() - expected).abs() <= tolerance).all()
    far = reward_model.bradley_terry_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert far.tolist() == [2e4, 0.0]


def test_pair_losses_turn_with_the_preference():
    rewards = torch.tensor([[1.0, -0.5], [1.0, -0.5]])
    expected = reward_model.bradley_terry_loss(torch.tensor([1.0, -0.5]), torch.tensor([-0.5, 1.0]))
    assert torch.equal(reward_model.pair_losses(rewards, torch.tensor([1, 2])), expected)


def test_collate_pads_right():
    batch = reward_model.collate([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    pairs = reward_model.collate_pairs([[5, 6, 7], [8], [4, 4, 4, 4], [3, 3]], Apart())
    assert pairs["longer"].tolist() == [True, False, True, False]
    assert reward_model.tokens_of_pairs([(3, 1), (4, 2)], Apart()) == 2 * 4 + 2 * 2
    for apart in (Apart(saving=4), Apart(least=13), Apart(saving=math.inf)):
        assert reward_model.tokens_of_pairs([(3, 1), (4, 2)], apart) == 4 * 4


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_second_call_is_made_where_it_pays(tiny_model, monkeypatch, quantization):
    section = Model(base=str(tiny_model), quantization=quantization, dtype="float32")
    model = models.new_reward_model(section, Lora(r=2), "cpu", seed=0)
    assert reward_model.when_apart(model, torch.device("cpu")) == Apart(saving=0, least=0)
    gpu = reward_model.when_apart(model, torch.device("cuda"))
    whole = models.new_reward_model(section.model_copy(update={"quantization": "none"}), Lora(r=2), "cpu", seed=0)
    parameters = sum(parameter.numel() for parameter in whole.parameters())  # even where they are packed
    assert gpu == reward_model.apart_on_gpu(parameters, 2, is_packed=quantization == "nf4")
    monkeypatch.setattr(reward_model, "is_deepspeed_zero3_enabled", lambda: True)
    assert reward_model.when_apart(model, torch.device("cuda")) == Apart(saving=math.inf)


def test_a_second_call_is_made_where_it_was_faster_on_a_gpu():
    measured = json.loads((ROOT / "benchmarks/two_calls-h200.json").read_text())["rows"]
    rows = [row for row in measured if row["lengths"] == "OASST1" and row["ms, one"]]
    sizes = {"1b": (1_280_000_000, 16), "7b": (6_900_000_000, 32)}  # with adapters
    decided = []
    for row in rows:
        rule = reward_model.apart_on_gpu(*sizes[row["model"]], is_packed=row["precision"] == "nf4")
        saved = row["tokens, one"] - row["tokens, two"] > rule.saving
        decided.append(saved and row["tokens, two"] >= rule.least)
    assert decided == [row["ms, two"] < row["ms, one"] for row in rows]
    assert any(decided)
    assert not all(decided)


def test_experts_are_never_called_twice(tmp_path):
    zoo.build("qwen3_moe", tmp_path)
    section = Model(base=str(tmp_path), quantization="none", dtype="float32")
    model = models.new_reward_model(section, Lora(r=2), "cpu", seed=0)
    assert reward_model.when_apart(model, torch.device("cpu")) == Apart(saving=math.inf)


def test_reward_is_read_at_the_last_token_by_mask_also_where_it_is_the_padding_token(tiny_model):
    model = models.new_reward_model(
        Model(base=str(tiny_model), quantization="none", dtype="float32"), Lora(r=2), "cpu", seed=0
    ).eval()
    pad = 0  # what `score` pads with
    torch.manual_seed(1)
    rows = [torch.randint(3, 250, (length,)).tolist() for length in (9, 3, 6, 12, 5)]
    rows += [[*rows[0], pad, pad], [*rows[1], pad], [pad]]
    backbone = model.get_base_model().model
    head = model.get_base_model().score.modules_to_save["default"].weight
    with torch.no_grad():
        expected = torch.cat([head @ backbone(torch.tensor([row])).last_hidden_state[0, -1] for row in rows])
    for batch_size in (1, 3, 8):
        rewards = reward_model.score(model, rows, batch_size, "cpu")
        # 2 layers in float32, sums of at most 128 terms: some hundred roundings of relative size 6e-8
        torch.testing.assert_close(rewards, expected, rtol=2e-5, atol=2e-5)
    assert not model.training


# --- split, order, metrics


@pytest.mark.parametrize("wanted", [0, 1, 10, 41])
def test_split_shares_no_prompt_and_does_not_depend_on_the_order_of_rows(wanted):
    records = make_records(30, passes=4)
    train, held = training.split(records, wanted, seed=42, what="reward model")
    assert not set(train["prompt_id"]) & set(held["prompt_id"])
    assert wanted <= len(held) < wanted + 4
    assert len(train) + len(held) == len(records)
    _, again = training.split(records.sample(fraction=1, shuffle=True, seed=1), wanted, seed=42, what="reward model")
    assert set(again["record_id"]) == set(held["record_id"])
    if wanted > 1:
        _, other = training.split(records, wanted, seed=43, what="reward model")
        assert set(other["record_id"]) != set(held["record_id"])


def test_training_order_is_whole_batches_of_seeded_permutations():
    order = training.training_order(50, 8, 1.0, seed=1, what="reward model")
    assert len(order) == len(set(order)) == 48
    assert order == training.training_order(50, 8, 1.0, seed=1, what="reward model")
    assert order != training.training_order(50, 8, 1.0, seed=2, what="reward model")
    twice = training.training_order(50, 10, 2.0, seed=1, what="reward model")
    assert set(Counter(twice).values()) == {2}
    assert len(training.training_order(50, 10, 0.5, seed=1, what="reward model")) == 20
    assert training.training_order(50, 51, 1.0, seed=1, what="reward model") == []


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("budget", [1, 150, 10_000])
def test_every_step_has_its_rows_in_as_many_passes_as_the_others(ranks, budget):
    lengths = [random.Random(i).randrange(1, 100) for i in range(48)]
    order = training.training_order(48, 8, 2.0, seed=1, what="reward model")
    layout = order, lengths, 8, budget, ranks
    passes = training.passes_per_step(*layout)
    found = training.micro_batches(*layout, passes)
    assert len(found) == 12 * passes * ranks
    assert all(found)
    for step in range(12):
        parts = found[step * passes * ranks : (step + 1) * passes * ranks]
        assert sorted(row for part in parts for row in part) == sorted(order[step * 8 : (step + 1) * 8])
        for part in parts:
            assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= max(budget, *lengths)
    assert passes == 1 or budget < 10_000


def test_evaluate_counts_by_dimension_and_by_how_it_was_shown():
    def row(preference, deciding, negated):
        return {"preference": preference, "deciding": deciding, "dimensions": ["A", "B"], "negated": negated}

    records = pl.DataFrame(
        [row(1, "A", [False, True]), row(2, "A", [True, True]), row(2, "B", [False, True]), row(1, None, [True, True])],
        schema=PREFERENCE_RECORDS.select("preference", "deciding", "dimensions", "negated"),
    )
    rewards = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 3.0], [1.0, 1.0]])
    found = reward_model.evaluate(records, rewards)
    assert found["number"] == 4
    assert found["accuracy"] == (1 + 0 + 1 + 0.5) / 4
    assert found["positive_labels"] == 0.5
    margins = torch.tensor([1.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    assert found["loss"] == pytest.approx(torch.log1p(torch.exp(-margins)).mean().item(), rel=1e-6)
    by = found["by_deciding_dimension"]
    assert {name: (entry["number"], entry["accuracy"]) for name, entry in by.items()} == {"A": (2, 0.5), "B": (1, 1.0)}
    shown = found["by_deciding_shown"]
    assert (shown["plain"]["number"], shown["plain"]["accuracy"]) == (1, 1.0)
    assert (shown["negated"]["number"], shown["negated"]["accuracy"]) == (2, 0.5)
    empty = reward_model.evaluate(records.clear(), torch.empty(0))
    assert (empty["number"], empty["accuracy"], empty["positive_labels"]) == (0, None, None)


# --- training


def test_artifact_is_a_peft_folder_that_anyone_loads_with_the_same_scores(trained, tiny_model, tokenizer):
    folder, arguments = trained["folder"], train_reward_model.Arguments(**trained["arguments"])
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_model.safetensors", "adapter_config.json", "README.md", "manifest.json", "metrics.json")
    }
    assert not (folder.parent / ".work").exists()
    records, _ = reward_model.read_records(arguments.records)
    _, held = training.split(records, arguments.settings.eval_examples, arguments.settings.seed, "reward model")
    rows = reward_model.record_tokens(tokenizer, TEMPLATE, held, arguments.settings, "reward_model")
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    standard = AutoTokenizer.from_pretrained(tiny_model)  # everything as a stranger would do it
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([row])).logits[:, 0] for row in rows])
    ours = models.load_reward_model(arguments.model, folder, "cpu", trainable=False)
    rewards = reward_model.score(ours, rows, 16, "cpu")
    torch.testing.assert_close(rewards, expected, rtol=2e-5, atol=2e-5)
    assert rewards.std() > 0.1  # equal because they are right, not because they are constant
    assert standard.decode(rows[0]).endswith(END)
    # The metrics in the folder are those of the model in the folder
    found = reward_model.evaluate(held, rewards.view(-1, 2))
    assert found["loss"] == pytest.approx(trained["metrics"]["evaluation"]["loss"], rel=1e-4)


def test_a_folder_without_its_head_is_an_error(trained, tmp_path):
    damaged = tmp_path / "rm"
    shutil.copytree(trained["folder"], damaged)
    tensors = {name: value for name, value in weights(damaged).items() if "score" not in name}
    save_file(tensors, damaged / "adapter_model.safetensors")
    arguments = trained["arguments"] | {"output": str(tmp_path / "out"), "init": str(damaged)}
    with pytest.raises(UserError, match="no head"):
        run_here(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]


def test_first_step_against_a_float64_reference(trained, tokenizer):
    """The loss and gradient norm that the Trainer logs for several passes are those of the whole batch."""
    arguments = train_reward_model.Arguments(**trained["arguments"])
    settings = arguments.settings
    records, _ = reward_model.read_records(arguments.records)
    train, _ = training.split(records, settings.eval_examples, settings.seed, "reward model")
    order = training.training_order(len(train), settings.batch_size, settings.epochs, settings.seed, "reward model")
    first = train[order[:8]]
    rows = reward_model.record_tokens(tokenizer, TEMPLATE, first, settings, "reward_model")
    model = models.new_reward_model(arguments.model, arguments.lora, "cpu", settings.seed).double()
    rewards = torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows]).view(-1, 2)
    sign = torch.tensor([1.0 if p == 1 else -1.0 for p in first["preference"]], dtype=torch.float64)
    loss = torch.log1p(torch.exp(-sign * (rewards[:, 0] - rewards[:, 1]))).mean()
    loss.backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.requires_grad]
    logged = trained["metrics"]["training"][0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logged["grad_norm"] == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-4)


def test_manifest_says_what_went_in(trained):
    manifest = json.loads((trained["folder"] / "manifest.json").read_text())
    assert "init" not in manifest["settings"]["reward_model"]
    assert manifest["inputs"][trained["arguments"]["records"]] == artifacts.hash_path(
        Path(trained["arguments"]["records"])
    )
    counts = manifest["counts"]
    assert counts["records"] == counts["held_out"] + counts["trained_on"] + counts["left_out_of_last_batch"]
    assert counts["trained_on"] == 8 * counts["steps"]
    assert [entry["step"] for entry in trained["metrics"]["training"]] == list(range(1, counts["steps"] + 1))


def test_learns_to_follow_a_principle_and_its_negation(tiny_model, template_file, tmp_path):
    """The same outputs are better or worse as the principle in the text says; without it, only half can be right."""
    make_records(900).write_parquet(tmp_path / "records.parquet")
    settings = {"batch_size": 16, "eval_examples": 100, "save_steps": 1000}
    arguments = make_arguments(
        *(tmp_path / "records.parquet", tmp_path / "rm", tiny_model, template_file),
        settings=settings,
        tokens_per_pass=4096,
        gradient_checkpointing=False,
    )
    shown = run_here(arguments)["evaluation"]["by_deciding_shown"]
    assert shown["plain"]["accuracy"] > 0.9
    assert shown["negated"]["accuracy"] > 0.9


def test_starts_from_another_reward_model(trained, tmp_path):
    arguments = trained["arguments"] | {"output": str(tmp_path / "rm"), "init": str(trained["folder"])}
    arguments["reward_model"] = arguments["reward_model"] | {"learning_rate": 1e-12, "epochs": 0.2}
    run_here(arguments)
    before, after = weights(trained["folder"]), weights(tmp_path / "rm")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)
    with pytest.raises(UserError, match=r"lora\.r 4"):
        run_here(arguments | {"lora": {"r": 4, "alpha": 16}, "output": str(tmp_path / "other")})


def test_nf4_trains(trained, tmp_path):
    arguments = trained["arguments"] | {"output": str(tmp_path / "rm")}
    arguments["model"] = {"base": arguments["model"]["base"], "quantization": "nf4", "dtype": "bfloat16"}
    arguments["reward_model"] = arguments["reward_model"] | {"epochs": 0.4}
    metrics = run_here(arguments)
    assert all(entry["grad_norm"] > 0 for entry in metrics["training"])
    assert weights(tmp_path / "rm")["base_model.model.score.weight"].dtype == torch.float32


# --- ranks


@pytest.mark.ranks
@pytest.mark.parametrize("deepspeed", [None, "zero2.json", "zero3.json"])
def test_two_ranks_give_the_result_of_one(trained, tmp_path, deepspeed):
    arguments = trained["arguments"] | {"output": str(tmp_path / "rm"), "tokens_per_pass": 1}
    # How far rounding alone moves the result: the same run with one pair per pass, so with sums in another order
    run_here(arguments | {"output": str(tmp_path / "one")})
    if deepspeed:
        arguments["deepspeed"] = str(ROOT / "profiles" / "deepspeed" / deepspeed)
    done = launch(2, *command(arguments)[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    reference, other, two = (weights(folder) for folder in (trained["folder"], tmp_path / "one", tmp_path / "rm"))
    rounding = max((other[name] - reference[name]).abs().max().item() for name in reference)
    assert reference.keys() == two.keys()
    for name, value in reference.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=10 * max(rounding, 1e-6))
    metrics = json.loads((tmp_path / "rm" / "metrics.json").read_text())
    # Adam hides a wrong scale of the gradients; their norm and the loss, which are logged, do not
    for expected, found in zip(trained["metrics"]["training"], metrics["training"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    assert metrics["evaluation"]["number"] == trained["metrics"]["evaluation"]["number"]
    assert metrics["evaluation"]["loss"] == pytest.approx(trained["metrics"]["evaluation"]["loss"], rel=1e-3)


@pytest.mark.ranks
def test_zero3_of_a_four_bit_model_trains_as_two_whole_ones(trained, tmp_path):
    """NF4 and bfloat16, as in the paper's run."""
    arguments = trained["arguments"] | {}
    arguments["model"] = {"base": arguments["model"]["base"], "quantization": "nf4", "dtype": "bfloat16"}
    arguments["reward_model"] = arguments["reward_model"] | {"epochs": 0.4}
    logged = []
    for name, deepspeed in (("whole", {}), ("shards", {"deepspeed": str(ROOT / "profiles/deepspeed/zero3.json")})):
        done = launch(2, *command(arguments | {"output": str(tmp_path / name), **deepspeed})[1:])
        assert done.returncode == 0, done.stderr[-3000:]
        logged.append(json.loads((tmp_path / name / "metrics.json").read_text())["training"])
    for expected, found in zip(*logged, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-2)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)


def test_a_batch_that_does_not_divide_is_an_error(trained, tmp_path):
    arguments = trained["arguments"] | {"output": str(tmp_path / "rm")}
    with (
        mock.patch.object(distributed, "world", return_value=3),
        pytest.raises(UserError, match=r"reward_model.batch_size 8 is not a multiple of the 3 processes"),
    ):
        run_here(arguments)
    assert not list(tmp_path.iterdir())


# --- resuming


# Dies at the sixth step, when its whole checkpoint is written except for the mark that says so.
KILLED = """
import os, signal, train_reward_model as script
from salmon import training
mark = training.Reporter.on_save
def die(self, args, state, control, **more):
    if state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    mark(self, args, state, control, **more)
training.Reporter.on_save = die
script.script.run(script.main, script.Arguments)
"""

# Is asked to stop in the middle of the fourth step.
STOPPED = """
import os, signal, train_reward_model as script
from salmon import training
def ask(self, args, state, control, **_):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
training.Reporter.on_step_begin = ask
script.script.run(script.main, script.Arguments)
"""


@pytest.fixture(scope="module")
def killed(trained, tmp_path_factory) -> Path:
    """Folder of the same run, killed while it wrote its second checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    program = [sys.executable, "-c", KILLED, *command(trained["arguments"] | {"output": str(folder / "rm")})[2:]]
    assert forks.run(program, env=environment()).returncode == -signal.SIGKILL
    assert not (folder / "rm").exists()
    return folder


def test_killed_and_resumed_gives_the_bytes_of_an_undisturbed_run(trained, killed, tmp_path, caplog):
    folder = tmp_path / "again"
    shutil.copytree(killed, folder)
    caplog.set_level("INFO")
    metrics = run_here(trained["arguments"] | {"output": str(folder / "rm")})
    assert "checkpoint-6, which is incomplete" in caplog.text
    assert "resuming after step 3" in caplog.text
    name = "adapter_model.safetensors"
    assert (folder / "rm" / name).read_bytes() == (trained["folder"] / name).read_bytes()
    assert metrics["evaluation"] == trained["metrics"]["evaluation"]
    assert metrics["training"] == trained["metrics"]["training"]
    assert not (folder / ".work").exists()


def test_interrupted_after_the_last_step_trains_no_more(trained, tmp_path, monkeypatch):
    arguments = trained["arguments"] | {"output": str(tmp_path / "rm")}
    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here(arguments)
    assert [path.name for path in tmp_path.iterdir()] == [".work"]
    monkeypatch.setattr(train_reward_model, "batch_loss", lambda **_: pytest.fail("it trains"))
    run_here(arguments)
    name = "adapter_model.safetensors"
    assert (tmp_path / "rm" / name).read_bytes() == (trained["folder"] / name).read_bytes()


def test_stopped_by_sigterm_and_started_again_gives_the_bytes_of_an_undisturbed_run(trained, tmp_path):
    arguments = trained["arguments"] | {"output": str(tmp_path / "rm")}
    said = failing([sys.executable, "-c", STOPPED, *command(arguments)[2:]])
    assert "stopped by SIGTERM after step 4; a checkpoint is written" in said
    assert not (tmp_path / "rm").exists()
    run_here(arguments)
    name = "adapter_model.safetensors"
    assert (tmp_path / "rm" / name).read_bytes() == (trained["folder"] / name).read_bytes()


def test_another_budget_resumes_and_gives_the_same_up_to_rounding(trained, tmp_path):
    """With recomputing, and another number of passes per step (the Trainer counts those that are done)."""
    arguments = trained["arguments"] | {"output": str(tmp_path / "rm")}
    failing([sys.executable, "-c", STOPPED, *command(arguments)[2:]])
    metrics = run_here(arguments | {"tokens_per_pass": 900, "gradient_checkpointing": True})
    assert [entry["step"] for entry in metrics["training"]] == list(range(1, 11))
    for expected, found in zip(trained["metrics"]["training"], metrics["training"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
    one, two = weights(trained["folder"]), weights(tmp_path / "rm")
    away, size = (
        sum(float(tensor.square().sum()) for tensor in each) for each in ([two[n] - one[n] for n in one], one.values())
    )
    assert away < 1e-6 * size


def test_only_the_same_settings_and_inputs_resume(trained, killed, tmp_path):
    def found(number: int, **changes: Any) -> Path | None:
        folder = tmp_path / str(number)
        shutil.copytree(killed, folder)
        arguments = train_reward_model.Arguments(**(trained["arguments"] | {"output": str(folder / "rm")} | changes))
        work = WorkFolder(arguments.output)
        origin = train_reward_model.origin_of(arguments)
        assert not training.open_work(arguments, work, origin.fingerprint(origin.identify()))
        return checkpoints.newest(work)

    other = tmp_path / "other.parquet"
    make_records(50, 2, seed=1).write_parquet(other)
    assert found(0) is not None
    assert found(1, tokens_per_pass=900, gradient_checkpointing=False) is not None  # hardware
    assert found(2, reward_model=trained["arguments"]["reward_model"] | {"learning_rate": 2e-3}) is None
    assert found(3, records=str(other)) is None
    assert found(4, init=str(trained["folder"])) is None
    assert found(5, lora={"r": 4, "alpha": 16}) is None
    assert found(6, reward_model=trained["arguments"]["reward_model"] | {"save_steps": 5}) is not None
    # DeepSpeed's checkpoints are shards, which only the same DeepSpeed on as many ranks can read: they are not deleted
    with pytest.raises(UserError, match="from another number of GPUs or other DeepSpeed settings"):
        found(7, deepspeed=str(ROOT / "profiles" / "deepspeed" / "zero2.json"))
    assert checkpoints.newest(WorkFolder(tmp_path / "7" / "rm")) is not None
    weights = Path(trained["arguments"]["model"]["base"]) / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))  # in place, of the same size
        assert found(8) is None
    finally:
        weights.write_bytes(before)
    assert found(9) is not None


# --- bad inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.clear(), "0 usable records"),
        (lambda table: table.head(23), "too few to hold out 20 .* batch of 8"),
        (lambda table: table.with_columns(preference=pl.lit(3, pl.Int8)), "neither 1 nor 2.*0000-0 with 3"),
        (lambda table: table.drop("negated"), "lacks columns: negated"),
        (lambda table: table.with_columns(instruction=pl.lit(None, pl.String)), "nulls in instruction"),
        (lambda table: pl.concat([table, table]), "2 rows of record_id 0000-0"),
        (
            lambda table: table.with_columns(definitions=pl.lit([], pl.List(pl.String))),
            "do not match; the first is record 0000-0",
        ),
        (
            lambda table: table.with_columns(
                pl.lit([], table.schema[name]).alias(name) for name in ("dimensions", "negated", "definitions")
            ).with_columns(deciding=pl.lit(None, pl.String)),
            "0 principles, but reward_model.template",
        ),
    ],
)
def test_bad_records_say_what_is_wrong_and_leave_nothing(trained, tmp_path, change, message):
    change(make_records(50, 2)).write_parquet(tmp_path / "records.parquet")
    arguments = trained["arguments"] | {"records": str(tmp_path / "records.parquet"), "output": str(tmp_path / "rm")}
    with pytest.raises(UserError, match=message):
        run_here(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["records.parquet"]


def test_records_with_principles_need_a_template_that_shows_them(trained, tmp_path):
    (tmp_path / "pmp.txt").write_text("{Output}\n{Input}\nThe quality of the output is\n")
    arguments = trained["arguments"] | {"output": str(tmp_path / "rm")}
    arguments["reward_model"] = arguments["reward_model"] | {"template": str(tmp_path / "pmp.txt")}
    with pytest.raises(UserError, match=r"1 principles, but reward_model.template .* no slot"):
        run_here(arguments)


def test_empty_outputs_are_skipped_and_counted(tmp_path):
    table = make_records(10).with_columns(
        output_1=pl.when(pl.col("record_id") == "0003-0").then(pl.lit(" \n")).otherwise("output_1")
    )
    table.write_parquet(tmp_path / "records.parquet")
    records, counts = reward_model.read_records(tmp_path / "records.parquet")
    assert counts == {"records": 10, "skipped_empty_output": 1}
    assert "0003-0" not in records["record_id"]


def test_the_script_exits_with_an_error(trained, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    arguments = trained["arguments"] | {"records": str(tmp_path / "broken.parquet"), "output": str(tmp_path / "rm")}
    done = forks.run(command(arguments))
    assert done.returncode == 1
    assert "cannot be read: parquet" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "rm").exists()
