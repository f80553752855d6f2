"""Small tokenizers and models with known properties; nothing is downloaded."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def byte_tokenizer(
    *,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    bos: bool = True,
    append_eos: bool = False,
    template: str | None = None,
) -> Any:
    """One token per byte, so the encoding of a text is obvious; `<s>` comes first, as with Llama.

    Args:
        special: special tokens other than `<s>` (1) and `</s>` (2).
        added: added tokens that are not special.
        bos: put `<s>` in front.
        append_eos: put `</s>` at the end.
        template: chat template.
    """
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, [], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    single = ("<s> " if bos else "") + "$A" + (" </s>" if append_eos else "")
    bpe.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return _wrap(bpe, special, added, template)


def spaced_tokenizer(*, special: Sequence[str] = ()) -> Any:
    """A tokenizer like Llama-2's: it puts a space before a text, and encodes as bytes what is not in its vocabulary."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh<>/s|."]
    bpe = Tokenizer(
        models.BPE({name: number for number, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(bpe, special, (), None)


def _wrap(bpe: Tokenizer, special: Sequence[str], added: Sequence[str], template: str | None) -> Any:
    bpe.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    bpe.add_tokens([AddedToken(text, normalized=False) for text in added])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.padding_side = "left"
    if template:
        tokenizer.chat_template = template
    return tokenizer


def save_markov(
    folder: Path, tokenizer: Any, *said: str, ends: Sequence[str] = ("</s>",), max_length: int = 512
) -> Path:
    """A Llama that says what it is told: its next token depends on the last one alone.

    Args:
        folder: gets model and tokenizer.
        tokenizer: from `byte_tokenizer`.
        said: texts; each token of one is followed by the next one, the last by the first.
        ends: end tokens of the generation config.
        max_length: positions of the model.
    """
    size = -(-len(tokenizer) // 16) * 16
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight[:, : len(tokenizer)] = torch.eye(len(tokenizer))
        for text in said:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(set(tokens)) == len(tokens), "a token can be followed by one token only"
            for token, after in itertools.pairwise([*tokens, tokens[0]]):
                model.lm_head.weight[after, token] = 20.0
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=tokenizer.convert_tokens_to_ids(list(ends)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
