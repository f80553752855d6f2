"""The demo's training data for its initial policy: texts of the world in `world.py`, with labels.

Answers of mixed qualities follow the policy's prompt; pairs of them are in the judge's prompt, with questions about
several principles; single answers are in the reviewer's prompt, with guidelines of a few principles. The workflow's own
functions fill the templates. The oracle answers the questions and gives the verdicts. It also gives what a reader
should notice: for each sentence what it states, for each answer its scores.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow_scripts")]

from demo import oracles, world  # noqa: E402
from salmon import principles, randomness, templates  # noqa: E402
from salmon.judging import option_tokens  # noqa: E402
from salmon.margins import common_prefix  # noqa: E402

CONTEXT = 512
TEXT_WEIGHT = 0.1  # of every token in the loss; a judgement has weight 1
SUBJECT_WEIGHT = 1.0  # of subjects that answers name: with less, a writer does not keep to the question
GROUPS = sorted(world.FACTS)
MARKS = ("right", "asked", "numbered", "rude", "teaching", "vivid")
VERDICTS = (" good", " bad")  # continue the reviewer's turn
GUIDELINE_SIZES = (1, 1, 2, 3)  # principles in one guideline, all sizes equally likely; RL shows up to three


@dataclass(frozen=True, slots=True)
class Answered:
    """An instruction and an answer to it."""

    instruction: str
    answer: str


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that one of two tokens continues, depending on what principles say about one or two answers.

    Attributes:
        prompt: the filled template.
        name: name of the principle or guideline asked about.
        truths: each principle's sentence -> how true it is of the first answer and the second (nan: no second answer),
            the oracle's score, or 1 minus that score for a negated principle.
        probability: of the first token: 1, 0, or something between.
    """

    prompt: str
    name: str
    truths: dict[str, tuple[float, float]]
    probability: float


@dataclass(slots=True)
class Example:
    """One training sequence: a text, and questions that each continue it independently.

    Attributes:
        prefix: token ids that are read first.
        weights: each one's weight in the loss, as the token to predict.
        branches: token ids of each question after the prefix.
        questions: the question of each branch.
        options: the two tokens that may continue each branch.
        sentences: position in the prefix where a sentence of an answer ends -> the sentence.
        scores: position in the prefix right after an answer -> the oracles' scores of the answer.
        truths: position where a statement about the answers ends (counted through prefix and all branches) -> how true
            it is of the first answer and of the second, from 0 to 1; nan without a second answer.
    """

    prefix: list[int]
    weights: list[float]
    branches: list[list[int]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    options: tuple[int, int] = (0, 0)
    sentences: dict[int, oracles.Sentence] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)
    truths: dict[int, tuple[float, float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))

    def note(self, read: BatchEncoding, start: int, about: Answered, shift: int = 0) -> None:
        """Record the labels of an answer that begins at a character of a text, after `shift` tokens.

        The subjects that it names get their own weight in the loss.
        """
        for first, end in oracles.subject_spans(about.answer):
            places = (read.char_to_token(start + place) for place in (first, end - 1))
            for place in range(next(places), next(places) + 1):
                self.weights[shift + place] = SUBJECT_WEIGHT
        for sentence in oracles.read_sentences(about.instruction, about.answer):
            self.sentences[shift + read.char_to_token(start + sentence.end - 1)] = sentence
        last = shift + read.char_to_token(start + len(about.answer) - 1)
        self.scores[last + 1] = list(oracles.score(about.instruction, about.answer).values())


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples as tensors, of shape [examples, length] unless stated otherwise.

    A row has the prefix, then its branches. A branch sees the prefix and itself, and its positions continue from the
    end of the prefix:

        tokens      p p p p q q q r r .      p prefix, q and r two questions, . padding
        positions   0 1 2 3 4 5 6 4 5
        targets     p p p             -      at each position: the token to predict
        judged                  ^   ^        where the option is predicted
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor  # True is visible, shape [examples, 1, length, length]
    targets: Tensor
    weights: Tensor
    sentence_ends: Tensor  # row and column, shape [sentences, 2]
    groups: Tensor  # `oracles.Sentence.groups` as places in GROUPS, -1 if nothing is stated, shape [sentences, 3]
    marks: Tensor  # 1, 0, or nan if not applicable, for each of MARKS, shape [sentences, marks]
    answer_ends: Tensor  # one token after the answers: row and column, shape [answers, 2]
    scores: Tensor  # in the order of `oracles.ORACLES`, shape [answers, dimensions]
    statement_ends: Tensor  # row and column, shape [statements, 2]
    truths: Tensor  # of the first answer and the second, nan if there is none, shape [statements, 2]
    judged: Tensor  # row and column, shape [questions, 2]
    options: Tensor  # the two tokens that may follow, shape [questions, 2]
    probabilities: Tensor  # of the first of them, shape [questions]

    def to(self, device: torch.device) -> "Batch":
        """The batch, on a device."""
        return Batch(*(getattr(self, each.name).to(device) for each in fields(self)))


