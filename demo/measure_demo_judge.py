"""Measure a judge against the oracles of `world.py`, on held-out instructions about held-out subjects.

Pairs are measured as the workflow judges them: in both orders, by the workflow's own judge. Two kinds are: pairs
sampled from the model itself, as the workflow samples them, and pairs written by the world's generator.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow_scripts")]

from demo import world  # noqa: E402

from salmon import artifacts, generation, models, principles, randomness, script, templates  # noqa: E402
from salmon.config import Model, PolicyPrompt  # noqa: E402
from salmon.judging import Judge, Pair  # noqa: E402

log = logging.getLogger("salmon.measure_demo_judge")

BATCH = 64


class Arguments(script.Arguments):
    """Measure a judge against the oracles."""

    model: str = Field(str(ROOT / "demo/model"), description="folder of the judge")
    output: Path = Field(description="measurements (JSON)")
    judge_template: Path = Field(ROOT / "demo/templates/judge.txt", description="template of the judge")
    principles: Path = Field(ROOT / "demo/principles/judge.json", description="principles to judge by")
    policy_prompt: PolicyPrompt = PolicyPrompt(template=str(ROOT / "demo/templates/policy.txt"))
    max_length: int = Field(512, description="tokens of the judge's prompt")
    max_new_tokens: int = Field(128, description="tokens sampled at most")
    temperature: float = 1.0
    pairs: int = Field(300, ge=1, description="pairs of each kind")
    split: world.Split = Field("held_out", description="instructions and subjects of which split")
    seed: int = 0
    threads: int = 2


def asked(count: int, split: world.Split, seed: int) -> list[world.Instruction]:
    """Instructions of a split, in random order, each about as often."""
    found = world.instructions(split)
    rng = randomness.rng("demo measurement", seed)
    return [found[index] for _ in range(-(-count // len(found))) for index in rng.permutation(len(found))][:count]


def accuracy(
    instructions: Sequence[world.Instruction],
    pairs: Sequence[Pair],
    judgements: Sequence[Sequence[tuple[float, float]] | None],
    dimensions: Sequence[str],
) -> dict[str, dict[str, float]]:
    """For each dimension: how often the oracle sees a difference, then both orders agree, then the judge is right."""
    found: dict[str, dict[str, float]] = {}
    for place, dimension in enumerate(dimensions):
        oracle = world.ORACLES[dimension]
        differing, agreeing, right = 0, 0, 0
        for instruction, pair, judged in zip(instructions, pairs, judgements, strict=True):
            difference = oracle(instruction.text, pair.output_1) - oracle(instruction.text, pair.output_2)
            if judged is None or abs(difference) <= world.MARGIN:
                continue
            s12, s21 = judged[place]
            differing += 1
            agreeing += s12 * s21 > 0
            right += s12 * s21 > 0 and (s12 > 0) == (difference > 0)
        found[dimension] = {
            "differing_pairs": differing,
            "orders_agree": agreeing / max(1, differing),
            "right": right / max(1, agreeing),
        }
    return found


def sample_pairs(
    arguments: Arguments, model: torch.nn.Module, tokenizer: Any, instructions: Sequence[world.Instruction]
) -> list[Pair]:
    """Two answers of the model for every instruction."""
    preamble = generation.read_preamble(arguments.policy_prompt)
    prompts = [
        generation.encode_prompt(tokenizer, instruction.text, arguments.policy_prompt, preamble)
        for instruction in instructions
    ]
    answers: list[list[str]] = []
    for number in range(2):
        seeds = [randomness.seed_of("demo measurement", arguments.seed, number, row) for row in range(len(prompts))]
        sampled = generation.generate(
            model,
            tokenizer,
            prompts,
            seeds,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            stop=arguments.policy_prompt.stop,
            device="cpu",
        )
        answers.append([one.text for one in sampled])
        ended = np.mean([one.finish_reason != "length" for one in sampled])
        log.info("sampled %d answers, %.0f %% of them ended by themselves", len(sampled), 100 * ended)
    return [
        Pair(str(row), instruction.text, *outputs)
        for row, (instruction, *outputs) in enumerate(zip(instructions, *answers, strict=True))
    ]


def write_pairs(instructions: Sequence[world.Instruction], seed: int) -> list[Pair]:
    """Two answers of the generator for every instruction."""
    rng = randomness.rng("demo measurement", seed, "generator")
    return [
        Pair(
            str(row),
            instruction.text,
            *(world.write_answer(instruction, world.draw_qualities(rng), rng) for _ in range(2)),
        )
        for row, instruction in enumerate(instructions)
    ]


def spread(instructions: Sequence[world.Instruction], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Mean and standard deviation of every oracle, and deciles of the number of words."""
    answers = [
        (instruction.text, output)
        for instruction, pair in zip(instructions, pairs, strict=True)
        for output in (pair.output_1, pair.output_2)
    ]
    marks: npt.NDArray[np.float64] = np.array([list(world.score(*answer).values()) for answer in answers])
    words = [len(output.split()) for _, output in answers]
    return {
        "oracles": {
            dimension: {"mean": float(mean), "deviation": float(deviation)}
            for dimension, mean, deviation in zip(world.ORACLES, marks.mean(axis=0), marks.std(axis=0), strict=True)
        },
        "words_deciles": np.percentile(words, range(0, 101, 10)).tolist(),
    }


def main(arguments: Arguments) -> None:
    """Sample, judge, compare, write."""
    torch.set_num_threads(arguments.threads)
    settings = Model(base=arguments.model, quantization="none", dtype="float32")
    tokenizer = models.load_tokenizer(settings)
    model = models.load_initial_policy(settings, "cpu")
    judge = Judge(
        model,
        tokenizer,
        template=templates.read(arguments.judge_template),
        principles=principles.read_judged(arguments.principles),
        max_length=arguments.max_length,
        device="cpu",
    )
    dimensions = [principle.dimension for principle in judge.principles]
    instructions = asked(arguments.pairs, arguments.split, arguments.seed)
    results: dict[str, Any] = {}
    for kind, pairs in (
        ("sampled", sample_pairs(arguments, model, tokenizer, instructions)),
        ("generated", write_pairs(instructions, arguments.seed)),
    ):
        judgements = [
            judged for start in range(0, len(pairs), BATCH) for judged in judge.judge(pairs[start : start + BATCH])
        ]
        found = accuracy(instructions, pairs, judgements, dimensions)
        rights = [numbers["right"] for numbers in found.values()]
        results[kind] = {
            "mean_right": float(np.mean(rights)),
            "worst_right": min(rights),
            "dimensions": found,
            **spread(instructions, pairs),
        }
        log.info("%s: mean right %.3f, worst %.3f", kind, results[kind]["mean_right"], results[kind]["worst_right"])
        for dimension, numbers in found.items():
            log.info(
                "%-26s pairs %3d, orders agree %.2f, right %.2f; oracle %.2f +- %.2f",
                dimension,
                *numbers.values(),
                *results[kind]["oracles"][dimension].values(),
            )
        log.info("words, deciles: %s", results[kind]["words_deciles"])
    artifacts.write_json(
        arguments.output, {"settings": json.loads(arguments.model_dump_json(exclude={"output"})), **results}
    )


if __name__ == "__main__":
    script.run(main, Arguments)
