"""Rows of different lengths as batches: which go together, and how they become rectangles."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

_KNOWN_LAYERS = {
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
}


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of rows, longest first, in batches of `size`: little padding, and too little memory shows at once.

    The rows that an interruption between two batches left over form the same batches again.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + size] for start in range(0, len(order), size)]


def dealt(lengths: Sequence[int], rank: int, world: int) -> list[int]:
    """Places of the rows of one rank, in their order: as many of each length as the other ranks have, within one."""
    by_length = [place for batch in batches(lengths, world) for place in batch[rank : rank + 1]]
    return sorted(by_length)


def left_pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids as a rectangle, padded on the left. The mask alone says what is padding.

    (The tokenizer's padding token may be one that the model has no embedding for.)

    Returns:
        ids and mask (1 token, 0 padding), int64 on the CPU, shape [sequences, longest].
    """
    width = max(map(len, sequences))
    ids = [[0] * (width - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count tokens and not paddings (int64, [rows, length], as the mask)."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep these rows of a cache, in place; they may also repeat.

    Of all of its layers' states, as beam search needs it: what transformers has for batches alone leaves out the
    states of recurrent and convolution layers.

    Args:
        cache: what a model returned.
        rows: int64, places in the batch.
    """
    cache.reorder_cache(rows)


def can_join(cache: Any) -> bool:
    """Whether `join_rows` and `cut_padding` know all that a cache holds: a class of its own may hold more."""
    return type(cache) is DynamicCache and all(type(layer) in _KNOWN_LAYERS for layer in cache.layers)


def join_rows(cache: Cache, other: Cache) -> None:
    """Append the rows of another cache of the same model, in place; the mask has to grow as `join_masks` says.

    Keys and values end where the last token is, in layers with a sliding window as well, which keep the last ones: the
    shorter of the two is padded on the left. States of recurrent and convolution layers are as large at any length.
    """
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            layer.keys = _cat_padded(layer.keys, more.keys, dim=-2)
            layer.values = _cat_padded(layer.values, more.values, dim=-2)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = max(layer.cumulative_length, more.cumulative_length)
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for mine, theirs in (
                (layer.conv_states, more.conv_states),
                (layer.recurrent_states, more.recurrent_states),
            ):
                for index, state in mine.items():
                    if state is not None:
                        mine[index] = torch.cat([state, theirs[index]])


def join_masks(mask: Tensor, other: Tensor) -> Tensor:
    """The masks of two caches that are joined (int64, [rows, length]): zeros on the left of the shorter."""
    return _cat_padded(mask, other, dim=-1)


def cut_padding(cache: Cache, tokens: int) -> None:
    """Take so many tokens off the left of a cache, in place, which are padding in all of its rows.

    This copies nothing: the next step, which copies the cache anyway, leaves them out.
    """
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
            continue
        surplus = tokens
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= tokens
            surplus = max(0, layer.keys.shape[-2] - layer.cumulative_length)
        layer.keys, layer.values = layer.keys[:, :, surplus:], layer.values[:, :, surplus:]


def _cat_padded(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Rows of both, the shorter in `dim` (-1 or -2) padded with zeros at its beginning."""
    length = max(first.shape[dim], second.shape[dim])
    after = (0, 0) * (-1 - dim)  # `pad` counts dimensions from the last
    return torch.cat([pad(part, (*after, length - part.shape[dim], 0)) for part in (first, second)])
