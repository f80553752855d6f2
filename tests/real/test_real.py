"""A real instruct model on real data through the whole DAG: `make test-real`.

The tiny models of the other tests answer with noise. Here answers are English, end by themselves, and contain what
people and models write: lists, code, quotation marks. What each stage computes is recomputed with transformers and PEFT
alone, one text at a time and without padding. So small a run is not expected to reach any quality.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2 import fetch_model
from salmon import encoding, language, principles, reward_model, templates
from salmon.configuration import load
from salmon.encoding import read_template
from salmon.tables import JUDGEMENTS
from salmon.training import split
from tests.running import merge

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("config.yaml")
MODEL = ROOT / "examples" / "smollm2" / "model"


def snakemake(results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "snakemake", "--profile", "profiles/cpu", "--nolock", *arguments]
    line += ["--configfile", str(CONFIG), "--config", f"pathvars={{results: {results}}}"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1500)


@pytest.fixture(scope="module", autouse=True)
def _at_the_root() -> Iterator[None]:
    """The configuration's paths, including those in the adapters, start there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def settings() -> Any:
    """The configuration as the rules see it."""
    base, overlay = (yaml.safe_load(path.read_text()) for path in (ROOT / "config.yaml", CONFIG))
    return load(merge(base, overlay), ROOT)["default"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All artifacts, built by one call."""
    assert MODEL.is_dir(), "run `python examples/smollm2/fetch_model.py`, or `make test-real`"
    folder = tmp_path_factory.mktemp("real") / "results"
    done = snakemake(folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@cache
def base() -> Any:
    """The model as transformers loads it, in float32 as the rules do."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def responses(results: Path, index: int) -> pl.DataFrame:
    return pl.read_parquet(results / "responses" / f"response{index}.parquet")


# ---- The model folder


def test_the_model_is_fetched_once() -> None:
    before = {file: file.stat().st_mtime_ns for file in MODEL.iterdir()}
    line = [sys.executable, ROOT / "examples" / "smollm2" / "fetch_model.py"]
    subprocess.run(line, check=True, capture_output=True, timeout=60)
    assert {file: file.stat().st_mtime_ns for file in MODEL.iterdir()} == before
    assert fetch_model.is_whole(MODEL)
    assert not list(MODEL.parent.glob(".*.tmp"))


def test_the_tokenizer_is_the_one_that_the_model_was_trained_with() -> None:
    """Digits are separate tokens, so what precedes them does not depend on them; special tokens are known as such."""
    tokens = tokenizer().tokenize("First:\n\n1. Take 23 of them")
    assert tokens == ["First", ":", "ĊĊ", "1", ".", "ĠTake", "Ġ", "2", "3", "Ġof", "Ġthem"]
    assert (tokenizer().eos_token, tokenizer().bos_token) == ("<|im_end|>", "<|im_start|>")
    ends = base().generation_config.eos_token_id
    assert tokenizer().convert_ids_to_tokens(ends) == list(fetch_model.ENDS)


# ---- The stages


def test_the_model_was_checked(results: Path) -> None:
    facts: dict[str, Any] = {}
    for part in ("sampling", "judging", "training", "rl"):
        facts |= json.loads((results / "check_model" / part / "report.json").read_text())
        assert (results / "check_model" / part / "report.md").read_text().count(": passed") >= 1
    assert facts["judging"]["way"] == "packed"
    assert facts["training"]["layers with LoRA"] == 30 * 7
    assert facts["training"]["linear weights without"] == 0


def test_prompts_are_turns_of_a_chat(results: Path) -> None:
    for row in responses(results, 0).iter_rows(named=True):
        turns = [{"role": "user", "content": row["instruction"]}]
        ids = tokenizer().apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert row["prompt_tokens"] == len(ids)
        assert row["input"] == ""


def test_responses_are_english_and_some_end_by_themselves(results: Path, settings: Any) -> None:
    both = pl.concat([responses(results, 0), responses(results, 1)])
    texts = both["response"].to_list()
    words = [len(text.split()) for text in texts]
    assert sorted(words)[len(words) // 4] >= 5, words
    spoken = language.detect(texts)
    assert spoken.count("en") >= 0.75 * len(texts), spoken
    special = [token.content for token in tokenizer().added_tokens_decoder.values() if token.special]
    assert len(special) >= 3
    assert sum(token in text for token in special for text in texts) == 0
    finished = both["finish_reason"].to_list()
    assert set(finished) <= {"eos", "length"}
    assert finished.count("eos") >= 1
    shared = encoding.shared_tokens(tokenizer(), settings.policy_prompt, "")
    room = shared + settings.sampling.max_length - both["prompt_tokens"]
    cut = both["finish_reason"] == "length"
    assert (both["response_tokens"] <= room).all()
    assert both.filter(cut)["response_tokens"].to_list() == room.filter(cut).to_list()
    # The end token counts but is not in the text; tokenized again, most texts have the tokens that were sampled.
    ended = both.filter(~cut)
    again = [len(ids) + 1 for ids in tokenizer()(ended["response"].to_list())["input_ids"]]
    assert sum(map(int.__eq__, again, ended["response_tokens"].to_list())) >= len(again) / 2
    same = sum(map(str.__eq__, *(responses(results, index)["response"] for index in (0, 1))))
    assert same <= len(texts) // 4


def judge_text(settings: Any, instruction: str, output_a: str, output_b: str, principle: Any) -> str:
    """What the judge is asked, as turns of a chat, ready to be continued with a or b."""
    slots = {"UserInstruction": instruction, "OutputA": output_a, "OutputB": output_b}
    slots |= {"Dimension": principle.dimension, "Definition": principle.definition}
    parts = templates.turns(templates.read(settings.judge.template))
    system, user, begun = (templates.fill(part, **slots) for part in parts)
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return tokenizer().apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + begun


@torch.no_grad()
def margin(text: str) -> float:
    """logit(a) - logit(b) after a text, by one forward pass."""
    ids, with_a, with_b = tokenizer()([text, f"{text}a", f"{text}b"])["input_ids"]
    assert with_a[:-1] == with_b[:-1] == ids
    logits = base()(torch.tensor([ids])).logits[0, -1]
    return float(logits[with_a[-1]] - logits[with_b[-1]])


def test_judgements_are_what_the_model_says_of_the_whole_text(results: Path, settings: Any) -> None:
    judged = pl.read_parquet(results / "preferences" / "preferences.parquet")
    assert judged.columns == list(JUDGEMENTS.columns)
    shown = principles.read_judged(Path(settings.judge.principles))
    assert len(judged) == len(shown) * judged["prompt_id"].n_unique()
    scores = {(key, name): (s12, s21) for key, name, s12, s21 in judged.iter_rows()}
    rows = [{row["prompt_id"]: row for row in responses(results, index).to_dicts()} for index in (0, 1)]
    for key, principle in zip(
        judged["prompt_id"].unique(maintain_order=True)[:3], shown[:: len(shown) // 2], strict=True
    ):
        instruction = rows[0][key]["instruction"]
        first, second = (row[key]["response"] for row in rows)
        s12 = margin(judge_text(settings, instruction, first, second, principle))
        s21 = -margin(judge_text(settings, instruction, second, first, principle))
        assert scores[key, principle.dimension] == pytest.approx((s12, s21), abs=1e-3)
    assert judged["s12"].std() > 0.05  # equal because they are right, not because they are constant


def test_records_follow_judgements_that_hold_in_both_orders(results: Path, settings: Any) -> None:
    """Such judgements are rare with this judge; the manifest counts them."""
    judged = pl.read_parquet(results / "preferences" / "preferences.parquet")
    scores = {(key, name): (s12, s21) for key, name, s12, s21 in judged.iter_rows()}
    records = pl.read_parquet(results / "reward_data" / "principle_preferences.parquet")
    assert records["prompt_id"].n_unique() >= 2  # some to train on, some to hold out
    decided = records.filter(pl.col("deciding").is_not_null()).to_dicts()
    assert len(decided) > settings.reward_model.eval_examples + settings.reward_model.batch_size
    for record in decided:
        s12, s21 = scores[record["prompt_id"], record["deciding"]]
        assert s12 * s21 > 0
        negated = record["negated"][record["dimensions"].index(record["deciding"])]
        second_wins = (s12 < 0) ^ negated ^ record["flipped"] ^ record["swapped"]
        assert record["preference"] == 1 + second_wins


@pytest.mark.parametrize("stage", ["pmp", "reward_model"])
def test_reward_models_score_as_in_the_hands_of_a_stranger(results: Path, settings: Any, stage: str) -> None:
    """Held-out pairs, scored one by one with PEFT's class, give the numbers in the folder."""
    folder = results / "models" / stage
    table = results / "reward_data" / {"pmp": "pmp", "reward_model": "principle_preferences"}[stage]
    training = getattr(settings, stage)
    records, _ = reward_model.read_records(table.with_suffix(".parquet"))
    _, held = split(records, training.eval_examples, training.seed, "reward model")
    template = read_template(tokenizer(), training.template, settings.scoring, "scoring.format")
    rows = reward_model.record_tokens(tokenizer(), template, held, training, stage)
    end = "<|im_end|>\n<|im_start|>assistant\nThe quality of the output is"
    assert all(tokenizer().decode(row).endswith(end) for row in rows)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    with torch.no_grad():
        rewards = torch.stack([theirs(torch.tensor([row])).logits[0, 0] for row in rows]).view(-1, 2)
    signs = torch.tensor([3 - 2 * preference for preference in held["preference"]])
    margins = (rewards[:, 0] - rewards[:, 1]) * signs
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["evaluation"]["number"] == len(held)
    assert metrics["evaluation"]["loss"] == pytest.approx(float(-margins.sigmoid().log().mean()), abs=1e-4)
    assert metrics["evaluation"]["accuracy"] == pytest.approx(float((margins > 0).double().mean()))
    assert rewards.std() > 0.01
    assert metrics["training"]


def test_rl_begins_at_the_initial_policy_and_leaves_it(results: Path, settings: Any) -> None:
    folder = results / "runs" / "default" / "policy"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == settings.ppo.max_steps
    assert all(torch.tensor(list(step.values())).isfinite().all() for step in steps)
    assert steps[0]["kl_sequence"] == pytest.approx(0, abs=1e-4)
    assert abs(steps[1]["kl_sequence"]) > 1e-4
    for step in steps:  # each has one update, of the policy that sampled: the ratio of new to old is 1
        assert step["approximate_kl"] == pytest.approx(0, abs=1e-5)
        assert step["clip_fraction"] == 0
        assert step["gradient_norm"] > 0
        assert 1 <= step["response_tokens"] <= settings.ppo.response_length
        assert 0 < step["entropy"] < 5  # in nats; a model that knows no English has up to 10.8
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), str(folder))
    moved = [tensor.abs().max().item() for name, tensor in policy.named_parameters() if "lora_B" in name]
    assert moved
    assert min(moved) > 0


def test_every_artifact_has_a_manifest_and_nothing_is_left_to_do(results: Path) -> None:
    files = [path.with_suffix(".manifest.json") for path in results.rglob("*.parquet")]
    models = [results / "models" / name for name in ("pmp", "reward_model")]
    files += [folder / "manifest.json" for folder in (*models, results / "runs" / "default" / "policy")]
    assert len(files) >= 10
    for file in files:
        assert {"settings", "inputs", "counts", "packages", "created"} <= set(json.loads(file.read_text())), file
    again = snakemake(results, "-n")
    assert "Nothing to be done" in again.stdout + again.stderr


def test_no_text_of_the_data_is_in_the_logs(results: Path) -> None:
    texts = [*responses(results, 0)["instruction"], *responses(results, 0)["response"]]
    texts = [text[:60] for text in texts if len(text) >= 60]
    assert texts
    logs = "".join(path.read_text() for path in (results / "logs").rglob("*.log"))
    assert sum(text in logs for text in texts) == 0
