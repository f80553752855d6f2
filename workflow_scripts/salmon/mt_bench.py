"""MT-Bench (Zheng et al., arXiv 2306.05685): questions of two turns, and answers in the format of FastChat.

FastChat (github.com/lm-sys/FastChat, fastchat/llm_judge) has the questions, `data/mt_bench/question.jsonl`, and judges
answers in files of this format. The temperatures are those of its `common.py`; the number of tokens is that of its
`gen_model_answer.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from salmon.border import read_text
from salmon.errors import UserError, findings
from salmon.randomness import digest

TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
"""Sampling temperature by category."""
OTHER_TEMPERATURE = 0.7
"""Temperature of any other category."""


class Question(BaseModel):
    """A line of the question file; its other fields are for the judge.

    Attributes:
        question_id: the question's id.
        category: determines the temperature.
        turns: the user's first turn, and the one after the answer.
    """

    question_id: int | str
    category: str
    turns: list[str] = Field(min_length=1)

    @property
    def temperature(self) -> float:
        """The sampling temperature of its answers."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


class Choice(BaseModel):
    """The answers of one sample to the turns of a question."""

    index: int
    turns: list[str]


class Answer(BaseModel):
    """A line of an answer file."""

    question_id: int | str
    answer_id: str
    model_id: str
    choices: list[Choice] = Field(min_length=1)
    tstamp: float


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        UserError: with the line that is not a question, or the question that occurs twice.
    """
    return _read(path, Question, "a question of FastChat (evaluation.mt_bench)")


def read_answers(path: Path) -> list[Answer]:
    """The answers in a file of the workflow.

    Raises:
        UserError: with the line that is not an answer, or the question that is answered twice.
    """
    return _read(path, Answer, "an answer in FastChat's format; move its folder away, so that it is built again")


def _read(path: Path, kind: type[Any], what: str) -> list[Any]:
    """The rows of a JSON Lines file."""
    text = read_text(path, "", f"each line should be {what}")
    found: dict[int | str, Any] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = kind.model_validate_json(line)
            except ValidationError as error:
                keys = ", ".join(sorted({finding.partition(":")[0] for finding in findings(error, kind)}))
                raise UserError(f"{path}: line {number} is not {what}: check {keys}") from None
            if row.question_id in found:
                raise UserError(f"{path}: line {number} repeats the question {row.question_id}")
            found[row.question_id] = row
    if not found:
        raise UserError(f"{path} is empty; each line should be {what}")
    return list(found.values())


def answer_lines(questions: Sequence[Question], answers: Sequence[Sequence[str]], model_id: str) -> str:
    """Answers in the form of a FastChat file.

    Args:
        questions: the questions in file order.
        answers: for each question, the answers to its turns.
        model_id: the model's name; FastChat expects it to be the file's name.

    Returns:
        JSON Lines. An answer's time is 0 and its id is a hash, so equal answers give equal files.
    """
    lines = []
    for question, turns in zip(questions, answers, strict=True):
        answer_id = digest(model_id, str(question.question_id), *turns)
        choice = Choice(index=0, turns=list(turns))
        answer = Answer(
            question_id=question.question_id, answer_id=answer_id, model_id=model_id, choices=[choice], tstamp=0.0
        )
        lines.append(json.dumps(answer.model_dump(), ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)
