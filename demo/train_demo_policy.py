"""Train the demo's initial policy: a small Llama that answers in the world of `world.py`, and can judge.

A 70-billion-parameter model judges because it read everything; a small one gets this from its training text:
answers of mixed qualities after the policy's prompt, and judgements after the judge's prompt, filled by the
functions that the workflow uses. The oracle says which of two outputs a principle prefers.
"""

import dataclasses
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow_scripts")]

from demo import world  # noqa: E402

from salmon import artifacts, principles, randomness, script, templates  # noqa: E402
from salmon.judging import common_prefix, option_tokens  # noqa: E402

log = logging.getLogger("salmon.train_demo_policy")

CONTEXT = 512
TEXT_WEIGHT = 0.1  # of every token, where a judgement weighs 1
MICRO_BATCH = 16  # sequences


class Arguments(script.Arguments):
    """Train the demo's initial policy."""

    output: Path = Field(description="model folder to write: an ordinary transformers folder")
    policy_template: Path = Field(Path("demo/templates/policy.txt"), description="preamble of the policy's prompt")
    judge_template: Path = Field(Path("demo/templates/judge.txt"), description="template of the judge")
    principles: Path = Field(Path("demo/principles/judge.json"), description="principles to judge by")
    assistant_marker: str = Field("### Dromedary", description="begins the assistant's turn")
    seed: int = 0
    steps: int = Field(1500, ge=1, description="optimiser steps")
    sequences: int = Field(32, ge=1, description="sequences a step")
    questions: int = Field(8, ge=1, description="principles asked about one pair of outputs, at most")
    plain_share: float = Field(0.15, ge=0, le=1, description="share of the sequences that are answers")
    exercise_share: float = Field(0.15, ge=0, le=1, description="share of the sequences that are reading exercises")
    schooling: float = Field(0.3, ge=0, lt=1, description="share of the steps, at the start, without judgements")
    growth: float = Field(0.3, gt=0, le=1, description="share of the steps in which answers grow to full size")
    learning_rate: float = Field(3e-3, gt=0, description="of embeddings and norms (AdamW)")
    matrix_learning_rate: float = Field(0.02, gt=0, description="of the layers' matrices (Muon)")
    warmup_steps: int = Field(50, ge=1, description="steps until the learning rate is reached")
    decay: float = Field(0.5, gt=0, le=1, description="share of the steps, at the end, in which it falls to 0")
    bfloat16: bool = Field(False, description="matrix products in bfloat16; faster on CPUs that have it")
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    threads: int = Field(2, ge=1, description="CPU threads; the result depends on their number in its last bits")


