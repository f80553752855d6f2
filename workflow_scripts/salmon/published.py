"""Converts finished reward models, such as the authors' published one, to the standard folder that RL reads.

The authors' release saves a reward model as a PEFT adapter of a causal language model and, in a folder above it, the
head as a pickle of `weight` [1, hidden] and `bias` [1]:

    adapter_model/reward_head
    adapter_model/lora_default/adapter_config.json, adapter_model.bin

In the standard folder the head is among the adapter's weights, as PEFT saves a sequence classifier. It has no bias: a
bias adds the same to every reward, so it cancels in a difference of two and does not affect whitened advantages.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from salmon.adapters import HEAD, fetch, fit_to, read_adapter, some, unpickling_advice
from salmon.border import reading
from salmon.config import Model
from salmon.errors import UserError
from salmon.identity import REWARD_HEAD, adapter_folder, nearest_head, refuse_pointers
from salmon.models import head_width, load_outline

HEAD_KEY = f"base_model.model.{HEAD}"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read_reward_model(
    name: str, revision: str | None, model: Model
) -> tuple[LoraConfig, dict[str, torch.Tensor], dict[str, int]]:
    """A reward model in either layout, all of whose weights fit the base model.

    Args:
        name: hub id or local folder; the adapter may be in a folder below it.
        revision: revision on the hub.
        model: the base model.

    Returns:
        Configuration and weights of the standard folder, the head float32 [1, hidden]; and numbers for the manifest.

    Raises:
        UserError: if adapter or head is missing, cannot be read without running code, or does not fit.
    """
    key = f"reward_model.path {name}"
    with reading(key, "it must be a hub id, or a folder with a reward model"):
        root = fetch(name, revision)
        folder = adapter_folder(root)
    config, weights = read_adapter(str(folder), name)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{key} is an adapter of the type {config.peft_type}, but only LoRA is supported")
    heads = [name for name in weights if name.endswith(HEAD)]
    head = weights.pop(heads[0]) if len(heads) == 1 else _read_head(root, folder, key)
    wrong = {str(weight.dtype) for weight in (*weights.values(), head) if weight.dtype not in FLOATS}
    if wrong:
        raise UserError(f"{key} has weights of the type {', '.join(sorted(wrong))}; save it in float32 or 16 bits")
    if head.dim() != 2 or head.shape[0] != 1:
        raise UserError(f"the head of {key} has the shape {tuple(head.shape)}, not (1, hidden size) for one output")
    _check_fit(config, weights, head, model, key)
    if broken := [name for name, weight in {**weights, HEAD: head}.items() if not weight.isfinite().all()]:
        raise UserError(
            f"{len(broken)} weights of {key} are not finite ({some(broken)}): its training has diverged, or its files "
            "are damaged; use another checkpoint, or copy it again"
        )
    config.base_model_name_or_path, config.revision = model.base, model.revision
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], True
    counts = {"weights": len(weights), "parameters": sum(weight.numel() for weight in weights.values())}
    return config, {**weights, HEAD_KEY: head.float()}, counts


def save_reward_model(config: LoraConfig, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the standard folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(folder))


def _read_head(root: Path, adapter: Path, key: str) -> torch.Tensor:
    """The head, which the authors' release has in a separate file: next to or above the adapter, or the only one below.

    Returns:
        Its weight. The bias is checked and left out.
    """
    near = nearest_head(root, adapter)
    found = [near] if near else sorted(root.rglob(REWARD_HEAD))
    if len(found) > 1:
        raise UserError(
            f"{key} holds {len(found)} heads, but none next to its adapter in {adapter} or above it: "
            f"{', '.join(map(str, found))}; copy the adapter's head next to the adapter"
        )
    if not found:
        raise UserError(
            f"{key} is not a reward model: the adapter in {adapter} has no head ({HEAD}), and there is no file "
            f"{REWARD_HEAD}, as in the authors' release, in that folder or above it; copy the whole folder"
        )
    refuse_pointers(found[0].parent)
    with reading(found[0], unpickling_advice):
        head = torch.load(found[0], map_location="cpu", weights_only=True)
    parts = head if isinstance(head, dict) else {}
    shapes = {name: tuple(part.shape) if torch.is_tensor(part) else type(part).__name__ for name, part in parts.items()}
    if set(shapes) - {"bias"} != {"weight"} or not torch.is_tensor(parts["weight"]) or shapes.get("bias", (1,)) != (1,):
        held = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or (
            "nothing" if isinstance(head, dict) else f"a {type(head).__name__}"
        )
        raise UserError(f"{found[0]} holds {held}, but a head has weight (1, hidden size) and bias (1,)")
    weight: torch.Tensor = head["weight"]
    return weight


def _check_fit(
    config: LoraConfig, weights: dict[str, torch.Tensor], head: torch.Tensor, model: Model, key: str
) -> None:
    """Compare names and shapes of all weights with the base model, without loading its weights."""
    base = load_outline(model)
    if head.shape[1] != head_width(base):
        raise UserError(
            f"the head of {key} reads {head.shape[1]} numbers, but {model.base} gives {head_width(base)}: it was "
            f"trained on another base model{_named(config)}"
        )
    names = fit_to(config, base, list(weights))
    found = {names[name]: tuple(weight.shape) for name, weight in weights.items()}
    own = {"task_type": None, "base_model_name_or_path": model.base}
    with reading(key, "its adapter_config.json must belong to the adapter"):
        blank = get_peft_model(base, LoraConfig(**config.to_dict() | own), low_cpu_mem_usage=True)
    needed = {name: tuple(weight.shape) for name, weight in get_peft_model_state_dict(blank).items()}
    flaws = {
        "are missing": needed.keys() - found.keys(),
        "fit nothing": found.keys() - needed.keys(),
        "have a shape that does not fit the base model and the rank in adapter_config.json": {
            f"{name} {found[name]}, not {shape}" for name, shape in needed.items() if found.get(name, shape) != shape
        },
    }
    if told := [f"{len(names)} weights {what} ({some(names)})" for what, names in flaws.items() if names]:
        raise UserError(
            f"{key} does not fit {model.base}: {'; '.join(told)}. It was made for another base model{_named(config)}, "
            "or its files belong to different adapters"
        )


def _named(config: LoraConfig) -> str:
    """The base model that an adapter's configuration names."""
    return f" (it names {config.base_model_name_or_path})" if config.base_model_name_or_path else ""
