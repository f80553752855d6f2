"""Write synthetic stand-ins of the public data sets, in their upstream schemas, about the world of `world.py`.

All instructions are training instructions. Those of the measurements are in `held_out.jsonl`, for people to read.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import Field

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow_scripts")]

from demo import oracles, world  # noqa: E402
from salmon import artifacts, randomness, script  # noqa: E402

log = logging.getLogger("salmon.make_demo_data")

Rows = list[dict[str, Any]]


class Arguments(script.Arguments):
    """Write synthetic stand-ins of the public data sets."""

    output: Path = Field(description="folder to write")
    seed: int = 0
    oasst1: int = Field(300, ge=1, description="root prompts; the other sets of instructions do not share them")
    sharegpt: int = Field(60, ge=1, description="conversations")
    sharegpt_90k: int = Field(40, ge=1, description="conversations")
    dolly: int = Field(100, ge=1, description="instructions")
    openorca: int = Field(40, ge=1, description="questions of each of the four families")
    math: int = Field(50, ge=1, description="problems: sums")
    shp: int = Field(400, ge=1, description="preferences")
    hh_rlhf: int = Field(400, ge=1, description="preferences")


def write_answer(instruction: world.Instruction, rng: np.random.Generator) -> str:
    """An answer of mixed qualities."""
    return world.write_answer(instruction, world.draw_qualities(rng), rng)


def ranked_answers(instruction: world.Instruction, rng: np.random.Generator) -> tuple[str, str, float]:
    """Two answers, the generically better one first, and the difference."""
    while True:
        answers = [write_answer(instruction, rng) for _ in range(2)]
        marks = [oracles.generic_quality(instruction.text, answer) for answer in answers]
        if marks[0] != marks[1]:
            better = int(marks[1] > marks[0])
            return answers[better], answers[1 - better], abs(marks[0] - marks[1])


def oasst1(asked: Sequence[world.Instruction], rng: np.random.Generator) -> Rows:
    """Message trees of a root prompt and one reply."""
    rows: Rows = []
    for number, instruction in enumerate(asked):
        tree = f"synthetic-{number:05d}"
        common = {"lang": "en", "message_tree_id": tree, "deleted": False, "synthetic": True}
        rows += [
            {"message_id": tree, "parent_id": None, "role": "prompter", "text": instruction.text, **common},
            {
                "message_id": f"{tree}-1",
                "parent_id": tree,
                "role": "assistant",
                "text": write_answer(instruction, rng),
                **common,
            },
        ]
    return rows


def shp(asked: Sequence[world.Instruction], rng: np.random.Generator) -> Rows:
    """Posts with two comments; the better comment has the higher score."""
    rows = []
    for number, instruction in enumerate(asked):
        better, worse, difference = ranked_answers(instruction, rng)
        scores = [2 + int(100 * difference), 2]
        label = int(rng.integers(2))
        first, second = (better, worse) if label else (worse, better)
        score_a, score_b = scores if label else scores[::-1]
        rows.append(
            {
                "post_id": f"synthetic{number:05d}",
                "domain": "demo_train",
                "upvote_ratio": 0.9,
                "history": instruction.text,
                "c_root_id_A": f"a{number:05d}",
                "c_root_id_B": f"b{number:05d}",
                "created_at_utc_A": 1_600_000_000 + number,
                "created_at_utc_B": 1_600_000_100 + number,
                "score_A": score_a,
                "score_B": score_b,
                "human_ref_A": first,
                "human_ref_B": second,
                "labels": label,
                "seconds_difference": 100.0,
                "score_ratio": scores[0] / scores[1],
            }
        )
    return rows


def hh_rlhf(asked: Sequence[world.Instruction], rng: np.random.Generator) -> Rows:
    """Dialogues of one turn that differ in the assistant's answer."""
    rows = []
    for instruction in asked:
        better, worse, _ = ranked_answers(instruction, rng)
        start = f"\n\nHuman: {instruction.text}\n\nAssistant: "
        rows.append({"chosen": start + better, "rejected": start + worse})
    return rows


def sharegpt(asked: Sequence[world.Instruction], rng: np.random.Generator) -> Rows:
    """Conversations that begin with a human turn."""
    return [
        {
            "id": f"synthetic{number:05d}",
            "conversations": [
                {"from": "human", "value": instruction.text},
                {"from": "gpt", "value": write_answer(instruction, rng)},
            ],
        }
        for number, instruction in enumerate(asked)
    ]


