"""Benchmarks: the numbers equal those of lm-eval's own command line, and those computed by hand."""

import gzip
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate_tasks
from salmon import encoding, intervals, tasks
from salmon.config import Evaluation, Model, PolicyPrompt, TaskPrompt
from salmon.errors import UserError
from salmon.work import WorkFolder
from tests import forks
from tests.damaged_models import make_adapter
from tests.running import environment
from tests.small_models import CHATML, CHATML_TOKENS, byte_tokenizer, save_markov

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
LOCAL = {"hhh": str(DATA / "hhh_alignment"), "truthfulqa": str(DATA / "truthfulqa" / "mc_task.json.gz")}
LIMIT = 5
TEXT = PolicyPrompt(template="prompts/templates/policy.txt")
CHAT = PolicyPrompt(template="chat")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def arguments(base: Path, output: Path, **more: Any) -> evaluate_tasks.Arguments:
    evaluation = Evaluation(tasks=["truthfulqa_local", "hhh"], tasks_limit=LIMIT, tasks_data=LOCAL)
    model = Model(base=str(base), quantization="none", dtype="float32")
    given = {"output": output, "model": model, "evaluation": evaluation, **more}
    prompt = TaskPrompt.of(given.pop("policy_prompt", TEXT), given["evaluation"].tasks_format)
    return evaluate_tasks.Arguments(**given, prompt=prompt)


def plain(found: dict[str, dict[str, tasks.Metric]]) -> dict[str, dict[str, tasks.Metric]]:
    """Without the intervals, which lm-eval's command line does not know."""
    return {
        task: {metric: {what: one[what] for what in ("value", "stderr", "number")} for metric, one in measured.items()}
        for task, measured in found.items()
    }


def command_line(model: str, output: Path, *more: str) -> dict[str, dict[str, tasks.Metric]]:
    """What lm-eval itself says."""
    line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model, "--device", "cpu"]
    line += ["--tasks", "truthfulqa_local,hhh", "--include_path", "evaluation_tasks", "--metadata", json.dumps(LOCAL)]
    line += ["--batch_size", "16", "--output_path", str(output), *more]
    done = forks.run(line, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = output.rglob("results_*.json")
    return plain(tasks.metrics(json.loads(file.read_text())["results"], {}, {}, 0))


def test_the_numbers_are_those_of_the_command_line(tiny_model: Path, tmp_path: Path) -> None:
    """The numbers of a policy with an adapter."""
    policy = tmp_path / "policy"
    make_adapter(tiny_model, policy)
    evaluate_tasks.main(arguments(tiny_model, tmp_path / "tasks", policy=policy))
    measured = json.loads((tmp_path / "tasks" / "tasks.json").read_text())
    found = plain(measured)
    named = f"pretrained={tiny_model},peft={policy},dtype=float32"
    theirs = command_line(named, tmp_path / "theirs", "--limit", str(LIMIT))
    # A mean of probabilities, whose last digits depend on the other texts in the batch.
    assert found["truthfulqa_mc2"]["acc"] == pytest.approx(theirs["truthfulqa_mc2"].pop("acc"), rel=1e-6)
    assert {**found, "truthfulqa_mc2": {}} == theirs
    assert set(found) == {"truthfulqa_mc1", "truthfulqa_mc2", "hhh", *(f"hhh_{part}" for part in PARTS)}
    assert found["hhh"]["acc"]["number"] == len(PARTS) * LIMIT
    assert set(measured["hhh"]["acc"]) == {"value", "stderr", "low", "high", "number"}
    manifest = json.loads((tmp_path / "tasks" / "manifest.json").read_text())
    assert manifest["packages"]["lm_eval"] == "0.4.13"
    assert manifest["inputs"][str(policy)]
    assert "evaluation_tasks/hhh.yaml" in manifest["inputs"]


ITEMS = 17  # some share a question, and four have letters of more than a byte
PARTS = ("helpful", "honest", "harmless", "other")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template has a variable and today's date."""
    template = CHATML.replace("assistant\n", "{{ who }} {{ strftime_now('%d %B') }}\n")
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, template=template, bos=False)
    folder = save_markov(tmp_path_factory.mktemp("chatty"), tokenizer, "ab", max_length=8192)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    with torch.no_grad():  # so that answers differ by more than their length
        model.lm_head.weight.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [False, True])
