"""LoRA adapters: fresh ones on every layer that they should reach, and saved ones of which all is used, or none."""

import logging
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from salmon.border import reading
from salmon.config import Lora
from salmon.errors import UserError

log = logging.getLogger(__name__)

HEAD = "score.weight"
"""How the key of a reward model's head ends."""

# PEFT refuses LoRA on `out_proj` of Mamba layers, which fused kernels bypass.
_FUSED_OUTPUT = ("falcon_h1",)
# Their experts are in one tensor, and PEFT does not know them by itself.
_EXPERTS = ("gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared")
ADVICE = "it has to be a PEFT folder of LoRA in safetensors, made for this base model and vocabulary"
_SHOWN = 3  # names of weights in a message


def add_lora(base: PreTrainedModel, lora: Lora, task: TaskType) -> PeftModel:
    """Fresh LoRA on every linear layer of the language model but the output layer, experts among them (QLoRA).

    Not on: embeddings, routers of experts, small convolutions, a tower for images or sound (no text reaches it, so
    that its gradients would be missing), and the output projection of Mamba layers (kernels read it past LoRA).

    Raises:
        UserError: where weights of the language model would be left without LoRA, or the settings do not allow it.
    """
    config = lora_config(lora, task, base)
    try:
        adapted = get_peft_model(base, config)
    except ValueError as error:
        advice = "set lora.dropout to 0" if config.target_parameters and lora.dropout else "another model.base"
        raise UserError(f"{type(base).__name__} cannot be trained with LoRA: {error}; try {advice}") from error
    if left_out := uncovered(adapted):
        raise UserError(
            f"{len(left_out)} weights of {type(base).__name__} would get no LoRA ({some(left_out)}): this architecture "
            "is not supported, see docs/models.md"
        )
    return adapted


def lora_config(lora: Lora, task: TaskType, base: PreTrainedModel) -> LoraConfig:
    """LoRA of `add_lora`."""
    kind = base.config.get_text_config().model_type
    excluded = [re.escape(name) for name in _outside_decoder(base)]
    if kind in _FUSED_OUTPUT:
        excluded.append(r".*\.mamba\.out_proj")
    if excluded and task == TaskType.SEQ_CLS:
        excluded.append("score")  # the head, which a list of exceptions would bring back among the linear layers
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        exclude_modules=rf"(?:{'|'.join(excluded)})(?:\..*)?" if excluded else None,
        target_parameters=_parameters_for_lora(base) or None,
        task_type=task,
    )


def _parameters_for_lora(base: PreTrainedModel) -> list[str]:
    """Endings of weights that are no module's of their own: experts held in one tensor, and what PEFT takes for one."""
    kind = base.config.get_text_config().model_type
    if kind == "qwen3_next":  # PEFT takes the names of the shared expert's layers for those of the experts
        return [f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")]
    stacked = any(".experts." in name and weight.dim() == 3 for name, weight in base.named_parameters())
    return ["experts.gate_up_proj", "experts.down_proj"] if kind in _EXPERTS and stacked else []


def _outside_decoder(base: PreTrainedModel) -> Iterator[str]:
    """Names of the modules beside the language model that hold linear layers: towers and their projectors."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    path = next((name for name, module in base.named_modules() if module is decoder and name), "")
    parts = path.split(".") if path else []
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        for name, module in base.get_submodule(parent).named_children():
            if name != parts[depth] and any(isinstance(each, nn.Linear) for each in module.modules()):
                yield f"{parent}.{name}"


def uncovered(model: PeftModel) -> list[str]:
    """Weights of the language model's linear layers and experts that the active adapter leaves as they are."""
    base = model.get_base_model()
    outside = tuple(f"{name}." for name in _outside_decoder(base))
    skipped = {
        id(module) for module in (base.get_output_embeddings(), base.get_input_embeddings()) if module is not None
    }
    adapted = {id(part) for module in model.modules() if hasattr(module, "lora_A") for part in module.modules()}
    names = []
    for name, module in base.named_modules():
        plain = isinstance(module, nn.Linear | Conv1D) and id(module) not in skipped and id(module) not in adapted
        if not plain or name.startswith(outside) or re.search(r"lora_|\bscore\b|\.mamba\.out_proj|router", name):
            continue
        names.append(f"{name}.weight")
    # Matrices that are no layer's of their own: experts in one tensor, or whatever else is as large as a layer.
    layers = [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]
    sizes = [layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear | Conv1D)]
    large = median(sizes) if sizes else 0
    for name, weight in base.named_parameters():
        owner = base.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Linear | Conv1D | nn.Embedding) or id(owner) in adapted or name.startswith(outside):
            continue
        experts = ".experts." in name and weight.dim() == 3
        if "lora_" not in name and weight.dim() > 1 and (experts or weight.numel() >= large):
            names.append(name)
    return names


