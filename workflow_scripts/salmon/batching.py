"""Rows of different lengths as batches: which go together, and how they become rectangles."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache


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
