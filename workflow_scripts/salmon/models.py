"""Loads models: base, quantisation, adapters, heads. No other module does.

Everything loaded here is verified: all weights of the base model, of an adapter and of a head are used, and none is
missing, whichever class loads them. Otherwise loading ends in a `UserError` that names the mismatch. The libraries
would fill missing weights with random numbers, or ignore an adapter, with only a warning.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Cache, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import logging as transformers_logging

from salmon import distributed
from salmon.adapters import HEAD, add_lora, load_adapter, some
from salmon.border import read_json, reading
from salmon.config import Lora, Model
from salmon.errors import UserError
from salmon.identity import REWARD_HEAD, SHOWN, context_limit, refuse_pointers
from salmon.tokenizers import check_depth, check_folder, find_file

log = logging.getLogger(__name__)
# Their progress bars and reports are meant for a terminal; the scripts write their own log.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# Buffers in old checkpoints that are computed today; not weights.
_OLD_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias)$")


def load_initial_policy(model: Model, device: torch.device | str, *, together: bool = False) -> nn.Module:
    """The initial policy: the base model with its adapter, if it has one; in eval mode, nothing trainable.

    Args:
        model: section of the configuration.
        device: this rank's device.
        together: each rank holds a part of every layer (tensor parallelism), and all must be called together. The
            adapter is merged into the weights. Every rank reads the whole model into its machine's memory first.

    Raises:
        UserError: if the model cannot be loaded, or 4-bit weights would have to be divided.
    """
    together = together and distributed.world() > 1
    if together and model.quantization != "none":
        raise UserError(
            "tensor_parallel cannot divide 4-bit weights: set model.quantization to none, or leave tensor_parallel out"
        )
    policy: nn.Module = load_base(model, "cpu" if together else device)
    if model.adapter:
        policy = load_adapter(policy, model.adapter, revision=model.adapter_revision)
        if together:
            policy = policy.merge_and_unload()  # type: ignore[operator]
    policy.requires_grad_(False)
    return _divide(policy, torch.device(device)).eval() if together else policy.eval()


def load_policy(model: Model, policy: Path | None, device: torch.device | str) -> nn.Module:
    """A trained policy, whose adapter belongs to the bare base model; or the initial policy if none is given."""
    return load_initial_policy(model.with_adapter(policy) if policy else model, device)


def load_judge(model: Model, device: torch.device | str, *, together: bool = False) -> nn.Module:
    """A model that judges, loaded like the initial policy but without flash attention.

    The judge needs a mask for each token, which flash attention does not accept.
    """
    attention = "eager" if model.attention == "eager" else "sdpa"
    return load_initial_policy(model.model_copy(update={"attention": attention}), device, together=together)


class Scoring(nn.Module):
    """A causal language model whose forward pass gives one number per text: a linear head on its last token.

    Mixed into the class of a loaded model (`_add_head`), so everything that transformers, PEFT and DeepSpeed know of
    the architecture still holds, whether or not transformers has a classifier class for it. The output layer is not
    computed. The head, `score`, has no bias and is in float32.
    """

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        longer: torch.Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Rewards of texts, padded on either side.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 at tokens; None without padding. With a cache, [B, past + T].
            position_ids: [B, T], for texts padded on their left.
            past_key_values: cache of the texts' beginnings; `input_ids` are then the rest.
            use_cache: whether to return the cache.
            longer: bool [B]; texts padded on their right are computed in two calls of the layers, these and the others,
                each without the columns where all have padding.

        Returns:
            `logits`: [B, 1], float32 like the head, read at the last token of each text.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if longer is not None:
            parts = [part for part in (longer.nonzero()[:, 0], (~longer).nonzero()[:, 0]) if len(part)]
            rewards = torch.cat([self._of_part(input_ids[part], attention_mask[part]) for part in parts])
            return SequenceClassifierOutputWithPast(logits=rewards[torch.cat(parts).argsort()])
        places = {} if position_ids is None else {"position_ids": position_ids}
        # No token reads padding on the right, and attention without a mask is faster.
        on_its_right = past_key_values is None and bool((attention_mask.diff() <= 0).all())
        output = self.base_model(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=None if on_its_right else attention_mask,
            use_cache=use_cache,
            **places,
            **({} if past_key_values is None else {"past_key_values": past_key_values}),
        )
        hidden, width = output.last_hidden_state, input_ids.shape[1]
        read = attention_mask[:, -width:]
        last = (read * torch.arange(1, width + 1, device=hidden.device)).argmax(-1)
        states = hidden[torch.arange(len(last), device=hidden.device), last]
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = next(self.score.parameters()).dtype  # type: ignore[union-attr]
            logits = self.score(states.to(dtype))  # type: ignore[operator]
        return SequenceClassifierOutputWithPast(
            logits=logits, past_key_values=output.past_key_values if use_cache else None
        )

    def _of_part(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Rewards of texts padded on their right, [B, 1], without the columns that are padding only."""
        width = int(attention_mask.sum(dim=1).max())
        rewards: torch.Tensor = Scoring.forward(self, input_ids[:, :width], attention_mask[:, :width]).logits
        return rewards


