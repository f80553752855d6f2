"""Train the demo's initial policy: a small Llama that answers in the world of `world.py` and can judge.

A 70-billion-parameter model can judge because it has read everything. A small one learns it from its training text, the
answers and judgements of `lessons.py`. From judgements alone it would learn to read very slowly: what a sentence
states, whether that is right and on the subject, what an answer as a whole is like. Therefore heads below the last
layers learn to predict exactly this; they are discarded at the end.
"""

import json
import logging
import math
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow_scripts")]

from demo import lessons, oracles  # noqa: E402
from salmon import artifacts, randomness, script  # noqa: E402

log = logging.getLogger("salmon.train_demo_policy")

READING_WEIGHT = 0.5  # of the heads' losses on sentences and answers; a judgement or a statement has weight 1
MICRO_BATCH = 16  # sequences


class Arguments(script.Arguments):
    """Train the demo's initial policy."""

    output: Path = Field(description="model folder to write: an ordinary transformers folder")
    policy_template: Path = Field(Path("demo/templates/policy.txt"), description="preamble of the policy's prompt")
    judge_template: Path = Field(Path("demo/templates/judge.txt"), description="template of the judge")
    review_templates: script.JsonList[Path] = Field(
        [Path("demo/templates/reward_model.txt"), Path("demo/templates/reward_model_rl.txt")],
        description="templates of the reward model",
    )
    principles: Path = Field(Path("demo/principles/judge.json"), description="principles to judge by")
    assistant_marker: str = Field("### Dromedary", description="text that begins the assistant's turn")
    seed: int = Field(0, description="seed of tokenizer, weights and examples")
    steps: int = Field(1500, ge=1, description="optimiser steps")
    sequences: int = Field(16, ge=1, description="sequences per step")
    questions: int = Field(8, ge=1, description="maximum number of principles asked about one pair of outputs")
    plain_share: float = Field(0.25, ge=0, le=1, description="share of the sequences that are answers")
    review_share: float = Field(0.35, ge=0, le=1, description="share of the sequences that are reviews of answers")
    growth: float = Field(0.3, gt=0, le=1, description="share of the steps in which answers grow to full size")
    learning_rate: float = Field(3e-3, gt=0, description="learning rate of embeddings and norms (AdamW)")
    matrix_learning_rate: float = Field(0.02, gt=0, description="learning rate of the layers' matrices (Muon)")
    warmup_steps: int = Field(50, ge=1, description="steps until the learning rate is reached")
    decay: float = Field(0.5, gt=0, le=1, description="share of the steps, at the end, in which the rate falls to 0")
    bfloat16: bool = Field(True, description="matrix products in bfloat16; slow on CPUs without support for it")
    hidden_size: int = Field(128, ge=1, description="width of the layers")
    layers: int = Field(6, ge=5, description="number of layers; the reading heads need four below the last")
    heads: int = Field(4, ge=1, description="attention heads per layer")
    threads: int = Field(2, ge=1, description="CPU threads; their number changes the last bits of the result")


def make_model(arguments: Arguments, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            intermediate_size=3 * arguments.hidden_size,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.heads,
            max_position_embeddings=lessons.CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.05,
        )
    )


class Reader(nn.Module):
    """Reading heads: groups and marks at the ends of sentences, scores after answers, and truths of statements.

    Each reads one layer above the previous one, whose result it may need: a sentence is right if the groups of its
    subject and its fact are equal, an answer is as honest as its sentences are right, and the scores determine how true
    a statement about the answer is. The last layer is left for judging.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {
            "groups": 3 * len(lessons.GROUPS),
            "marks": len(lessons.MARKS),
            "scores": len(oracles.ORACLES),
            "truths": 2,
        }
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.RMSNorm(width), nn.Linear(width, size)) for name, size in sizes.items()}
        )

    def forward(self, batch: lessons.Batch, states: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and findings.

        Args:
            batch: the batch, with the heads' labels.
            states: outputs of the embedding and each layer, of shape [examples, length, width].

        Returns:
            The weighted sum of all cross entropies; and the findings of each head, of shape [places, kinds]: for groups
            and marks whether they are right, for scores and truths the absolute error; nan if a kind does not apply.
        """
        (sentence_rows, sentence_ends), (answer_rows, answer_ends) = batch.sentence_ends.T, batch.answer_ends.T
        groups = self.heads["groups"](states[-5][sentence_rows, sentence_ends]).unflatten(1, (3, -1))
        marks = self.heads["marks"](states[-4][sentence_rows, sentence_ends])
        scores = self.heads["scores"](states[-3][answer_rows, answer_ends])
        truths = self.heads["truths"](states[-2][batch.statement_ends[:, 0], batch.statement_ends[:, 1]])
        applies, there = ~batch.marks.isnan(), ~batch.truths.isnan()
        reading = (
            functional.cross_entropy(groups.transpose(1, 2), batch.groups, ignore_index=-1, reduction="sum")
            + functional.binary_cross_entropy_with_logits(marks[applies], batch.marks[applies], reduction="sum")
            + functional.binary_cross_entropy_with_logits(scores, batch.scores, reduction="sum")
        )
        loss = READING_WEIGHT * reading
        loss += functional.binary_cross_entropy_with_logits(truths[there], batch.truths[there], reduction="sum")
        nan = torch.tensor(torch.nan, device=marks.device)
        findings = {
            "groups": torch.where(batch.groups >= 0, (groups.argmax(dim=-1) == batch.groups).float(), nan),
            "marks": torch.where(applies, ((marks > 0) == (batch.marks > 0.5)).float(), nan),
            "scores": (scores.sigmoid() - batch.scores).abs().detach(),
            "truths": (truths.sigmoid() - batch.truths).abs().detach(),
        }
        return loss, findings