class Texts:
    """Draws texts of the world, in the words of templates and principles."""

    def __init__(
        self,
        policy_template: Path,
        judge_template: Path,
        review_templates: Sequence[Path],
        principle_file: Path,
        marker: str,
    ) -> None:
        self.preamble = templates.read(policy_template)
        self.judge = templates.read(judge_template)
        self.review_templates = [templates.read(path) for path in review_templates]
        self.principles = principles.read_judged(principle_file)
        self.marker = marker
        self.train = world.instructions("train")
        self.known = world.known_instructions()

    def policy(self, instruction: str) -> str:
        """The policy's prompt."""
        return templates.policy_prompt(self.preamble, self.marker, instruction)

    def judgement(self, instruction: str, output_a: str, output_b: str, dimension: str, definition: str) -> str:
        """The judge's prompt."""
        return templates.fill(
            self.judge,
            UserInstruction=instruction,
            OutputA=output_a,
            OutputB=output_b,
            Dimension=dimension,
            Definition=definition,
        )

    def answer(self, rng: np.random.Generator) -> Answered:
        """An answer of mixed qualities. Every second one is about a held-out subject, in a training template."""
        instruction = world.pick(rng, self.known if rng.random() < 0.5 else self.train)
        return Answered(instruction.text, world.write_answer(instruction, world.draw_qualities(rng), rng))

    def pair(self, rng: np.random.Generator, size: float = 1) -> tuple[Answered, Answered]:
        """Two answers to a training instruction; `size` as in `world.draw_qualities`."""
        instruction = world.pick(rng, self.train)
        first, second = (world.write_answer(instruction, world.draw_qualities(rng, size), rng) for _ in range(2))
        return Answered(instruction.text, first), Answered(instruction.text, second)

    def reviews(self, about: Answered, rng: np.random.Generator) -> list[Question]:
        """The reviewer's prompt about an answer, with guidelines that together have all principles, some negated.

        The better the answer by the mean over the guideline's principles, the likelier is " good".
        """
        scores = oracles.score(about.instruction, about.answer)
        template = world.pick(rng, self.review_templates)
        left = [self.principles[index] for index in rng.permutation(len(self.principles))]
        questions = []
        while left:
            size = world.pick(rng, GUIDELINE_SIZES)
            shown, left = left[:size], left[size:]
            truths = {}
            for principle in shown:
                if rng.random() < 0.5:
                    truths[principle.definition] = (scores[principle.dimension], math.nan)
                else:
                    truths[principle.negative_definition] = (1 - scores[principle.dimension], math.nan)
            prompt = templates.fill(
                template, Input=about.instruction, Output=about.answer, Dimensions=templates.bullets(list(truths))
            )
            questions.append(
                Question(prompt, "(verdict)", truths, sum(truth for truth, _ in truths.values()) / len(truths))
            )
        return questions

    def questions(self, pair: tuple[Answered, Answered], rng: np.random.Generator, most: int) -> list[Question]:
        """The judge's prompts about a pair, each by a different principle; those with a clear answer come first."""
        scores = [oracles.score(one.instruction, one.answer) for one in pair]
        clear: list[Question] = []
        ties: list[Question] = []
        for index in rng.permutation(len(self.principles)):
            dimension, definition = self.principles[index].dimension, self.principles[index].definition
            prompt = self.judgement(pair[0].instruction, pair[0].answer, pair[1].answer, dimension, definition)
            truths = (scores[0][dimension], scores[1][dimension])
            difference = truths[0] - truths[1]
            if abs(difference) > oracles.MARGIN:
                clear.append(Question(prompt, dimension, {definition: truths}, float(difference > 0)))
            else:
                ties.append(Question(prompt, dimension, {definition: truths}, 0.5))
        return [*clear, *ties][:most]


def corpus(texts: Texts, rng: np.random.Generator) -> Iterator[str]:
    """Texts that hold every word the model will read in the demo."""
    for path in sorted((ROOT / "demo/templates").glob("*.txt")):
        yield templates.read(path)
    yield texts.policy("") + "\n### User\n"
    for principle in texts.principles:
        yield texts.judgement("", "", "", principle.dimension, principle.definition)
        yield templates.bullets([principle.definition, principle.negative_definition])
    yield from VERDICTS
    for instruction in world.instructions("train") + world.instructions("held_out"):
        yield f"\n{instruction.text}"
        for _ in range(5):
            yield "\n" + world.write_answer(instruction, world.draw_qualities(rng), rng)


def make_tokenizer(texts: Texts, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every word of the demo and one for every byte, so it can read any text."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rng = randomness.rng("demo corpus", seed)
    words = {word for text in corpus(texts, rng) for word, _ in split.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    # The likeliest split wins: a whole word costs 1 and a byte 20, so words are never split into bytes.
    vocabulary = [
        *((token, 0.0) for token in special),
        *((byte, -20.0) for byte in alphabet),
        *((word, -1.0) for word in sorted(words - set(alphabet))),
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", special.index("<s>"))]
            ),
        ]
    )
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


