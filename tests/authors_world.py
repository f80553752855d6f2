"""Files in the layouts of the authors' release, made of known contents: no line of theirs is in here."""

import json
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
    """A standard PEFT folder as their release has it: a pickle of tensors, in a folder below."""
    inner = folder / nested
    inner.mkdir(parents=True)
    shutil.copy(standard / "adapter_config.json", inner)
    old_config(inner)
    weights = {name: weight for name, weight in load_file(standard / ADAPTER).items() if name != SCORE}
    torch.save(weights, inner / "adapter_model.bin")
    (folder / "README.md").write_text("A model card.\n")
    return folder


def publish_reward_model(standard: Path, folder: Path, bias: float = 1.5) -> Path:
    """A standard reward model as their release has it, its head in a pickle of its own."""
    publish_adapter(standard, folder)
    head = load_file(standard / ADAPTER)[SCORE]
    torch.save({"weight": head, "bias": torch.tensor([bias])}, folder / "adapter_model" / "reward_head")
    return folder
