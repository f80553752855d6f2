"""Caches of rows that come and go while they are sampled: rows leave, others join, padding is cut.

Keys and values of all rows end at the same position. Shorter rows are padded on the left, and the mask marks the
padding. In transformers' caches every step copies all keys and values; here a layer has room for future tokens.
"""

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

ROOM = 64
"""Tokens for which a layer has room after each copy. The copy is a small part of the cost of so many steps, and the
room is a small part of the memory of some hundreds of tokens."""


class RoomyLayer(DynamicLayer):
    """Keys and values that are parts of larger tensors, so that most steps, departures and arrivals copy little."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.held, self.start = (layer.keys, layer.values), 0  # the larger tensors: first rows, from a token on

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; returns all keys and values."""
        rows, length = len(self.keys), self.keys.shape[-2]
        self._resize(rows, length + key_states.shape[-2])
        self.keys[:, :, length:], self.values[:, :, length:] = key_states, value_states
        return self.keys, self.values

    def keep(self, rows: int, new: Tensor, old: Tensor) -> None:
        """Keep the first `rows` rows, after copying those at the old indices to the new ones."""
        for states in (self.keys, self.values) if len(new) else ():
            states.index_copy_(0, new, states.index_select(0, old))
        self._resize(rows, self.keys.shape[-2])

    def join(self, more: DynamicLayer) -> None:
        """Append the rows of another layer, which must not be longer."""
        rows, length = len(self.keys), self.keys.shape[-2]
        before = length - more.keys.shape[-2]
        self._resize(rows + len(more.keys), length)
        for mine, theirs in ((self.keys, more.keys), (self.values, more.values)):
            mine[rows:, :, :before] = 0
            mine[rows:, :, before:] = theirs

    def cut(self, tokens: int) -> None:
        """Leave out the first tokens."""
        self.start += tokens
        self.keys, self.values = self.keys[:, :, tokens:], self.values[:, :, tokens:]

    def _resize(self, rows: int, length: int) -> None:
        """Set the size of keys and values; new entries are uninitialised."""
        if rows > len(self.held[0]) or self.start + length > self.held[0].shape[-2]:
            self.held, self.start = (self._copy(self.keys, rows, length), self._copy(self.values, rows, length)), 0
        self.keys, self.values = (states[:rows, :, self.start : self.start + length] for states in self.held)

    @staticmethod
    def _copy(states: Tensor, rows: int, length: int) -> Tensor:
        """States with room for this many rows and tokens, plus `ROOM` tokens."""
        new = states.new_empty(rows, states.shape[1], length + ROOM, states.shape[-1])
        new[: len(states), :, : states.shape[-2]] = states
        return new


_KNOWN_LAYERS = {
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    RoomyLayer,
}


def can_join(cache: Any) -> bool:
    """Whether the functions below know everything in a model's cache. A model's own class may hold more."""
    return type(cache) is DynamicCache and all(type(layer) in _KNOWN_LAYERS for layer in cache.layers)


def make_room(cache: Cache) -> None:
    """Give room to the layers that keep all tokens, in place, in a cache of a known kind."""
    cache.layers = [
        RoomyLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer for layer in cache.layers
    ]


def keep_rows(cache: Cache, places: Sequence[int], device: torch.device | str) -> None:
    """Keep these rows of a cache, of any kind, in this order, in place."""
    indices = torch.tensor(places, device=device)
    if not can_join(cache):
        cache.reorder_cache(indices)
        return
    moved = [new for new, old in enumerate(places) if new != old]
    new, old = torch.tensor(moved, dtype=torch.int64, device=device), indices[moved]
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(len(places), new, old)
        else:
            layer.reorder_cache(indices)


def join_rows(cache: Cache, other: Cache) -> None:
    """Append the rows of another cache of the same model, in place. None may be longer than the present longest row.

    Layers with a sliding window hold the last tokens. States of recurrent and convolution layers have the same size for
    any number of tokens.
    """
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if isinstance(layer, RoomyLayer):
            layer.join(more)
        elif isinstance(layer, DynamicLayer) and layer.is_initialized:
            layer.keys, layer.values = _cat(layer.keys, more.keys), _cat(layer.values, more.values)
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for mine, theirs in (
                (layer.conv_states, more.conv_states),
                (layer.recurrent_states, more.recurrent_states),
            ):
                for index, state in mine.items():
                    if state is not None:
                        mine[index] = torch.cat([state, theirs[index]])


def join_masks(mask: Tensor, other: Tensor) -> Tensor:
    """The mask of joined caches (int64, [rows, length]). A ValueError if the other's is longer."""
    missing = mask.shape[1] - other.shape[1]
    if missing < 0:  # padding by a negative number would cut tokens off
        raise ValueError(f"rows of {other.shape[1]} tokens join rows of {mask.shape[1]}")
    return torch.cat([mask, pad(other, (missing, 0))])


def cut_padding(cache: Cache, tokens: int) -> None:
    """Remove tokens from the left of a cache, in place, that are padding in all rows. Copies nothing."""
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.cut(tokens)
        elif isinstance(layer, DynamicLayer) and layer.is_initialized:
            surplus = tokens
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= tokens
                surplus = max(0, layer.keys.shape[-2] - layer.cumulative_length)
            layer.keys, layer.values = layer.keys[:, :, surplus:], layer.values[:, :, surplus:]


def _cat(states: Tensor, more: Tensor) -> Tensor:
    """Rows of both, the second padded with zeros before their first token."""
    return torch.cat([states, pad(more, (0, 0, states.shape[-2] - more.shape[-2], 0))])
