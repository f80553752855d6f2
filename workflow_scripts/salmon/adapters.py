"""LoRA adapters: new ones on every layer they should reach; saved ones, which must fit completely."""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from salmon.border import reading
from salmon.config import Lora
from salmon.errors import UserError
from salmon.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS, REWARD_HEAD, adapter_folder, nearest_head, refuse_pointers

log = logging.getLogger(__name__)

HEAD = "score.weight"
"""Ending of the key of a reward model's head."""

# PEFT refuses LoRA on `out_proj` of Mamba layers, which fused kernels bypass.
_FUSED_OUTPUT = ("falcon_h1",)
# The experts of these models are in one tensor, and PEFT does not find them by itself.
_EXPERTS = ("gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared")
ADVICE = "it must be a PEFT folder with LoRA weights in safetensors, made for this base model and vocabulary"
# Initialisations of LoRA that do not change the base model's weights. The others (PiSSA, OLoRA, CorDA, LoftQ, …) change
# them again whenever a saved adapter is loaded, unless the adapter is saved as plain LoRA.
_BEGUN, _PLAIN = "init_lora_weights", "PEFT's save_pretrained with path_initial_model_for_weight_conversion"
_LEAVES_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
_SHOWN = 3  # names of weights in a message


def add_lora(base: PreTrainedModel, lora: Lora, task: TaskType) -> PeftModel:
    """Add new LoRA to every linear layer of the language model except the output layer, experts included (QLoRA).

    It leaves out embeddings, small convolutions, towers for images or sound (no text reaches them, so their gradients
    would be missing), and the output projection of Mamba layers (their kernels bypass LoRA). Routers of experts get
    LoRA if they are ordinary linear layers (qwen3_moe).

    Raises:
        UserError: if weights of the language model would get no LoRA, or the settings do not allow it.
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
    """The LoRA configuration for `add_lora`."""
    kind = base.config.get_text_config().model_type
    excluded = [re.escape(name) for name in _outside_decoder(base)]
    if kind in _FUSED_OUTPUT:
        excluded.append(r".*\.mamba\.out_proj")
    if excluded and task == TaskType.SEQ_CLS:
        excluded.append("score")  # the head: a list of exceptions would add it to the linear layers again
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        exclude_modules=_with_children(excluded),
        target_parameters=_parameters_for_lora(base) or None,
        task_type=task,
    )


def _with_children(patterns: Collection[str]) -> str | None:
    """A pattern for these modules and everything below them, in PEFT's form for exceptions."""
    return rf"(?:{'|'.join(patterns)})(?:\..*)?" if patterns else None