class Encoder:
    """Texts as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Texts) -> None:
        self.tokenizer = tokenizer
        self.texts = texts
        self.options = option_tokens(tokenizer, [texts.judge])
        good, bad = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in VERDICTS)
        if len(good) != 1 or len(bad) != 1:
            raise ValueError("a verdict is not a single token")
        self.verdicts = (good[0], bad[0])

    def answer(self, about: Answered) -> Example:
        """An answer to learn, after the policy's prompt, with the end token."""
        start = self.tokenizer(self.texts.policy(about.instruction))["input_ids"]
        read = self.tokenizer(about.answer, add_special_tokens=False)
        ids = [*start, *read["input_ids"], self.tokenizer.eos_token_id]
        example = Example(ids, [0.0] * len(start) + [TEXT_WEIGHT] * (len(ids) - len(start)))
        example.note(read, 0, about, shift=len(start))
        return example

    def reviews(self, about: Answered, questions: list[Question]) -> Example:
        """Guidelines for the reviewer of an answer."""
        return self._ask([about], questions, self.verdicts, text_weight=0.0)

    def judgements(self, pair: tuple[Answered, Answered], questions: list[Question]) -> Example:
        """Questions to the judge of a pair."""
        return self._ask(pair, questions, self.options, text_weight=TEXT_WEIGHT)

    def _ask(
        self, answers: Sequence[Answered], questions: list[Question], options: tuple[int, int], text_weight: float
    ) -> Example:
        """Questions about answers: the common beginning of all prompts is computed once, as in the workflow's judge."""
        read = self.tokenizer([question.prompt for question in questions])
        shared = common_prefix(read["input_ids"])
        branches = [ids[shared:] for ids in read["input_ids"]]
        weights = [0.0] + [text_weight] * (shared - 1)
        example = Example(read["input_ids"][0][:shared], weights, branches, questions, options)
        prompt = questions[0].prompt
        first = self.tokenizer(prompt)
        start = 0
        for about in answers:
            start = prompt.index(about.answer, start)
            example.note(first, start, about)
            start += len(about.answer)
        before = 0  # tokens of earlier branches
        for number, question in enumerate(questions):
            for statement, truths in question.truths.items():
                end = question.prompt.rindex(statement) + len(statement) - 1
                example.truths[before + read.char_to_token(number, end)] = truths
            before += len(branches[number])
        return example


def collate(examples: Sequence[Example]) -> Batch:
    """Join examples into a batch; see `Batch`."""
    width = max(map(len, examples))
    shape = (len(examples), width)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int64)  # 0 the prefix, then one number per branch, -1 padding
    targets, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    sentence_ends, answer_ends, judged = [], [], []
    sentences: list[oracles.Sentence] = []
    for row, example in enumerate(examples):
        length = end = len(example.prefix)
        ids[row, :length] = example.prefix
        positions[row, :length] = np.arange(length)
        segments[row, :length] = 0
        targets[row, : length - 1] = example.prefix[1:]
        weights[row, : length - 1] = example.weights[1:]
        sentence_ends += [(row, place) for place in example.sentences]
        sentences += example.sentences.values()
        answer_ends += [(row, place) for place in example.scores]
        for number, branch in enumerate(example.branches, start=1):
            place, end = end, end + len(branch)
            ids[row, place:end] = branch
            positions[row, place:end] = length + np.arange(len(branch))
            segments[row, place:end] = number
            judged.append((row, end - 1))
    segment = torch.from_numpy(segments)
    seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    mask = seen & torch.ones(width, width, dtype=torch.bool).tril()
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        mask[:, None],
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        _places(sentence_ends),
        torch.tensor([_groups(sentence) for sentence in sentences], dtype=torch.int64).view(-1, 3),
        torch.tensor([_marks(sentence) for sentence in sentences]).view(-1, len(MARKS)),
        _places(answer_ends),
        torch.tensor([scores for example in examples for scores in example.scores.values()]),
        _places([(row, place) for row, example in enumerate(examples) for place in example.truths]),
        torch.tensor([truths for example in examples for truths in example.truths.values()]).view(-1, 2),
        _places(judged),
        _places([example.options for example in examples for _ in example.questions]),
        torch.tensor([question.probability for example in examples for question in example.questions]),
    )


def _places(places: list[tuple[int, int]]) -> Tensor:
    """Pairs of numbers, such as rows and columns, of shape [pairs, 2]."""
    return torch.tensor(places, dtype=torch.int64).view(-1, 2)


def _groups(sentence: oracles.Sentence) -> list[int]:
    """Indices of a sentence's groups in GROUPS."""
    return [GROUPS.index(group) for group in sentence.groups] if sentence.groups else [-1, -1, -1]


def _marks(sentence: oracles.Sentence) -> list[float]:
    """1, 0 or nan (not applicable) for each of MARKS."""
    extras = [float(mark) for mark in (sentence.numbered, sentence.rude, sentence.teaching, sentence.vivid)]
    if sentence.groups is None:
        return [math.nan, math.nan, *extras]
    asked, named, fact = sentence.groups
    return [float(named == fact), float(named == asked), *extras]
