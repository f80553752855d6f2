"""Rows of different lengths as batches: which go together, and how they become rectangles."""

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
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


def passes(lengths: Sequence[int], budget: int, ranks: int = 1, *, at_least: int = 0) -> list[list[list[int]]]:
    """Rows in passes of a model, each rank's part a rectangle of like cost: no rank waits long for another.

    Rows of like lengths go together, so that there is little padding. As few passes as the budget allows, and of those
    the ones whose largest rectangle is smallest; the longest rows come first, so that too little memory shows at once.

    Args:
        lengths: of each row, in tokens.
        budget: tokens of a rank's rectangle at most, padding included; where a row is longer, as many as that has.
        ranks: among which each pass is divided.
        at_least: passes, also where the budget would allow fewer.

    Returns:
        Places of the rows, by pass and rank. A part is empty only where there are fewer rows than parts.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    longest = lengths[order[0]]
    budget = max(budget, longest)
    count = max(-(-len(_rectangles(lengths, order, budget)) // ranks), at_least) * ranks
    fits = range(longest, budget + 1)
    size = fits[bisect_left(fits, True, key=lambda size: len(_rectangles(lengths, order, size)) <= count)]
    parts = _rectangles(lengths, order, size)
    while len(parts) < min(count, len(order)):  # the costliest in two, so that no rank is without
        costliest = max((part for part in parts if len(part) > 1), key=lambda part: len(part) * lengths[part[0]])
        parts.remove(costliest)
        parts += [costliest[: len(costliest) // 2], costliest[len(costliest) // 2 :]]
    parts.sort(key=lambda part: (-len(part) * lengths[part[0]], part))
    parts += [[] for _ in range(count - len(parts))]
    found = [parts[start : start + ranks] for start in range(0, count, ranks)]
    return [each[::-1] if number % 2 else each for number, each in enumerate(found)]  # not always the first rank most


def _rectangles(lengths: Sequence[int], order: Sequence[int], size: int) -> list[list[int]]:
    """Rows, longest first, cut where the next one would make a rectangle of more than `size`."""
    parts: list[list[int]] = []
    for row in order:
        if not parts or lengths[parts[-1][0]] * (len(parts[-1]) + 1) > size:
            parts.append([])
        parts[-1].append(row)
    return parts


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


def right_pad(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Token ids as a rectangle, padded on the right: int64 on the CPU, shape [sequences, longest].

    No token reads what stands on its right, so that such a rectangle needs neither a mask nor positions.
    """
    return pad_sequence([torch.tensor(sequence, dtype=torch.int64) for sequence in sequences], batch_first=True)


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