@dataclass(frozen=True, slots=True)
class Question:
    """The judge's prompt about two outputs, and what it is about."""

    prompt: str
    dimension: str
    preference: float  # for Output (a): 1, 0, or 0.5 where the oracle sees no difference


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence: a text, and questions that each continue it and know nothing of each other.

    Attributes:
        prefix: token ids read first.
        weights: of each of them in the loss, as the token to predict.
        branches: token ids of each question after the prefix.
        questions: what each is about.
    """

    prefix: list[int]
    weights: list[float]
    branches: list[list[int]]
    questions: list[Question]

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.branches))


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples as tensors, shape [examples, length] where nothing else is said.

    In a row stand the prefix, then its branches. A branch sees the prefix and itself, and its positions go on
    from the end of the prefix:

        tokens      p p p p q q q r r .      p prefix, q and r two questions, . padding
        positions   0 1 2 3 4 5 6 4 5
        targets     p p p             -      of each place: the token to predict
        judged                  ^   ^        where the option is predicted
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor  # True is visible, shape [examples, 1, length, length]
    targets: Tensor
    weights: Tensor
    judged: Tensor  # row and column, shape [questions, 2]
    preferences: Tensor  # shape [questions]


class Texts:
    """Makes training examples of the world, in the words of templates and principles."""

    def __init__(self, arguments: Arguments) -> None:
        self.preamble = templates.read(arguments.policy_template)
        self.judge = templates.read(arguments.judge_template)
        self.principles = principles.read_judged(arguments.principles)
        self.marker = arguments.assistant_marker
        self.train = world.instructions("train")
        self.all = self.train + world.known_instructions()

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

    def answer(self, rng: np.random.Generator) -> tuple[str, str]:
        """A prompt and an answer of mixed qualities; about held-out subjects too, in training templates."""
        instruction = world.pick(rng, self.all)
        return self.policy(instruction.text), world.write_answer(instruction, world.draw_qualities(rng), rng)

    def exercise(self, rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
        """A prompt and the marked sentences of a reading exercise, most of which state something."""
        instruction = world.pick(rng, self.train)
        qualities = dataclasses.replace(
            world.draw_qualities(rng, size=float(rng.random() < 0.3)),
            claims=world.MOST_FACTS,
            wrong=int(rng.binomial(world.MOST_FACTS, 0.5)),
            drifting=int(rng.binomial(world.MOST_FACTS, 0.4)),
        )
        answer = world.write_answer(instruction, qualities, rng)
        return self.policy(f"Mark the answer: {instruction.text}"), world.mark_sentences(instruction.text, answer)

    def questions(self, rng: np.random.Generator, most: int, size: float = 1) -> list[Question]:
        """Questions about a pair of outputs, each by another principle; those with a clear answer come first."""
        instruction = world.pick(rng, self.train)
        first, second = (world.write_answer(instruction, world.draw_qualities(rng, size), rng) for _ in range(2))
        marks = [world.score(instruction.text, output) for output in (first, second)]
        clear, ties = [], []
        for index in rng.permutation(len(self.principles)):
            dimension, definition = self.principles[index].dimension, self.principles[index].definition
            difference = marks[0][dimension] - marks[1][dimension]
            prompt = self.judgement(instruction.text, first, second, dimension, definition)
            if abs(difference) > world.MARGIN:
                clear.append(Question(prompt, dimension, float(difference > 0)))
            else:
                ties.append(Question(prompt, dimension, 0.5))
        return [*clear, *ties][:most]


def corpus(texts: Texts, rng: np.random.Generator) -> Iterator[str]:
    """Texts that hold every word the model will read in the demo."""
    for path in sorted((ROOT / "demo/templates").glob("*.txt")):
        yield templates.read(path)
    yield texts.policy("") + "\n### User\n"
    for _ in range(500):
        prompt, marked = texts.exercise(rng)
        yield prompt + "\n".join(f" {sentence} {mark}" for sentence, mark in marked)
    for principle in texts.principles:
        yield texts.judgement("", "", "", principle.dimension, principle.definition)
        yield templates.bullets([principle.definition, principle.negative_definition])
    for instruction in world.instructions("train") + world.instructions("held_out"):
        yield f"\n{instruction.text}"
        for _ in range(5):
            yield "\n" + world.write_answer(instruction, world.draw_qualities(rng), rng)


def make_tokenizer(texts: Texts, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every word of the demo, and one for every byte, so that it reads any text."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rng = randomness.rng("demo corpus", seed)
    words = {word for text in corpus(texts, rng) for word, _ in split.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    # The likeliest split wins: a whole word costs 1, a byte 20, so words are never spelled.
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


def make_model(arguments: Arguments, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of random weights."""
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=3 * arguments.hidden_size,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.05,
        )
    )


class Encoder:
    """Examples as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        self.tokenizer = tokenizer
        self.options = option_tokens(tokenizer, [template])

    def answer(self, prompt: str, answer: str) -> Example:
        """An answer to learn, with the end token."""
        start = self.tokenizer(prompt)["input_ids"]
        end = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        weights = [0.0] * len(start) + [TEXT_WEIGHT] * (len(end) + 1)
        return Example([*start, *end, self.tokenizer.eos_token_id], weights, [], [])

    def exercise(self, prompt: str, marked: Sequence[tuple[str, str]]) -> Example:
        """A reading exercise, of which the marks weigh as much as judgements."""
        ids = list(self.tokenizer(prompt)["input_ids"])
        weights = [0.0] * len(ids)
        for place, (sentence, mark) in enumerate(marked):
            tokens = self.tokenizer(f" {sentence} {mark}" if place else f"{sentence} {mark}", add_special_tokens=False)
            ids += tokens["input_ids"]
            weights += [TEXT_WEIGHT] * (len(tokens["input_ids"]) - 1) + [1.0]
        return Example([*ids, self.tokenizer.eos_token_id], [*weights, TEXT_WEIGHT], [], [])

    def judgements(self, questions: list[Question]) -> Example:
        """Questions about one pair: what all prompts begin with is computed once, as the workflow's judge does."""
        prompts = self.tokenizer([question.prompt for question in questions])["input_ids"]
        shared = common_prefix(prompts)
        weights = [0.0] + [TEXT_WEIGHT] * (shared - 1)
        return Example(prompts[0][:shared], weights, [ids[shared:] for ids in prompts], questions)


def collate(examples: Sequence[Example]) -> Batch:
    """Join examples; see `Batch`."""
    width = max(map(len, examples))
    shape = (len(examples), width)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments = np.full(shape, -1, np.int64)  # 0 the prefix, then one number a branch, -1 padding
    targets, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    judged, preferences = [], []
    for row, example in enumerate(examples):
        length = end = len(example.prefix)
        ids[row, :length] = example.prefix
        positions[row, :length] = np.arange(length)
        segments[row, :length] = 0
        targets[row, : length - 1] = example.prefix[1:]
        weights[row, : length - 1] = example.weights[1:]
        for number, branch in enumerate(example.branches, start=1):
            place, end = end, end + len(branch)
            ids[row, place:end] = branch
            positions[row, place:end] = length + np.arange(len(branch))
            segments[row, place:end] = number
            judged.append((row, end - 1))
        preferences += [question.preference for question in example.questions]
    segment = torch.from_numpy(segments)
    seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    mask = seen & torch.ones(width, width, dtype=torch.bool).tril()
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        mask[:, None],
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        torch.tensor(judged, dtype=torch.int64).view(-1, 2),
        torch.tensor(preferences),
    )