def _parameters_for_lora(base: PreTrainedModel) -> list[str]:
    """Name endings of weights without a module: experts held in one tensor, and anything that PEFT mistakes for one."""
    kind = base.config.get_text_config().model_type
    if kind == "qwen3_next":  # PEFT mistakes the shared expert's layers for the experts'
        return [f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")]
    stacked = any(".experts." in name and weight.dim() == 3 for name, weight in base.named_parameters())
    return ["experts.gate_up_proj", "experts.down_proj"] if kind in _EXPERTS and stacked else []


def _outside_decoder(base: PreTrainedModel) -> Iterator[str]:
    """Names of the modules outside the language model that hold linear layers: towers and their projectors."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    path = next((name for name, module in base.named_modules() if module is decoder and name), "")
    parts = path.split(".") if path else []
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        for name, module in base.get_submodule(parent).named_children():
            if name != parts[depth] and any(isinstance(each, nn.Linear) for each in module.modules()):
                yield f"{parent}.{name}"


def uncovered(model: PeftModel) -> list[str]:
    """Weights of the language model's linear layers and experts that the active adapter does not change."""
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
    # Matrices without a layer: experts in one tensor, or anything else as large as a layer.
    layers = [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]
    # In 4 bits a weight has fewer numbers than its layer.
    sizes = [layer.in_features * layer.out_features for layer in layers if isinstance(layer, nn.Linear)]
    sizes += [layer.weight.numel() for layer in layers if isinstance(layer, Conv1D)]
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
    """Load a LoRA adapter onto a base model, or onto a model that has adapters, and check that all of it is used.

    Args:
        base: a model, or the `PeftModel` around it; existing adapters stay.
        adapter: hub id or local folder.
        name: the adapter's name on this model.
        revision: commit, tag or branch on the hub.
        trainable: whether its weights require gradients.
        head_elsewhere: whether `read_head` reads the reward model's head in the folder, so that this model needs none.

    Raises:
        UserError: if it cannot be loaded, if it is a reward model and the base has no head for it, if it holds weights
            other than those of LoRA (and a head), or if its weights do not match the model's LoRA layers.
    """
    path, head = find_adapter(adapter, revision)
    folder = str(path)
    config, weights = read_adapter(folder, adapter)
    keys = set(weights)
    del weights
    score = next((key for key in sorted(keys) if key.endswith(HEAD)), head)
    model = base.get_base_model() if isinstance(base, PeftModel) else base
    if score and not head_elsewhere and not hasattr(model, "score"):
        raise UserError(
            f"adapter {adapter} is a reward model (its head is {score}), not a policy: name it in reward_model.path, "
            "and a policy's adapter in model.adapter"
        )
    with reading(f"adapter {adapter}", ADVICE):
        mapping = _fit(config, model, keys)
        options: dict[str, Any] = {"key_mapping": mapping}
        if isinstance(base, PeftModel):
            config.inference_mode = not trainable
            base.add_adapter(name, config)
            if trainable:
                base.set_requires_grad(name)
        else:
            base = PeftModel.from_pretrained(
                base, folder, adapter_name=name, is_trainable=trainable, config=config, **options
            )
        # `from_pretrained` does not report the weights that it skips; loading the same weights again does.
        result = base.load_adapter(folder, name, is_trainable=trainable, **options)
    unexpected = [key for key in result.unexpected_keys if not (head_elsewhere and key.endswith(HEAD))]
    # PEFT looks for the adapter's name anywhere in a key, and `value` is part of `query_key_value`.
    missing = [key for key in result.missing_keys if of_adapter(key, name)]
    if missing or unexpected:
        raise UserError(
            f"adapter {adapter} does not fit {type(base.get_base_model()).__name__}: "
            + "; ".join(
                f"{len(names)} weights {what} ({some(names)})"
                for what, names in (("are missing", missing), ("fit nothing", unexpected))
                if names
            )
            + ". It was made for another base model, or another model class"
        )
    return base


def find_adapter(adapter: str, revision: str | None = None) -> tuple[Path, Path | None]:
    """The PEFT folder of an adapter: in a local folder, or in the cached copy of a hub model, fetched if necessary.

    Returns:
        The folder; and, for a reward model of the authors' release, the head that is stored near it.

    Raises:
        UserError: if there is none, or more than one (`identity.adapter_folder`).
    """
    with reading(f"adapter {adapter}", ADVICE):
        root = fetch(adapter, revision)
        folder = adapter_folder(root)
        return folder, nearest_head(root, folder)


def fetch(name: str, revision: str | None) -> Path:
    """The local folder of an adapter, fetched from the hub if it is there."""
    if Path(name).is_dir():
        return Path(name)
    patterns = [f"{prefix}{file}" for prefix in ("", "*/") for file in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, REWARD_HEAD)]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def read_adapter(folder: str, named: str) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """LoRA configuration and weights from a PEFT folder: safetensors, or a pickle that holds only tensors.

    Args:
        folder: as `find_adapter` returns it.
        named: the user's name for it, for messages.

    Raises:
        UserError: if it cannot be read, or holds more than LoRA (and a head).
    """
    with reading(f"adapter {named}", ADVICE):
        if not any((Path(folder) / name).is_file() for name in ADAPTER_WEIGHTS):
            raise UserError(f"adapter {named} has no weights ({' or '.join(ADAPTER_WEIGHTS)} in {folder}); {ADVICE}")
        config = PeftConfig.from_pretrained(folder)
        refuse_pointers(Path(folder))
    with reading(f"adapter {named}", unpickling_advice):
        weights: dict[str, torch.Tensor] = load_peft_weights(folder, device="cpu")
        if not isinstance(weights, dict):
            raise UserError(f"adapter {named} holds a {type(weights).__name__}, not a dictionary of weights; {ADVICE}")
        _check_kind(named, config, weights)
    return config, weights


def unpickling_advice(error: BaseException) -> str:
    """Advice for weights that cannot be read: they may be a pickle that holds other objects."""
    if type(error).__name__ != "UnpicklingError":
        return ADVICE
    return (
        "a pickle is read only if it holds nothing but tensors, because anything else may run code. If you trust its "
        f"source, load it there and save it as safetensors; {ADVICE}"
    )


