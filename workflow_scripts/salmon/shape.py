"""The properties of a model that determine time and memory, from its configuration alone: no weight is loaded.

The architecture's own code runs without numbers (PyTorch's meta device), with the product's LoRA on it. Therefore
weights, adapters, cache and the memory of autograd are known for any architecture that the workflow accepts.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, TaskType
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from salmon import recompute
from salmon.adapters import add_lora
from salmon.config import Lora, Model
from salmon.margins import output_layer
from salmon.models import load_outline

log = logging.getLogger(__name__)

ATTENTION = "salmon_outline"
_FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight in NF4: 4 bits, a scale of 8 bits per 64 weights, one of 32 per 256 scales (QLoRA, section 3)."""

_CODES = 4 * (16 + 256)
"""Bytes per layer for the tables that decode it."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a base model and of one LoRA on it. Weights and parameters are numbers, memory is in bytes.

    Attributes:
        layers: number of layers.
        width: size of a hidden state.
        vocabulary: number of logits per token.
        linear: weights of the linear layers without the output layer: those that are in 4 bits with `nf4`.
        experts: weights of experts that are not in linear layers; they stay in 16 bits.
        active: share of the experts that a token uses.
        output: weights of the output layer, whether or not it shares them with the embeddings.
        others: embeddings, norms, biases, and the output layer if it has separate weights.
        modules: linear layers that `linear` counts.
        attended: size of a token's queries, summed over all layers.
        lora: parameters of one adapter.
        cache: bytes per token in the cache while sampling.
        graph: bytes that autograd keeps per token of a pass through all layers, adapter included; and the additional
            bytes per token of its text, which is 0 except for eager attention; None: unknown.
        autocast: the same under autocast, as in all trainings except RL: adapters compute in `model.dtype`.
        itemsize: bytes of a number in `model.dtype`.
    """

    layers: int
    width: int
    vocabulary: int
    linear: int
    experts: int
    active: float
    output: int
    others: int
    modules: int
    attended: int
    lora: int
    cache: float
    graph: tuple[float, float] | None
    autocast: tuple[float, float] | None
    itemsize: int

    def weights(self, quantization: str) -> float:
        """Bytes of the base model's weights."""
        linear = self.linear * _FOUR_BITS + self.modules * _CODES
        if quantization == "none":
            linear = self.linear * self.itemsize
        return linear + (self.experts + self.others) * self.itemsize

    @property
    def used(self) -> float:
        """Number of layer weights by which a token is multiplied."""
        return self.linear + self.active * self.experts

    def arithmetic(self, tokens: float, length: float, *, answers: float = 0, backward: bool = False) -> float:
        """Floating-point operations of passes, adapter included.

        Each weight is a multiplication and an addition. Attention is causal, so a token reads half of its text on
        average. The backward pass does the same work for the activations' gradients (twice in attention), and again for
        the adapter's gradients; frozen weights have none.

        Args:
            tokens: tokens of all texts.
            length: tokens of a text.
            answers: tokens whose logits are computed.
            backward: whether to compute gradients.
        """
        layers = 2 * self.used * tokens
        adapter = 2 * self.lora * tokens
        attention = 4 * self.attended * tokens * length / 2
        output = 2 * self.output * answers
        if not backward:
            return layers + adapter + attention + output
        return 2 * layers + 3 * adapter + 3 * attention + 3 * output  # logits are computed twice


def measure(model: Model, lora: Lora) -> Shape:
    """The shape of a base model.

    Raises:
        UserError: if its configuration cannot be read.
    """
    dtype = getattr(torch, model.dtype)
    with _counted_attention():
        base = load_outline(model, dtype, None if model.attention == "eager" else ATTENTION).eval()
        base.requires_grad_(False)
        config = base.config.get_text_config()
        output = output_layer(base)
        linear = [
            module for module in base.modules() if isinstance(module, nn.Linear | Conv1D) and module is not output
        ]
        of_linear = sum(module.weight.numel() for module in linear)
        of_experts = sum(
            weight.numel() for name, weight in base.named_parameters() if "expert" in name and weight.ndim > 2
        )
        whole = sum(weight.numel() for weight in base.parameters())
        with torch.device("meta"):
            adapted = add_lora(base, lora, TaskType.CAUSAL_LM).eval()
        heads = getattr(config, "num_attention_heads", 1)
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Shape(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            vocabulary=config.vocab_size,
            linear=of_linear,
            experts=of_experts,
            active=_active(config),
            output=output.weight.numel() if output is not None else 0,
            others=whole - of_linear - of_experts,
            modules=len(linear),
            attended=config.num_hidden_layers * heads * head,
            lora=sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad),
            cache=_cache(base),
            graph=_graph(base),
            autocast=_graph(_in(adapted, dtype).get_base_model()),
            itemsize=dtype.itemsize,
        )


def _active(config: Any) -> float:
    """Share of the experts that a token uses."""
    numbers = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next(filter(None, numbers), None)
    return getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0


def _cache(base: PreTrainedModel) -> float:
    """Bytes of the cache per token, without parts that do not grow with the text."""
    sizes = []
    for tokens in (32, 64):
        try:
            found = base.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.int64, device="meta"), use_cache=True)
        except Exception as error:  # an architecture's code may raise anything without numbers
            log.debug("cache: %s", error)
            config = base.config.get_text_config()
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            return 2.0 * config.num_hidden_layers * heads * head * base.dtype.itemsize
        layers = found.past_key_values.layers
        states = [state for layer in layers for state in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        sizes.append(sum(state.nbytes for state in states if isinstance(state, Tensor)))
    return (sizes[1] - sizes[0]) / 32


def _graph(base: PreTrainedModel) -> tuple[float, float] | None:
    """Bytes that autograd keeps per token; None if the architecture's code needs numbers."""
    parameters = [*base.parameters()]

    def of_texts(length: int) -> float:
        forward, device = lambda ids: base.base_model(input_ids=ids, use_cache=False), torch.device("meta")
        return recompute.graph_bytes(forward, parameters, length, length, device, recompute.CHUNK) / length

    try:
        short, long = of_texts(1000), of_texts(2000)
    except Exception as error:  # likewise
        log.debug("graph: %s", error)
        return None
    return 2 * short - long, (long - short) / 1000


def _in(adapted: PeftModel, dtype: torch.dtype) -> PeftModel:
    """The same model with its adapter in another dtype."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


class _Attention(torch.autograd.Function):
    """Memory that attention without a materialised matrix keeps for its backward pass: inputs, result, sums."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:3], value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:3], dtype=torch.float32))
        return result


def _attend(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


@contextmanager
def _counted_attention() -> Iterator[None]:
    """Inside the block, architectures use `_Attention`, and no code reads the missing numbers."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    with mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None):
        yield