def load_adapter(
    base: Any,
    adapter: str,
    name: str = "default",
    *,
    revision: str | None = None,
    trainable: bool = False,
    head_elsewhere: bool = False,
) -> PeftModel:
    """Put a LoRA adapter on a base model, or one more on a model that has one, and check that all of it is used.

    Args:
        base: a model, or the `PeftModel` around it; adapters that are there stay.
        adapter: hub id or local folder.
        name: of the adapter on this model.
        revision: commit, tag or branch on the hub.
        trainable: whether its weights want gradients.
        head_elsewhere: a reward model's head in the folder is read by `read_head`, and not put on this model.

    Raises:
        UserError: where it cannot be loaded, holds other weights than LoRA's (and a head's), or its weights and the
            model's LoRA layers are not the same ones.
    """
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    with reading(f"adapter {adapter}", ADVICE):
        if Path(adapter).is_dir() and not (Path(adapter) / "adapter_model.safetensors").is_file():
            raise UserError(f"adapter {adapter} has no weights in safetensors; {ADVICE}")
        keys = set(load_peft_weights(adapter, device="cpu", **options))
        others = sorted(key for key in keys if ".lora_" not in key and not key.endswith(HEAD))
        if others or not keys:
            raise UserError(
                f"adapter {adapter} holds {f'weights that are not LoRA ({some(others)})' if others else 'no weights'}: "
                "merge what it was trained with into the base model first, and name that as model.base"
            )
        options["key_mapping"] = _prefix_mapping(base, keys)
        if not isinstance(base, PeftModel):
            base = PeftModel.from_pretrained(base, adapter, adapter_name=name, is_trainable=trainable, **options)
        # `from_pretrained` does not tell what it has left out; reading the same weights once more does.
        result = base.load_adapter(adapter, name, is_trainable=trainable, **options)
    unexpected = [key for key in result.unexpected_keys if not (head_elsewhere and key.endswith(HEAD))]
    # PEFT looks for the adapter's name anywhere in a key; `value` is also in `query_key_value`.
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or unexpected:
        raise UserError(
            f"adapter {adapter} does not fit {type(base.get_base_model()).__name__}: "
            + "; ".join(
                f"{len(names)} weights {what} ({some(names)})"
                for what, names in (("are missing", missing), ("fit nothing", unexpected))
                if names
            )
            + ". It was made for another base model, or another class of it"
        )
    return base


def _prefix_mapping(base: nn.Module, keys: Collection[str]) -> dict[str, str] | None:
    """A renaming that makes an adapter's keys fit where they differ from the model's names in a prefix only.

    That is so for models with a tower: their classes name the same layers `model.layers` or
    `model.language_model.layers`.
    """
    inner = base.get_base_model() if isinstance(base, PeftModel) else base
    modules = {name.replace(".base_layer", "") for name, _ in inner.named_modules()}
    wanted = {
        key.partition(".lora_")[0].removeprefix("base_model.model.").replace(".base_layer", "")
        for key in keys
        if ".lora_" in key
    }
    if wanted <= modules or not wanted:
        return None
    starts = {name.partition("layers.")[0] for name in wanted}
    ours = {name.partition("layers.")[0] for name in modules if "layers." in name}
    for theirs in starts if len(starts) == 1 else ():
        fitting = [start for start in ours if {start + name.removeprefix(theirs) for name in wanted} <= modules]
        if len(fitting) == 1:
            log.info("the adapter's layers are called %s…, the model's %s…: taken for the same", theirs, fitting[0])
            return {rf"^{re.escape(theirs)}": fitting[0]}
    return None


def some(names: Collection[str]) -> str:
    """The first names of many."""
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")
