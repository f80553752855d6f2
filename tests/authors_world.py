"""Files in the layouts of the authors' release, with known contents; nothing is copied from it."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.damaged_models import ADAPTER, SCORE


def old_config(folder: Path, **changes: Any) -> None:
    """An adapter_config.json as PEFT wrote it in 2023, with the target layers as names."""
    new = json.loads((folder / "adapter_config.json").read_text())
    kept = {key: new[key] for key in ("r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "peft_type")}
    old = {
        **kept,
        "auto_mapping": None,
        "base_model_name_or_path": "/somewhere/llama-2",
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "revision": None,
        "target_modules": sorted({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        "task_type": "CAUSAL_LM",
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(old))


def publish_adapter(standard: Path, folder: Path, nested: str = "adapter_model/lora_default") -> Path:
    """A standard PEFT folder as in their release: a pickle of tensors, in a subfolder."""
    inner = folder / nested
    inner.mkdir(parents=True)
    shutil.copy(standard / "adapter_config.json", inner)
    old_config(inner)
    weights = {name: weight for name, weight in load_file(standard / ADAPTER).items() if name != SCORE}
    torch.save(weights, inner / "adapter_model.bin")
    (folder / "README.md").write_text("A model card.\n")
    return folder


def publish_reward_model(standard: Path, folder: Path, bias: float = 1.5) -> Path:
    """A standard reward model as in their release, with its head in a separate pickle."""
    publish_adapter(standard, folder)
    head = load_file(standard / ADAPTER)[SCORE]
    torch.save({"weight": head, "bias": torch.tensor([bias])}, folder / "adapter_model" / "reward_head")
    return folder


# ---- Tables

DIMENSIONS = ("Concise", "Ethical", "Creative")


def write_lines(path: Path, rows: list[Any]) -> Path:
    """JSON lines, as in their files that end with `.json`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def score_of(instruction: str, dimension: str) -> tuple[float, float]:
    """Made-up s12 and s21 of a pair, which identify its judgement."""
    drawn = random.Random(f"{instruction}|{dimension}")
    return drawn.uniform(-3, 3), drawn.uniform(-3, 3)


def prompts(number: int) -> list[tuple[str, str]]:
    """Unsorted instructions and inputs; some have an input, or white space around them."""
    found = [(f"Question {at * 7 % number} of {number}?", "a, b" if at % 5 == 0 else "") for at in range(number)]
    return [
        (f" {instruction}\n" if at % 4 == 1 else instruction, extra) for at, (instruction, extra) in enumerate(found)
    ]


def publish_responses(folder: Path, asked: list[tuple[str, str]]) -> list[Path]:
    """Two response files of the same prompts; every sixth response of the second is too short to be judged."""
    return [
        write_lines(
            folder / f"oasst1_response{index}.json",
            [
                {
                    "instruction": instruction,
                    "input": extra,
                    "output": {
                        "generation": "short"
                        if index and at % 6 == 0
                        else f"response {index} to {instruction.strip()}\n\n### Details\nA list.\n\n### User\nmore"
                    },
                }
                for at, (instruction, extra) in enumerate(asked)
            ],
        )
        for index in (0, 1)
    ]


def publish_preferences(folder: Path, files: list[Path], drop: int = 0) -> Path:
    """Judgements of the pairs in the release's order, without the last `drop`, as its last batch is missing."""
    first, second = (
        sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["instruction"]) for file in files
    )
    pairs = [
        one["instruction"]
        for one, other in zip(first, second, strict=True)
        if min(len(row["output"]["generation"]) for row in (one, other)) >= 16
    ]
    random.Random(42).shuffle(pairs)
    rows = []
    for number, instruction in enumerate(pairs):
        for dimension in DIMENSIONS:
            s12, s21 = score_of(instruction.strip(), dimension)
            verdict = 1 if min(s12, s21) > 0 else 2 if max(s12, s21) < 0 else 0
            rows.append({"example_idx": number, "dimension": dimension, "preference": 0})
            rows[-1] |= {"prompt_preference": verdict, "relative_score": [s12, s21]}
    return write_lines(folder / "oasst1_preferences.json", rows[: len(rows) - drop])


def publish_records(folder: Path, asked: list[tuple[str, str]], numpy: bool = False) -> Path:
    """Records of the reward model; tuples are text, their numbers as numpy 1 or 2 writes them."""

    def text(values: list[Any], kind: str) -> str:
        return str(tuple(values)) if not numpy else f"({', '.join(f'np.{kind}({value})' for value in values)},)"

    rows = []
    for number in range(2):
        for at, (instruction, extra) in enumerate(asked):
            shown = list(DIMENSIONS[: 1 + at % 3])
            rule = at % 4 == 3
            rows.append(
                {
                    "doinate_dimension_idx": at % 3 if at % 3 < len(shown) else 0,
                    "dimensions": str(tuple(shown)),
                    "dimension_scores": text([round(0.5 - each, 2) for each in range(len(shown))], "float64"),
                    "negative_definitions": text([(at + each) % 2 for each in range(len(shown))], "int64"),
                    "instruction": instruction,
                    "input": extra,
                    "output_1": f"one {number}",
                    "output_2": f"two {number}",
                    "preference": 1 + at % 2,
                    "flip": at % 3 == 0,
                    "lang": ["en", "en", "de" if at % 8 == 3 else "en"],
                    "rule_flag": rule,
                }
            )
    file = folder / "salmon_rm_data.json"
    file.write_text(json.dumps(rows, indent=4))
    return file


def write_principles(path: Path) -> Path:
    """The principles of `DIMENSIONS`, in another order."""
    rows = [
        {"dimension": name, "definition": f"It is {name}.", "negative_definition": f"It is not {name}."}
        for name in reversed(DIMENSIONS)
    ]
    path.write_text(json.dumps(rows))
    return path