def new_policy(model: Model, lora: Lora, device: torch.device | str, seed: int) -> PeftModel:
    """A policy to train: base and new LoRA on all linear layers."""
    torch.manual_seed(seed)
    return add_lora(prepare(load_base(model, device), model), lora, TaskType.CAUSAL_LM)


def new_reward_model(model: Model, lora: Lora, device: torch.device | str, seed: int) -> PeftModel:
    """A reward model to train: base, new LoRA on all linear layers, new linear head (no bias) with one output."""
    torch.manual_seed(seed)
    base = prepare(_add_head(load_base(model, device)), model)
    return add_lora(base, lora, TaskType.SEQ_CLS)


def load_reward_model(model: Model, folder: Path, device: torch.device | str, *, trainable: bool) -> PeftModel:
    """A reward model from its PEFT folder, adapter and head.

    Raises:
        UserError: if a weight of either is missing or left over: a reward model never gets a random head.
    """
    read_head(folder)
    base = _add_head(load_base(model, device))
    if trainable:
        base = prepare(base, model)
    loaded = load_adapter(base, str(folder), trainable=trainable)
    return loaded if trainable else loaded.eval()


def _add_head(base: PreTrainedModel) -> PreTrainedModel:
    """Make a causal language model a `Scoring` one, with a new head that starts like a classifier of transformers."""
    weight = base.get_input_embeddings().weight
    base.score = nn.Linear(head_width(base), 1, bias=False, device="meta").to_empty(device=weight.device)
    with torch.no_grad():
        base.score.weight.normal_(0.0, getattr(base.config.get_text_config(), "initializer_range", 0.02))
    base.__class__ = type(f"{type(base).__name__}Scoring", (Scoring, type(base)), {})
    return base


def head_width(base: PreTrainedModel) -> int:
    """Size of a hidden state, which a head reads."""
    output = base.get_output_embeddings()
    return getattr(output, "in_features", None) or base.config.get_text_config().hidden_size