def loss_of(model: LlamaForCausalLM, reader: Reader, batch: lessons.Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of weighted cross entropies; every question's first logit minus its second; the reader's findings.

    Logits are computed only at predicted positions.
    """
    states = model.model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=batch.mask,
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    hidden = states[-1]
    read = batch.weights > 0
    text = functional.cross_entropy(model.lm_head(hidden[read]), batch.targets[read], reduction="none")
    reading, findings = reader(batch, states)
    logs = model.lm_head(hidden[*batch.judged.T]).log_softmax(dim=-1)
    first, second = logs.gather(1, batch.options).T
    answers = -(batch.probabilities * first + (1 - batch.probabilities) * second).sum()
    loss = (text * batch.weights[read]).sum() + reading + answers
    return loss, (first - second).detach(), findings


def draw_examples(
    texts: lessons.Texts, encoder: lessons.Encoder, arguments: Arguments, step: int
) -> list[lessons.Example]:
    """Examples of a step, from the step's own generator; shorter ones first."""
    rng = randomness.rng("demo step", arguments.seed, step)
    size = min(1.0, max(0.1, step / arguments.steps / arguments.growth))
    examples = []
    for _ in range(arguments.sequences):
        kind = rng.random()
        if kind < arguments.plain_share:
            examples.append(encoder.answer(texts.answer(rng)))
        elif kind < arguments.plain_share + arguments.review_share:
            about = texts.answer(rng)
            examples.append(encoder.reviews(about, texts.reviews(about, rng)))
        else:
            pair = texts.pair(rng, size * float(rng.random()) ** 0.5)
            examples.append(encoder.judgements(pair, texts.questions(pair, rng, arguments.questions)))
    return sorted(examples, key=len)


class Tally:
    """Means of findings, by name."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()

    def add(self, name: str, value: float) -> None:
        """Count a value; nan does not count."""
        if not math.isnan(value):
            self.sums[name] += value
            self.counts[name] += 1

    def add_questions(self, questions: list[lessons.Question], margins: Tensor) -> None:
        """Count whether the model prefers the likelier token, if one is likelier according to the oracle."""
        for question, margin in zip(questions, margins.tolist(), strict=True):
            if question.probability != 0.5:
                self.add(question.name, float((margin > 0) == (question.probability > 0.5)))

    def add_reading(self, findings: dict[str, Tensor]) -> None:
        """Count the reader's findings."""
        names = {
            "groups": ("group asked", "group named", "group of the fact"),
            "marks": lessons.MARKS,
            "scores": [f"error, {dimension}" for dimension in oracles.ORACLES],
            "truths": ("error, statements on the first answer", "error, statements on the second answer"),
        }
        for kind, values in findings.items():
            for name, column in zip(names[kind], values.T.tolist(), strict=True):
                for value in column:
                    self.add(f"({name})", value)

    def __str__(self) -> str:
        return ", ".join(f"{name} {self.sums[name] / count:.2f}" for name, count in sorted(self.counts.items()))


def train(
    model: LlamaForCausalLM, texts: lessons.Texts, encoder: lessons.Encoder, arguments: Arguments
) -> dict[str, int]:
    """Train; return counts for the manifest."""
    matrices = [weight for name, weight in model.model.layers.named_parameters() if weight.ndim == 2]
    reader = Reader(model.config.hidden_size).to(model.device)
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    others += reader.parameters()
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
            batch = lessons.collate(part).to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=arguments.bfloat16):
                loss, margins, findings = loss_of(model, reader, batch)
            (loss / arguments.sequences).backward()  # type: ignore[no-untyped-call]
            tally.add_questions([question for example in part for question in example.questions], margins)
            tally.add_reading(findings)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        counts["sequences"] += len(examples)
        counts["tokens"] += sum(map(len, examples))
        counts["questions"] += sum(len(example.branches) for example in examples)
        if (step + 1) % 50 == 0:
            rate = counts["tokens"] / (time.monotonic() - started)
            log.info("step %d, %d tokens, %.0f tokens/s: right %s", step + 1, counts["tokens"], rate, tally)
            tally = Tally()
    return dict(counts)


def main(arguments: Arguments) -> None:
    """Make the tokenizer, train the model, write the folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(device.type == "cpu")
    texts = lessons.Texts(
        arguments.policy_template,
        arguments.judge_template,
        arguments.review_templates,
        arguments.principles,
        arguments.assistant_marker,
    )
    tokenizer = lessons.make_tokenizer(texts, arguments.seed)
    model = make_model(arguments, tokenizer).to(device)
    log.info("%d tokens in the vocabulary, %d parameters", len(tokenizer), model.num_parameters())
    counts = train(model, texts, lessons.Encoder(tokenizer, texts), arguments)
    model.eval()
    inputs = [arguments.policy_template, arguments.judge_template, *arguments.review_templates, arguments.principles]
    with artifacts.atomic(arguments.output) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = json.loads(arguments.model_dump_json(exclude={"output"}))
        artifacts.write_json(
            folder / "manifest.json",
            artifacts.manifest(
                settings, artifacts.hash_inputs(inputs), {**counts, "parameters": model.num_parameters()}
            ),
        )


if __name__ == "__main__":
    script.run(main, Arguments)
