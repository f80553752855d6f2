"""Answer the questions of MT-Bench, both turns, in a file that FastChat's judges can read.

The random numbers belong to the question: all policies answer with the same ones.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from salmon import artifacts, encoding, models, mt_bench, provenance, script, vllm, vllm_server
from salmon.config import Evaluation, Model, PolicyPrompt
from salmon.distributed import init
from salmon.errors import UserError
from salmon.identity import context_limit, read_config
from salmon.mt_bench import Question
from salmon.randomness import seed_of
from salmon.sampling import Sampler, TransformersSampler, without_thinking
from salmon.tokenizers import load_tokenizer

log = logging.getLogger("salmon.answer_mt_bench")


class Arguments(script.Arguments):
    """Answer MT-Bench."""

    policy: Path | None = Field(None, description="folder of the policy; without it, the initial policy answers")
    name: str = Field(pattern=r"^\w[\w-]*$", description="the model's name, in the file and as the file's name")
    output: Path = Field(description="folder to write: NAME.jsonl, manifest.json")
    model: Model = Field(description="section of the configuration: the initial policy")
    policy_prompt: PolicyPrompt = Field(description="section of the configuration")
    evaluation: Evaluation = Field(description="section of the configuration")
    batch_size: int = Field(32, ge=1, description="hardware: prompts sampled at once")
    engine_base: Path | None = Field(
        None, description="folder of dequantize_base; the engine serves it in place of 4-bit weights"
    )
    engine: vllm_server.Hardware = Field(
        vllm_server.Hardware(), description="hardware: where the engine runs, if there is one"
    )


class Dialogues:
    """The policy's dialogues with the user of the questions.

    Args:
        arguments: the script's arguments.
        tokenizer: the model's tokenizer.
        sampler: samples the answers.
        limit: maximum tokens that it reads; None for any number.
    """

    def __init__(
        self, arguments: Arguments, tokenizer: PreTrainedTokenizerBase, sampler: Sampler, limit: int | None
    ) -> None:
        self.arguments, self.tokenizer, self.sampler, self.limit = arguments, tokenizer, sampler, limit
        self.preamble = encoding.read_preamble(arguments.policy_prompt)
        self.no_room = 0

    def answer(self, questions: Sequence[Question]) -> list[list[str]]:
        """Answers to the turns of each question; empty if a dialogue leaves no room for one."""
        answers: list[list[str]] = [[] for _ in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            asked = [row for row, question in enumerate(questions) if turn < len(question.turns)]
            for temperature in sorted({questions[row].temperature for row in asked}):
                rows = [row for row in asked if questions[row].temperature == temperature]
                said = [self._said(questions[row], answers[row]) for row in rows]
                for row, text in zip(rows, self._sample(said, [questions[row] for row in rows], turn), strict=True):
                    answers[row].append(text)
        return answers

    def _said(self, question: Question, answers: Sequence[str]) -> list[str]:
        """The turns so far, with the user first and last."""
        before = [text for pair in zip(question.turns, answers, strict=False) for text in pair]
        return [*before, question.turns[len(answers)]]

    def _sample(self, said: Sequence[Sequence[str]], questions: Sequence[Question], turn: int) -> list[str]:
        """The next answer of each dialogue; all questions must have the same temperature."""
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
        raise UserError("evaluation.mt_bench does not name a question file")
    questions = mt_bench.read_questions(Path(arguments.evaluation.mt_bench))
    tokenizer = load_tokenizer(arguments.model)
    packages = vllm_server.packages(arguments.engine) if arguments.evaluation.engine == "vllm" else {}
    with open_sampler(arguments, tokenizer, questions) as (sampler, limit):
        dialogues = Dialogues(arguments, tokenizer, sampler, limit)
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
        artifacts.write_json(folder / "manifest.json", origin.manifest(origin.identify(), counts, packages))


@contextmanager
def open_sampler(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> Iterator[tuple[Sampler, int | None]]:
    """The policy's sampler, and the maximum tokens of prompt and answer that it reads; None for any number."""
    model = arguments.model.with_adapter(arguments.policy) if arguments.policy else arguments.model
    if arguments.evaluation.engine == "vllm":
        longest = longest_dialogue(tokenizer, questions, arguments.policy_prompt, arguments.evaluation.mt_bench_tokens)
        longest = min(longest, context_limit(read_config(model, Path())) or longest)
        model = vllm_server.served(model, arguments.engine_base)
        with vllm.open_sampler(
            arguments.engine, model, tokenizer, longest=longest, key="evaluation.mt_bench_tokens"
        ) as engine:
            yield engine, longest
        return
    device = init()
    policy = models.load_initial_policy(model, device)
    limit = context_limit(policy.config.to_dict())  # type: ignore[union-attr,operator]
    yield TransformersSampler(tokenizer, device, batch_size=arguments.batch_size, model=policy), limit


def longest_dialogue(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], prompt: PolicyPrompt, answer: int
) -> int:
    """Tokens of the longest dialogue with answers of this length; earlier answers may take half as many again."""
    preamble = encoding.read_preamble(prompt)
    lengths = []
    for question in questions:
        said = [text for turn in question.turns for text in (turn, "")][:-1]
        asked = len(encoding.encode_dialogue(tokenizer, said, prompt, preamble))
        lengths.append(asked + answer * len(question.turns) + answer * (len(question.turns) - 1) // 2)
    return max(lengths)


if __name__ == "__main__":
    script.run(main, Arguments)
