"""Answer the questions of MT-Bench, both turns, in a file that FastChat's judges read.

A question's draws are its own: all policies answer with the same random numbers.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from salmon import artifacts, encoding, models, mt_bench, provenance, script
from salmon.config import Evaluation, Model, PolicyPrompt
from salmon.distributed import init
from salmon.errors import UserError
from salmon.identity import context_limit
from salmon.mt_bench import Question
from salmon.randomness import seed_of
from salmon.sampling import TransformersSampler, without_thinking
from salmon.tokenizers import load_tokenizer

log = logging.getLogger("salmon.answer_mt_bench")


class Arguments(script.Arguments):
    """Answer MT-Bench."""

    policy: Path | None = Field(None, description="folder of the policy; without it, the initial policy answers")
    name: str = Field(pattern=r"^\w[\w-]*$", description="of the model, in the file and as its name")
    output: Path = Field(description="folder to write: NAME.jsonl, manifest.json")
    model: Model = Field(description="section of the configuration: the initial policy")
    policy_prompt: PolicyPrompt = Field(description="section of the configuration")
    evaluation: Evaluation = Field(description="section of the configuration")
    batch_size: int = Field(32, ge=1, description="hardware: prompts at a time")


class Dialogues:
    """The dialogues of a policy with the questions' user."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments, device = arguments, init()
        self.tokenizer = load_tokenizer(arguments.model)
        self.preamble = encoding.read_preamble(arguments.policy_prompt)
        policy = models.load_policy(arguments.model, arguments.policy, device)
        self.sampler = TransformersSampler(self.tokenizer, device, batch_size=arguments.batch_size, model=policy)
        self.limit = context_limit(policy.config.to_dict())  # type: ignore[union-attr,operator]
        self.no_room = 0

    def answer(self, questions: Sequence[Question]) -> list[list[str]]:
        """Answers to the turns of each question; empty where a dialogue leaves no room for one."""
        answers: list[list[str]] = [[] for _ in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            for temperature in sorted({question.temperature for question in questions}):
                rows = [
                    row
                    for row, question in enumerate(questions)
                    if question.temperature == temperature and turn < len(question.turns)
                ]
                said = [self._said(questions[row], answers[row]) for row in rows]
                for row, text in zip(rows, self._sample(said, [questions[row] for row in rows], turn), strict=True):
                    answers[row].append(text)
        return answers

    def _said(self, question: Question, answers: Sequence[str]) -> list[str]:
        """What was said so far, the user first and last."""
        before = [text for pair in zip(question.turns, answers, strict=False) for text in pair]
        return [*before, question.turns[len(answers)]]

    def _sample(self, said: Sequence[Sequence[str]], questions: Sequence[Question], turn: int) -> list[str]:
        """The next answer of each dialogue; the questions are of one temperature."""
        prompt, evaluation = self.arguments.policy_prompt, self.arguments.evaluation
        prompts = [encoding.encode_dialogue(self.tokenizer, texts, prompt, self.preamble) for texts in said]
        rooms = [
            evaluation.mt_bench_tokens
            if self.limit is None
            else min(evaluation.mt_bench_tokens, self.limit - len(tokens))
            for tokens in prompts
        ]
        fit = [place for place, room in enumerate(rooms) if room > 0]
        self.no_room += len(prompts) - len(fit)
        found = self.sampler.sample(
            [prompts[place] for place in fit],
            [seed_of("mt_bench", evaluation.seed, questions[place].question_id, turn) for place in fit],
            max_new_tokens=[rooms[place] for place in fit],
            temperature=questions[0].temperature,
            stop=prompt.stop,
        )
        begun = encoding.begins_thinking(self.tokenizer, prompt, self.preamble)
        texts = [""] * len(prompts)
        for place, answer in zip(fit, found, strict=True):
            texts[place] = without_thinking(self.tokenizer, answer, prompt.thinking, begun=begun)[0].strip()
        return texts


def main(arguments: Arguments) -> None:
    """Answer, write the folder."""
    if arguments.evaluation.mt_bench is None:
        raise UserError("evaluation.mt_bench names no file of questions")
    questions = mt_bench.read_questions(Path(arguments.evaluation.mt_bench))
    dialogues = Dialogues(arguments)
    answers = dialogues.answer(questions)
    origin = provenance.answer_mt_bench(
        arguments.policy,
        arguments.name,
        model=arguments.model,
        policy_prompt=arguments.policy_prompt,
        evaluation=arguments.evaluation,
    )
    counts = {"questions": len(questions), "answers": sum(map(len, answers)), "no_room": dialogues.no_room}
    log.info("%s", ", ".join(f"{name} {number}" for name, number in counts.items()))
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        lines = mt_bench.answer_lines(questions, answers, arguments.name)
        (folder / f"{arguments.name}.jsonl").write_text(lines, encoding="utf-8")
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts))


if __name__ == "__main__":
    script.run(main, Arguments)