def read_head(folder: Path) -> torch.Tensor:
    """The linear head of a reward model saved as a PEFT folder.

    Returns:
        float32, shape [1, hidden].

    Raises:
        UserError: if the folder has no adapter, no head or another kind of head, or cannot be read.
    """
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    refuse_pointers(folder)
    if not file.is_file():
        found = sorted(each.name for each in folder.iterdir())[:SHOWN] if folder.is_dir() else ["nothing"]
        raise UserError(
            f"{folder} is not a reward model: {file.name} is missing; the folder has {', '.join(found)}. Build it "
            "first; name a reward model in another layout, such as the authors', in reward_model.path"
        )
    with (
        reading(file, "copy or build the reward model again"),
        safe_open(str(file), framework="pt") as tensors,
    ):
        heads = [name for name in tensors.keys() if name.endswith(HEAD)]  # noqa: SIM118
        if len(heads) != 1:
            raise UserError(
                f"{file} holds no head ({HEAD}): it is not a reward model, or it is damaged; name the authors' reward "
                f"model, which has its head in the file {REWARD_HEAD}, in reward_model.path"
            )
        head: torch.Tensor = tensors.get_tensor(heads[0]).float()
        if head.dim() != 2 or head.shape[0] != 1:
            raise UserError(
                f"the head in {file} has the shape {tuple(head.shape)}, not one output: copy or build the reward "
                "model again"
            )
    return head


def check_context(model: nn.Module, length: int, key: str) -> None:
    """Refuse a setting that exceeds the model's positions, or the length up to which a text does not depend on others.

    Raises:
        UserError: with the setting and both numbers.
    """
    config = getattr(model, "config", None)
    limit = None if config is None else context_limit(config.to_dict())
    if limit is not None and length > limit:
        raise UserError(f"{key} is {length}, but the model reads {limit} tokens at most; lower the setting")


def _divide(policy: nn.Module, device: torch.device) -> nn.Module:
    """Keep only this rank's part of every layer (DeepSpeed's AutoTP), on its device."""
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
            f"DeepSpeed cannot divide a {type(policy).__name__} among {distributed.world()} GPUs: leave "
            "tensor_parallel out, or use a number of GPUs that divides the model's attention heads"
        )
    return divided


def _quantized(model: Model, device: torch.device | str) -> dict[str, Any]:
    """Options of `from_pretrained` for 4-bit weights."""
    if model.quantization != "nf4":
        return {}
    dtype = getattr(torch, model.dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # ZeRO-3 can shard 4-bit weights only when they are stored in its dtype
    )
    # ZeRO-3 places the shards itself.
    return {"quantization_config": config} | ({} if is_deepspeed_zero3_enabled() else {"device_map": {"": device}})


def prepare(base: PreTrainedModel, model: Model) -> PreTrainedModel:
    """Freeze the base and, if it is quantised, let gradients flow through it (QLoRA).

    Norms, embeddings and output layer stay as loaded, so activations are in `model.dtype` as in sampling and judging.
    QLoRA's usual preparation converts these to float32, and thereby all activations between 4-bit layers. This takes
    twice the memory and leaves gradients as far from those of float32 (benchmarks/precision.py).
    """
    base.requires_grad_(False)
    if model.quantization == "none":
        return base
    for module in base.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward pass in eval mode, and
        # the kernel for that layout has no backward pass: all gradients before it would silently be zero.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def _check_loading(model: Model, info: Mapping[str, Any]) -> None:
    """Refuse a base model whose weights are missing, left over, of another shape, or unreadable."""
    findings = {
        "are missing": info["missing_keys"],
        "have no place in it": {key for key in info["unexpected_keys"] if not _OLD_BUFFERS.search(key)},
        "have another shape": {str(key) for key in info["mismatched_keys"]},
        "could not be read": {str(error) for error in info["error_msgs"]},
    }
    if found := [f"{len(names)} {what} ({some(names)})" for what, names in findings.items() if names]:
        raise UserError(
            f"the weights in {model.base} do not match its config.json: {'; '.join(found)}. Fetch or save the model "
            "again; missing weights would be random numbers"
        )