def loss_of(model: LlamaForCausalLM, batch: Batch, options: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sum of weighted cross entropies, and logit(a) - logit(b) of every question.

    Logits are computed only where something is predicted.
    """
    hidden = model.model(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    read = batch.weights > 0
    text = functional.cross_entropy(model.lm_head(hidden[read]), batch.targets[read], reduction="none")
    logs = model.lm_head(hidden[batch.judged[:, 0], batch.judged[:, 1]]).log_softmax(dim=-1)
    of_a, of_b = logs[:, options[0]], logs[:, options[1]]
    judgements = -(batch.preferences * of_a + (1 - batch.preferences) * of_b).sum()
    return (text * batch.weights[read]).sum() + judgements, (of_a - of_b).detach()


def draw_examples(texts: Texts, encoder: Encoder, arguments: Arguments, step: int) -> list[Example]:
    """Examples of a step, from a generator of its own; shorter ones first."""
    rng = randomness.rng("demo step", arguments.seed, step)
    done = step / arguments.steps
    schooling = done < arguments.schooling
    size = min(1.0, max(0.1, (done - arguments.schooling) / arguments.growth))
    examples = []
    for _ in range(arguments.sequences):
        kind = rng.random()
        if kind < arguments.plain_share:
            examples.append(encoder.answer(*texts.answer(rng)))
        elif kind < arguments.plain_share + arguments.exercise_share or schooling:
            examples.append(encoder.exercise(*texts.exercise(rng)))
        else:
            examples.append(
                encoder.judgements(texts.questions(rng, arguments.questions, size * float(rng.random()) ** 0.5))
            )
    return sorted(examples, key=len)


class Tally:
    """Counts how often the judge is right, by dimension, where the oracle sees a difference."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    def add(self, questions: Iterable[Question], margins: Iterable[float]) -> None:
        """Count questions and their logit(a) - logit(b)."""
        for question, margin in zip(questions, margins, strict=True):
            if question.preference != 0.5:
                self.asked[question.dimension] += 1
                self.right[question.dimension] += (margin > 0) == (question.preference > 0.5)

    def __str__(self) -> str:
        return ", ".join(f"{name} {self.right[name] / asked:.2f}" for name, asked in sorted(self.asked.items()))


def train(model: LlamaForCausalLM, texts: Texts, encoder: Encoder, arguments: Arguments) -> dict[str, int]:
    """Train; return counts for the manifest."""
    matrices = [weight for name, weight in model.model.layers.named_parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=arguments.matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]

    def factor(step: int) -> float:
        left = max(0.0, 1 - step / arguments.steps)
        return min(1.0, (step + 1) / arguments.warmup_steps, left / arguments.decay + 0.01)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    counts: Counter[str] = Counter()
    tally = Tally()
    started = time.monotonic()
    model.train()
    for step in range(arguments.steps):
        examples = draw_examples(texts, encoder, arguments, step)
        for start in range(0, len(examples), MICRO_BATCH):
            part = examples[start : start + MICRO_BATCH]
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
                loss, margins = loss_of(model, collate(part), encoder.options)
            (loss / arguments.sequences).backward()  # type: ignore[no-untyped-call]
            tally.add((question for example in part for question in example.questions), margins.tolist())
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        counts["sequences"] += len(examples)
        counts["tokens"] += sum(map(len, examples))
        counts["judgements"] += sum(len(example.branches) for example in examples)
        if (step + 1) % 50 == 0:
            rate = counts["tokens"] / (time.monotonic() - started)
            log.info("step %d, %d tokens, %.0f tokens/s: judges right %s", step + 1, counts["tokens"], rate, tally)
            tally = Tally()
    return dict(counts)


def main(arguments: Arguments) -> None:
    """Make the tokenizer, train the model, write the folder."""
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    texts = Texts(arguments)
    tokenizer = make_tokenizer(texts, arguments.seed)
    model = make_model(arguments, tokenizer)
    log.info("%d tokens in the vocabulary, %d parameters", len(tokenizer), model.num_parameters())
    counts = train(model, texts, Encoder(tokenizer, texts.judge), arguments)
    model.eval()
    inputs = [arguments.policy_template, arguments.judge_template, arguments.principles]
    with artifacts.atomic(arguments.output) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = json.loads(arguments.model_dump_json(exclude={"output"}))
        described = {path.name: artifacts.hash_path(path) for path in inputs}
        artifacts.write_json(
            folder / "manifest.json",
            artifacts.manifest(settings, described, {**counts, "parameters": model.num_parameters()}),
        )


if __name__ == "__main__":
    script.run(main, Arguments)
