"""Rows of different lengths as batches: which go together, and how they become rectangles."""

from collections.abc import Sequence

import torch
from torch import Tensor


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of rows, longest first, in batches of `size`: little padding, and too little memory shows at once.

    The rows that an interruption between two batches left over form the same batches again.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + size] for start in range(0, len(order), size)]


def left_pad(sequences: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Token ids as a rectangle, padded on the left.

    Returns:
        ids and mask (1 token, 0 padding), int64 on the CPU, shape [sequences, longest].
    """
    width = max(map(len, sequences))
    ids = [[fill] * (width - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count tokens and not paddings (int64, [rows, length], as the mask)."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)
