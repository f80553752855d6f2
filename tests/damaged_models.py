"""Small models and adapters with changed files, which no longer match their configuration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from salmon.config import Model

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
SCORE = "base_model.model.score.weight"


def settings(folder: Path, **more: Any) -> Model:
    return Model(base=str(folder), quantization="none", dtype="float32", **more)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file, {"format": "pt"})


def without(ending: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if not key.endswith(ending)}


def damage(folder: Path, how: str) -> None:
    """Make the files of a model folder contradict its configuration."""
    if how == "no output layer":
        rewrite(folder / WEIGHTS, without("lm_head.weight"))
    elif how == "no layer":
        rewrite(folder / WEIGHTS, lambda w: {key: value for key, value in w.items() if ".layers.1." not in key})
    elif how == "a layer more":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    elif how == "a layer fewer":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    elif how == "another shape":
        rewrite(folder / WEIGHTS, lambda w: w | {"model.norm.weight": torch.ones(7)})
    elif how == "cut off":
        whole = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    elif how == "pickle":
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()


def make_adapter(base: Path, folder: Path, **more: Any) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **more),
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.3)
    model.save_pretrained(str(folder))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits


def change_json(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def randomised(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.3)
    return model
