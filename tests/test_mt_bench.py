"""MT-Bench: both turns are what the model says, in FastChat's format."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import answer_mt_bench
from salmon import mt_bench
from salmon.config import Evaluation, Model, PolicyPrompt
from salmon.errors import UserError
from tests.small_models import CHATML, CHATML_TOKENS, byte_tokenizer, save_markov

TOKENS = 12
QUESTIONS = [
    {
        "question_id": 81,
        "category": "math",
        "turns": ["Add two and three.", "Now double it."],
        "reference": ["5", "10"],
    },
    {"question_id": "w1", "category": "writing", "turns": ["A poem, please.", "Shorter."]},
    {"question_id": 83, "category": "extraction", "turns": ["Which words?"]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and a chat template."""
    tokenizer = byte_tokenizer(special=CHATML_TOKENS, template=CHATML, bos=False)
    folder = save_markov(tmp_path_factory.mktemp("model"), tokenizer, "ab", max_length=256)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.4)
    loaded.save_pretrained(folder)
    return folder


def run(folder: Path, model: Path, output: str = "mt_bench", questions: Any = QUESTIONS, **more: Any) -> list[Any]:
    file = folder / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "policy.txt").write_text("You help.\n\n### User")
    given: dict[str, Any] = {
        "name": "mine",
        "output": folder / output,
        "model": Model(base=str(model), quantization="none", dtype="float32"),
        "policy_prompt": PolicyPrompt(template=str(folder / "policy.txt"), assistant_marker="### Assistant"),
        "evaluation": Evaluation(mt_bench=str(file), mt_bench_tokens=TOKENS),
        **more,
    }
    answer_mt_bench.main(answer_mt_bench.Arguments(**given))
    return [json.loads(line) for line in (folder / output / "mine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("chat", [False, True])
def test_both_turns_are_what_the_model_says(tmp_path: Path, model: Path, chat: bool) -> None:
    """The most probable tokens after the whole dialogue, by transformers' own loop."""
    more = {"policy_prompt": PolicyPrompt(template="chat", stop=[])} if chat else {}
    rows = run(tmp_path, model, **more)
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()

    def greedy(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        new = loaded.generate(**ids, do_sample=False, max_new_tokens=TOKENS)[0, ids["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True)).partition("\n### User\n")[0].strip()

    first, then = QUESTIONS[0]["turns"]
    answers = rows[0]["choices"][0]["turns"]
    if chat:
        begin, goes_on = (
            f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>\n<|im_start|>user\n",
        )
        end = "<|im_end|>\n<|im_start|>assistant\n"
    else:
        begin, goes_on = f"You help.\n\n### User\n{first}\n\n### Assistant\n", "\n\n### User\n"
        end = "\n\n### Assistant\n"
    assert answers == [greedy(begin), greedy(f"{begin}{answers[0]}{goes_on}{then}{end}")]
    assert answers[0] != answers[1]
    assert all(answers)


def test_answers_are_in_the_format_of_fastchat(tmp_path: Path, model: Path) -> None:
    rows = run(tmp_path, model)
    assert [row["question_id"] for row in rows] == [81, "w1", 83]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 2, 1]
    for row in rows:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (row["model_id"], row["tstamp"], row["choices"][0]["index"]) == ("mine", 0.0, 0)
    assert len({row["answer_id"] for row in rows}) == len(rows)
    manifest = json.loads((tmp_path / "mt_bench" / "manifest.json").read_text())
    assert manifest["counts"] == {"questions": 3, "answers": 5, "no_room": 0}
    again = run(tmp_path, model, "again", batch_size=1)
    assert again == rows
    evaluation = Evaluation(mt_bench=str(tmp_path / "question.jsonl"), mt_bench_tokens=TOKENS, seed=7)
    others = run(tmp_path, model, "other", evaluation=evaluation)
    assert [row == other for row, other in zip(rows, others, strict=True)] == [True, False, True]  # the sampled one


def test_a_second_turn_may_leave_a_temperature_without_questions(tmp_path: Path, model: Path) -> None:
    """The only question at temperature 0 has one turn; the one at 0.7 has two."""
    rows = run(tmp_path, model, questions=QUESTIONS[1:])
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 1]


def test_temperatures_are_those_of_fastchat() -> None:
    """The temperatures of its common.py, and 0.7 for an unknown category."""
    known = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
    known |= {"stem": 0.1, "humanities": 0.1, "chess": 0.7}
    found = {name: mt_bench.Question(question_id=1, category=name, turns=["a"]).temperature for name in known}
    assert found == known


def test_a_dialogue_that_fills_the_model_gets_no_answer(tmp_path: Path, model: Path) -> None:
    turns = ["a" * 190, "b" * 40]
    rows = run(tmp_path, model, questions=[{"question_id": 1, "category": "math", "turns": turns}])
    assert [bool(text) for text in rows[0]["choices"][0]["turns"]] == [True, False]
    assert json.loads((tmp_path / "mt_bench" / "manifest.json").read_text())["counts"]["no_room"] == 1


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{}"], "line 1 is not a question .* check category, question_id, turns"),
        (['{"question_id": 1, "category": "a", "turns": []}'], "line 1 is not .* check turns"),
        (['{"question_id": 1, "category": "a", "turns": ["x"]}'] * 2, "line 2 repeats the question 1"),
        (["", "secret"], "line 2 is not a question"),
        ([], "is empty"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, lines: list[str], said: str) -> None:
    file = tmp_path / "question.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=said) as caught:
        mt_bench.read_questions(file)
    assert "secret" not in str(caught.value)