def dolly(asked: Sequence[world.Instruction], rng: np.random.Generator) -> Rows:
    """Instructions in the categories that need no context."""
    categories = ("open_qa", "general_qa", "brainstorming", "creative_writing", "classification")
    return [
        {
            "instruction": instruction.text,
            "context": "",
            "response": write_answer(instruction, rng),
            "category": categories[number % len(categories)],
        }
        for number, instruction in enumerate(asked)
    ]


def openorca(asked: Sequence[world.Instruction], rng: np.random.Generator) -> Rows:
    """Questions of the four families in turn."""
    families = ("niv", "flan", "t0", "cot")
    return [
        {
            "id": f"{families[number % len(families)]}.{number}",
            "system_prompt": "",
            "question": instruction.text,
            "response": write_answer(instruction, rng),
        }
        for number, instruction in enumerate(asked)
    ]


def math(asked: Sequence[world.Instruction], rng: np.random.Generator) -> Rows:
    """Problems: sums."""
    return [
        {
            "problem": instruction.text,
            "level": "Level 1",
            "type": "Prealgebra",
            "solution": write_answer(instruction, rng),
        }
        for instruction in asked
    ]


def held_out() -> Rows:
    """Held-out instructions, as prompts in the authors' format."""
    return [
        {"instruction": instruction.text, "input": "", "output": "", "question_type": 0, "length_bonus": 1.0}
        for instruction in world.instructions("held_out")
    ]


def make_data(arguments: Arguments) -> dict[str, Rows]:
    """All data sets: file name -> rows. Each has its own random generator."""
    rows: dict[str, Rows] = {"held_out.jsonl": held_out()}
    rng = randomness.rng("demo data", arguments.seed)
    everything = world.instructions("train")
    shuffled = [everything[index] for index in rng.permutation(len(everything))]
    sums = [instruction for instruction in shuffled if instruction.kind == "sum"]
    others = [instruction for instruction in shuffled if instruction.kind != "sum"]
    # Sums that are not MATH problems also occur in other data sets.
    rest = iter(_merge(others, sums[arguments.math :], rng))
    prompts: list[tuple[str, int, Callable[[Sequence[world.Instruction], np.random.Generator], Rows]]] = [
        ("oasst1.jsonl", arguments.oasst1, oasst1),
        ("sharegpt.json", arguments.sharegpt, sharegpt),
        ("sharegpt_90k.json", arguments.sharegpt_90k, sharegpt),
        ("dolly.jsonl", arguments.dolly, dolly),
        ("openorca.parquet", 4 * arguments.openorca, openorca),
    ]
    for name, count, make in prompts:
        asked = [instruction for _, instruction in zip(range(count), rest, strict=False)]
        rows[name] = make(asked, randomness.rng("demo data", arguments.seed, name))
    rows["math.jsonl"] = math(sums[: arguments.math], randomness.rng("demo data", arguments.seed, "math.jsonl"))
    for name, count, make in (("shp.jsonl", arguments.shp, shp), ("hh_rlhf.jsonl", arguments.hh_rlhf, hh_rlhf)):
        own = randomness.rng("demo data", arguments.seed, name)
        rows[name] = make([world.pick(own, everything) for _ in range(count)], own)
    return rows


def _merge(
    first: Sequence[world.Instruction], second: Sequence[world.Instruction], rng: np.random.Generator
) -> list[world.Instruction]:
    """Both lists together, in random order."""
    joined = [*first, *second]
    return [joined[index] for index in rng.permutation(len(joined))]


def write_rows(rows: Rows, path: Path) -> None:
    """Write a file in the format of its ending."""
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path, compression="zstd")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    else:
        path.write_text(_lines(rows), encoding="utf-8")


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def main(arguments: Arguments) -> None:
    """Make the rows, write the folder."""
    data = make_data(arguments)
    with artifacts.atomic(arguments.output) as folder:
        folder.mkdir()
        for name, rows in data.items():
            write_rows(rows, folder / name)
        settings = json.loads(arguments.model_dump_json(exclude={"output"}))
        counts = {name: len(rows) for name, rows in data.items()}
        artifacts.write_json(folder / "manifest.json", artifacts.manifest(settings, {}, counts))
    log.info("%s", ", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    script.run(main, Arguments)