def of_adapter(key: str, name: str) -> bool:
    """Whether a weight belongs to the adapter of this name. Weights on embeddings have the name at their end."""
    return f".{name}." in f"{key}."


def _check_kind(adapter: str, config: PeftConfig, keys: Collection[str]) -> None:
    """Refuse an adapter that is more than LoRA on top of the base model's own weights."""
    others = sorted(key for key in keys if ".lora_" not in key and not key.endswith(HEAD))
    if others or not keys:
        raise UserError(
            f"adapter {adapter} holds {f'weights that are not LoRA ({some(others)})' if others else 'no weights'}: "
            "merge the adapter into the base model first, and set model.base to the result"
        )
    begun = getattr(config, _BEGUN, True)
    if begun not in _LEAVES_BASE:
        raise UserError(
            f"adapter {adapter} has {_BEGUN} {begun!r}, which changes the base model's weights each time it is loaded; "
            f"no other adapter could then share the base model: save it as plain LoRA ({_PLAIN}), or merge it into the "
            "base model and set model.base to the result"
        )


def fit_to(config: PeftConfig, base: nn.Module, keys: Sequence[str]) -> dict[str, str]:
    """Name of each weight of an adapter -> its name in a model with other layer names; see `_fit`."""
    start = "base_model.model."
    names = {key: key for key in keys}
    for pattern, ours in (_fit(config, base, keys) or {}).items():
        names = {key: start + re.sub(pattern, ours, key.removeprefix(start)) for key in keys}
    return names


def _fit(config: PeftConfig, base: nn.Module, keys: Collection[str]) -> dict[str, str] | None:
    """Make an adapter fit a model whose class uses other layer names, or has an additional tower.

    Classes of models with a tower call the same layers `model.layers` or `model.language_model.layers`. An adapter that
    was trained without the tower often has targets, such as `q_proj`, that the tower also has.

    Args:
        config: the adapter's configuration; its patterns and exceptions are changed to fit.
        base: the model, with other adapters or without.
        keys: the keys of the adapter's weights.

    Returns:
        New names of the keys, for PEFT; None if they fit unchanged.
    """
    modules = {name.replace(".base_layer", "") for name, _ in base.named_modules()}
    wanted = {
        key.partition(".lora_")[0].removeprefix("base_model.model.").replace(".base_layer", "")
        for key in keys
        if ".lora_" in key
    }
    theirs, ours = ("", "") if wanted <= modules else _prefixes(wanted, modules)
    if theirs != ours:
        log.info("the adapter calls its layers %s…, the model %s…: treating them as the same layers", theirs, ours)
        for patterns in ("alpha_pattern", "rank_pattern"):
            setattr(config, patterns, {_renamed(key, theirs, ours): n for key, n in getattr(config, patterns).items()})
    outside = list(_outside_decoder(base))
    fitted = (ours + name.removeprefix(theirs) for name in wanted)
    if outside and not any(name.startswith(f"{each}.") for name in fitted for each in outside):
        config.exclude_modules = config.exclude_modules or _with_children(list(map(re.escape, outside)))
    return {rf"^{re.escape(theirs)}": ours} if theirs != ours else None


def _prefixes(wanted: Collection[str], modules: Collection[str]) -> tuple[str, str]:
    """Prefixes of the adapter's and the model's module names, if only the prefixes differ; otherwise "" twice."""
    starts = {name.partition("layers.")[0] for name in wanted}
    fitting = [
        (theirs, start)
        for theirs in (starts if len(starts) == 1 else ())
        for start in {name.partition("layers.")[0] for name in modules if "layers." in name}
        if {start + name.removeprefix(theirs) for name in wanted} <= set(modules)
    ]
    return fitting[0] if len(fitting) == 1 else ("", "")


def _renamed(pattern: str, theirs: str, ours: str) -> str:
    """A module pattern with this prefix replaced. A pattern without the prefix matches the end of any name."""
    bare = pattern.removeprefix("^")
    for start in (theirs, re.escape(theirs)):
        if bare.startswith(start) and (start or bare != pattern):
            return pattern[: len(pattern) - len(bare)] + ours + bare.removeprefix(start)
    return pattern


def some(names: Collection[str]) -> str:
    """The first names of many."""
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")
