"""Tiny models with random weights, one per architecture, each in a folder as on the hub; nothing is downloaded.

The weights are large enough that the next token depends on all tokens a model can see, so that a wrong mask, a
wrong position or a lost state shows in the logits.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

WINDOW = 32  # tokens that a token sees in a layer with a sliding window, itself included
SHORT_CONTEXT = 64  # tokens up to which Phi-3 (longrope) and Llama (dynamic rope) rotate as they were trained
POSITIONS = 1024  # tokens that a model reads

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Settings of all models whose configuration has them.
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    **_TOKENS,
}
_WINDOWED = {"head_dim": 16, "sliding_window": WINDOW}
_GEMMA = {**_WINDOWED, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, "num_hidden_layers": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_DELTA_NET = {  # Qwen's linear attention
    "head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_GEMMA3 = {**_GEMMA, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
_GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.25, "logits_scaling": 2.0}
_EVERY_SECOND = ["sliding_attention", "full_attention"] * 2

# Name: (model type of transformers, changes to the configuration).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama3_rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "llama_dynamic_rope": (
        "llama",
        {
            "max_position_embeddings": SHORT_CONTEXT,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, **_EXPERTS}),
    "qwen3_5": ("qwen3_5_text", _DELTA_NET),
    "qwen3_5_vision": (  # as published: the language model is a part of it
        "qwen3_5",
        {
            "text_config": _DELTA_NET,
            "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
            | {"patch_size": 4, "out_hidden_size": 64, "num_position_embeddings": 16},
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
        },
    ),
    "qwen3_next": ("qwen3_next", {**_DELTA_NET, **_EXPERTS, "shared_expert_intermediate_size": 64}),
    "mistral": ("mistral", _WINDOWED),
    "mistral_full": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "gemma2": (
        "gemma2",
        {**_GEMMA, "layer_types": _EVERY_SECOND, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    ),
    "gemma3_text": ("gemma3_text", _GEMMA3),
    "gemma3_vision": (  # as published: the language model is a part of it
        "gemma3",
        {
            "text_config": _GEMMA3,
            "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
            | {"num_attention_heads": 2, "image_size": 28, "patch_size": 7},
            "mm_tokens_per_image": 4,
            "boi_token_index": 3,
            "eoi_token_index": 4,
            "image_token_index": 5,
            "tie_word_embeddings": True,
        },
    ),
    "phi3_longrope": (
        "phi3",
        {
            "original_max_position_embeddings": SHORT_CONTEXT,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
                "original_max_position_embeddings": SHORT_CONTEXT,
            },
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {**_WINDOWED, "num_hidden_layers": 4, "layer_types": _EVERY_SECOND, "num_local_experts": 4}
        | {"num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {**_GRANITE, "residual_multiplier": 0.5}),
    "granite_hybrid": (
        "granitemoehybrid",
        {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention"] * 2,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "shared_intermediate_size": 64,
            "num_local_experts": 0,
            **_GRANITE,
        },
    ),
    "cohere2": (
        "cohere2",
        {**_WINDOWED, "num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
        | {"tie_word_embeddings": True, "logit_scale": 0.5},
    ),
    "lfm2": (
        "lfm2",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.2, "tie_word_embeddings": True}),
    "mpt": ("mpt", {"max_seq_len": POSITIONS, "expansion_ratio": 2, "tie_word_embeddings": True}),
    "bloom": ("bloom", {"tie_word_embeddings": True}),
    "falcon_h1": (
        "falcon_h1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
        | {"lm_head_multiplier": 0.5},
    ),
}

_TEXT = """
### User
What is the capital of the country? Write a short poem about the river, in a few words.

### Dromedary
The capital is a large city with many people. Output (a) is better than Output (b) because it is concise.
The quality of the output is good. - The output should be honest and accurate, and specific in its details.
"""


def build(name: str, folder: Path | str, **changes: Any) -> Any:
    """Write a model and its tokenizer to a folder; the same call writes the same weights.

    Args:
        name: one of `ARCHITECTURES`.
        folder: written as `save_pretrained` does.
        changes: further changes to the configuration (the language model's, where that is a part).

    Returns:
        The model's configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind, own = ARCHITECTURES[name]
    with_vision = "text_config" in own
    known = AutoConfig.for_model(kind).get_text_config()
    text = {key: value for key, value in COMMON.items() if hasattr(known, key)}
    text |= {"vocab_size": len(save_tokenizer(folder)), **own.get("text_config", own), **changes}
    config = AutoConfig.for_model(kind, **({**_TOKENS, **own, "text_config": text} if with_vision else text))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (AutoModelForImageTextToText if with_vision else AutoModelForCausalLM).from_config(config).eval()
        _enliven(model)
    model.save_pretrained(folder)
    return config


def save_tokenizer(folder: Path | str) -> Any:
    """Write a byte-level BPE tokenizer that puts `<s>` in front and has no padding token, like Llama's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [_TEXT], trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Random values where transformers begins with zeros and ones, and recurrent states that last."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last == "A_log":  # a state loses a share exp(A_log) * softplus(dt + dt_bias) per token
            parameter.uniform_(-4.0, -2.0)
        elif last == "dt_bias":
            parameter.uniform_(-1.0, 1.0)
        elif last.endswith("bias"):
            parameter.normal_(0.0, 0.1)
        elif "norm" in name or "ln_" in name or last == "D":
            parameter.add_(torch.randn_like(parameter) * 0.2)


if __name__ == "__main__":
    import sys

    for each in sys.argv[2:] or ARCHITECTURES:
        build(each, Path(sys.argv[1]) / each)
