"""Loading models: base, quantisation, adapters, heads. The only place that knows how."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from salmon import distributed
from salmon.config import Lora, Model
from salmon.errors import UserError
from salmon.tokenizers import check_folder, load_tokenizer

log = logging.getLogger(__name__)
# Their bars and reports are made for a terminal; what a script's log should say, the script says.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_base(model: Model, device: torch.device | str) -> PreTrainedModel:
    """The base model for causal language modelling, in 4 bit or `dtype`, on one device, in eval mode."""
    return _load_model(AutoModelForCausalLM, model, device)


def load_initial_policy(model: Model, device: torch.device | str, *, together: bool = False) -> nn.Module:
    """The initial policy: the base model with its adapter, if it has one; in eval mode, nothing trainable.

    Args:
        model: which.
        device: of this rank.
        together: each rank holds a part of every layer (tensor parallelism), and all have to be called together. The
            adapter is merged into the weights. Every rank reads the whole model into its machine's memory first.

    Raises:
        UserError: where the model cannot be loaded, or 4-bit weights should be divided.
    """
    together = together and distributed.world() > 1
    if together and model.quantization != "none":
        raise UserError(
            "tensor_parallel cannot divide 4-bit weights: set model.quantization to none, or leave tensor_parallel out"
        )
    policy: nn.Module = load_base(model, "cpu" if together else device)
    if model.adapter:
        policy = _load_adapter(policy, model.adapter, model.adapter_revision)
        if together:
            policy = policy.merge_and_unload()  # type: ignore[operator]
    policy.requires_grad_(False)
    return _divide(policy, torch.device(device)).eval() if together else policy.eval()


def new_reward_model(model: Model, lora: Lora, device: torch.device | str, seed: int) -> PeftModel:
    """A reward model to train: base, fresh LoRA on all linear layers, fresh linear head (no bias) of one output."""
    torch.manual_seed(seed)
    base = _reward_base(model, device)
    base = prepare(base, model)
    return get_peft_model(base, lora_config(lora, TaskType.SEQ_CLS))


def load_reward_model(model: Model, folder: Path, device: torch.device | str, *, trainable: bool) -> PeftModel:
    """A reward model from its PEFT folder, adapter and head.

    Raises:
        UserError: where the folder has no head: a reward model with a random head is never used.
    """
    read_head(folder)
    base = _reward_base(model, device)
    if trainable:
        base = prepare(base, model)
    loaded = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    return loaded if trainable else loaded.eval()


def lora_config(lora: Lora, task: TaskType) -> LoraConfig:
    """LoRA on every linear layer but the output layer (reference: QLoRA)."""
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear", task_type=task
    )


def read_head(folder: Path) -> torch.Tensor:
    """The linear head of a reward model saved as a PEFT folder.

    Returns:
        float32, shape [1, hidden].

    Raises:
        UserError: where the folder holds no adapter or no head.
    """
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{folder} holds no reward model ({file.name} is missing); build it first")
    with safe_open(str(file), framework="pt") as tensors:
        heads = [name for name in tensors.keys() if name.endswith("score.weight")]  # noqa: SIM118
        if len(heads) != 1:
            raise UserError(f"{file} holds no head (score.weight): it is no reward model, or a damaged one")
        head: torch.Tensor = tensors.get_tensor(heads[0]).float()
    return head


def check_context(model: nn.Module, length: int, key: str) -> None:
    """Refuse a setting of more tokens than the model has positions.

    Raises:
        UserError: naming the setting and both numbers.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(f"{key} is {length}, but the model reads {positions} tokens at most; set it to that or less")


def _divide(policy: nn.Module, device: torch.device) -> nn.Module:
    """Keep this rank's part of every layer (DeepSpeed's AutoTP), on its device."""
    import deepspeed

    whole = sum(parameter.numel() for parameter in policy.parameters())
    distributed.init_deepspeed(device)
    divided: nn.Module = deepspeed.init_inference(
        policy,
        tensor_parallel={"tp_size": distributed.world()},
        dtype=policy.dtype,
        replace_with_kernel_inject=False,
    ).module
    if sum(parameter.numel() for parameter in divided.parameters()) == whole:
        raise UserError(
            f"DeepSpeed divides no layer of a {type(policy).__name__} among {distributed.world()} GPUs: leave "
            "tensor_parallel out, or take a number of GPUs that divides the model's attention heads"
        )
    return divided


def _reward_base(model: Model, device: torch.device | str) -> PreTrainedModel:
    """The base model with a head of one output instead of the language-model head."""
    base = _load_model(AutoModelForSequenceClassification, model, device, num_labels=1)
    base.config.pad_token_id = load_tokenizer(model).pad_token_id
    return base


def _load_model(kind: Any, model: Model, device: torch.device | str, **more: Any) -> PreTrainedModel:
    """Load a model of an Auto class as the settings say."""
    dtype = getattr(torch, model.dtype)
    if model.quantization == "nf4":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,  # ZeRO-3 can shard 4-bit weights only when they are stored in its dtype
        )
        if not is_deepspeed_zero3_enabled():  # which places the shards itself
            more["device_map"] = {"": device}
    loaded = _load(
        kind,
        model.base,
        revision=model.revision,
        dtype=dtype,
        attn_implementation=model.attention,
        trust_remote_code=model.trust_remote_code,
        use_safetensors=True,
        **more,
    )
    if model.quantization == "none":
        loaded = loaded.to(device)
    return loaded.eval()


def prepare(base: PreTrainedModel, model: Model) -> PreTrainedModel:
    """Freeze the base and, where it is quantised, make gradients flow through it (QLoRA)."""
    if model.quantization == "none":
        base.requires_grad_(False)
        return base
    for module in base.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward pass in eval mode, and
        # the kernel for that layout has no backward pass: all gradients behind it would silently be zero.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def _load_adapter(base: nn.Module, adapter: str, revision: str | None) -> nn.Module:
    """Put a LoRA adapter on a base model."""
    options = {} if revision is None else {"revision": revision}
    try:
        return PeftModel.from_pretrained(base, adapter, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"adapter {adapter} cannot be loaded: {error}") from error


def _load(kind: Any, name: str, **options: Any) -> Any:
    """`from_pretrained` with errors that say what to do."""
    check_folder(name, "model.base")
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{name} cannot be loaded: {error}. Check model.base and model.revision; a gated model also needs "
            "a login on the hub, and a machine without network a copy in the cache or a local folder."
        ) from error