def load_base(model: Model, device: torch.device | str) -> PreTrainedModel:
    """The base model for causal language modelling, in 4 bits or `dtype`, on one device, in eval mode.

    Its own dropout (GPT-2, OPT) is off: in RL the ratio of new and old policy must be 1 as long as nothing has changed.

    Raises:
        UserError: if it cannot be loaded, or its files do not hold exactly the weights of its configuration.
    """
    if torch.device(device).type == "cuda" and model.dtype != "float32":
        # LoRA is in float32. On tensor cores its products have 10 bits, still more than a 16-bit model's.
        torch.set_float32_matmul_precision("high")
    check_folder(model.base, "model.base")
    refuse_pointers(Path(model.base))
    remote: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    with reading(model.base, lambda error: _advice(error, model)):
        check_depth(model.base, model.revision)
        config = AutoConfig.from_pretrained(model.base, **remote)
        for part in (config, config.get_text_config()):
            for name, value in vars(part).items():
                if re.search(r"(dropout|_pdrop|layerdrop)$", name) and isinstance(value, float):
                    setattr(part, name, 0.0)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model.base,
            config=config,
            dtype=getattr(torch, model.dtype),
            attn_implementation=model.attention,
            use_safetensors=True,
            output_loading_info=True,
            **remote,
            **_quantized(model, device),
        )
    _check_loading(model, info)
    _check_generation_config(model)
    if model.quantization == "none":
        loaded = loaded.to(device)
    base: PreTrainedModel = loaded.eval()
    return base


def load_dequantized(model: Model, device: torch.device | str) -> PreTrainedModel:
    """The base model with its 4-bit weights dequantised to `dtype`, on the CPU.

    It computes the same as the quantised model, up to the order of sums. The machine's memory must hold it; the device
    holds the quantised model.
    """
    import bitsandbytes

    base = load_base(model, device)
    dtype = getattr(torch, model.dtype)
    for name, module in [*base.named_modules()]:
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).to(dtype)
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta", dtype)
            plain.weight = nn.Parameter(weight.cpu(), requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.data.cpu(), requires_grad=False)
            base.set_submodule(name, plain)
    base.hf_quantizer = None  # otherwise it would be saved as a quantised model, and could not move
    base.is_quantized = base.is_loaded_in_4bit = False
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    return base.to("cpu")


def load_outline(model: Model, dtype: torch.dtype = torch.float32, attention: str | None = None) -> PreTrainedModel:
    """The base model's layers without weights, from its config.json alone: names and shapes for comparison.

    Args:
        model: section of the configuration.
        dtype: dtype of the absent weights.
        attention: the attention implementation; the architecture's default if not given.

    Raises:
        UserError: if the configuration cannot be read.
    """
    check_folder(model.base, "model.base")
    remote: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    with reading(model.base, lambda error: _advice(error, model)), torch.device("meta"):
        check_depth(model.base, model.revision)
        config = AutoConfig.from_pretrained(model.base, **remote)
        outline: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=model.trust_remote_code, dtype=dtype, attn_implementation=attention
        )
    return outline


def _check_generation_config(model: Model) -> None:
    """Refuse a damaged generation_config.json, which transformers would silently ignore: it holds end tokens."""
    file = find_file(model.base, model.revision, "generation_config.json")
    if file is None:
        return
    found = read_json(file, "", "fetch the model again")
    ends = found.get("eos_token_id") if isinstance(found, dict) else "nothing"
    if not all(
        type(token) is int and token >= 0
        for token in (ends if isinstance(ends, list) else [0 if ends is None else ends])
    ):
        raise UserError(f"{file} names end tokens that are not token ids; fetch the model again")


def _advice(error: BaseException, model: Model) -> str:
    """The key or file to change, given a library's message."""
    said = str(error)
    if "attention implementation" in said or "does not support Flash Attention" in said:
        return f"this architecture has no {model.attention}: set model.attention to eager"
    if isinstance(error, OSError) and "safetensors" in said:
        return (
            "weights are read from safetensors only, because a pickle may run code: load the model on a machine where "
            "you trust it, and save it with save_pretrained"
        )
    return (
        "check model.base and model.revision, or fetch the model again. A gated model also needs a login on the hub. A "
        "machine without a network needs a cached copy or a local folder"
    )