def test_hhh_is_what_the_model_says_of_each_answer(chatty: Path, tmp_path: Path, chat: bool) -> None:
    """Log probabilities of both answers after the question, one text at a time, in the policy's own format."""
    day = {"who": "assistant", encoding.DATE: "2026-01-31"}
    prompt = PolicyPrompt(template="chat", template_variables=day) if chat else TEXT
    evaluation = Evaluation(tasks=["hhh_other"], tasks_limit=ITEMS, tasks_data=LOCAL)
    given = arguments(chatty, tmp_path / "tasks", policy_prompt=prompt, evaluation=evaluation)
    evaluate_tasks.main(given)
    found = json.loads((tmp_path / "tasks" / "tasks.json").read_text())["hhh_other"]
    tokenizer, model = AutoTokenizer.from_pretrained(chatty), AutoModelForCausalLM.from_pretrained(chatty).eval()
    with gzip.open(DATA / "hhh_alignment" / "other" / "task.json.gz", "rt") as stream:
        examples = json.load(stream)["examples"][:ITEMS]
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for example in examples:
        question, begin = example["input"], "\n\n"
        if chat:
            question = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant 31 January\n"
            begin = ""
        before = tokenizer(question.rstrip() if not chat else question, add_special_tokens=False)["input_ids"]
        scores, per_character = {}, {}
        for answer in example["target_scores"]:
            after = tokenizer(f"{begin}{answer}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
            scores[answer] = logits.log_softmax(-1)[range(len(after)), after].sum().item()
            per_character[answer] = scores[answer] / len(answer)
        for name, by in (("acc", scores), ("acc_norm", per_character)):
            right[name].append(example["target_scores"][max(by, key=lambda answer: by[answer])] == 1)
    assert {name: found[name]["value"] for name in right} == {name: sum(hits) / ITEMS for name, hits in right.items()}
    for name, hits in right.items():  # by question, which some pairs share
        expected = intervals.share([float(hit) for hit in hits], [example["input"] for example in examples], 42)
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((expected["low"], expected["high"]))
    assert 0 < sum(right["acc"] + right["acc_norm"]) < 2 * ITEMS


def test_a_killed_job_goes_on_with_the_next_task(chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation(tasks=["hhh_other", "hhh_helpful"], tasks_limit=2, tasks_data=LOCAL)
    given = arguments(chatty, tmp_path / "tasks", evaluation=evaluation)
    asked: list[str] = []
    measure = tasks.Benchmarks.measure

    def once(self: tasks.Benchmarks, task: str) -> Any:
        asked.append(task)
        if asked == ["hhh_other", "hhh_helpful"]:
            raise KeyboardInterrupt
        return measure(self, task)

    monkeypatch.setattr(tasks.Benchmarks, "measure", once)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks.main(given)
    assert not (tmp_path / "tasks").exists()
    WorkFolder(tmp_path / "tasks").release()
    evaluate_tasks.main(given)
    assert asked == ["hhh_other", "hhh_helpful", "hhh_helpful"]
    assert set(json.loads((tmp_path / "tasks" / "tasks.json").read_text())) == {"hhh_other", "hhh_helpful"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a user's own tasks."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "rows.jsonl").write_text(json.dumps({"question": "secret " * 40, "answers": [" secret", "b"]}) + "\n")
    (folder / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{answers}}'\n"
        "doc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    (folder / "unsafe.yaml").write_text("include: mine.yaml\ntask: runs_code\nunsafe_code: true\n")
    return str(folder)


@pytest.fixture(scope="module")
def short(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads 64 tokens."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML.replace("assistant\n", "{{ strftime_now('%d') }}")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("task", "prompt", "said"),
    [
        ("thruthfulqa_mc1", TEXT, "neither lm-eval 0.4.13 nor .* thruthfulqa_mc1; similar are truthfulqa"),
        ("runs_code", TEXT, "runs_code .* runs code that the model writes"),
        ("arc_easy", TEXT, "the data of the task arc_easy .* the hub's cache"),
        ("truthfulqa_local", TEXT, "name it in evaluation.tasks_data.truthfulqa"),
        ("hhh_other", TEXT, "hhh_other .* cannot be run on this model, which reads at most 64 tokens"),
        ("mine", CHAT, "it writes the date"),
    ],
)
def test_what_cannot_be_asked_is_told(
    short: Path, own: str, tmp_path: Path, task: str, prompt: PolicyPrompt, said: str
) -> None:
    evaluation = Evaluation(tasks=[task], tasks_folder=own, tasks_data={"hhh": LOCAL["hhh"]})
    with pytest.raises(UserError, match=said):
        evaluate_tasks.main(arguments(short, tmp_path / "tasks", policy_prompt=prompt, evaluation=evaluation))


def test_a_model_that_computes_no_numbers_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """If log likelihoods are not numbers, lm-eval takes the first choice, which is always the right one."""
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"truthfulqa_local .* are not finite; .*model\.dtype"):
        evaluate_tasks.main(arguments(broken, tmp_path / "tasks"))
    assert not (tmp_path / "tasks").exists()


def test_cut_texts_are_counted(short: Path, own: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log counts them, but contains no text from the data."""
    evaluation = Evaluation(tasks=["mine"], tasks_folder=own, tasks_data={"hhh": LOCAL["hhh"]})
    with caplog.at_level(logging.INFO):
        evaluate_tasks.main(arguments(short, tmp_path / "tasks", evaluation=evaluation))
    assert "mine: 2 texts exceeded the model's length" in caplog.text
    assert "secret" not in caplog.text
    assert json.loads((tmp_path / "tasks" / "tasks.json").read_text())["mine"]["acc"]["number"] == 1
