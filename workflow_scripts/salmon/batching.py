"""Rows of different lengths as batches: how to group them, and how to pad them to rectangles."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row indices, longest first, in batches of `size`: this saves padding, and a lack of memory shows immediately.

    After an interruption between two batches, the remaining rows form the same batches again.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + size] for start in range(0, len(order), size)]


def dealt(lengths: Sequence[int], rank: int, world: int) -> list[int]:
    """Row indices of one rank, in order. Of each length, all ranks get the same number of rows, plus or minus one."""
    by_length = [place for batch in batches(lengths, world) for place in batch[rank : rank + 1]]
    return sorted(by_length)


def halves(lengths: Sequence[int], saving: float = 0, least: float = 0) -> tuple[list[int], list[int]]:
    """Divide rows into two rectangles, the longer rows and the shorter ones, with as little padding as possible.

    Args:
        lengths: each row's length, in tokens.
        saving: the second rectangle must save more tokens than this.
        least: and both together must have as many tokens as this.

    Returns:
        Row indices of both, longest first; the second may be empty.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))

    def tokens(longer: int) -> int:
        parts = order[:longer], order[longer:]
        return sum(len(part) * lengths[part[0]] for part in parts if part)

    longer = min(range(len(order), 0, -1), key=tokens, default=0)
    if tokens(len(order)) - tokens(longer) <= saving or tokens(longer) < least:
        longer = len(order)
    return order[:longer], order[longer:]


def passes(
    lengths: Sequence[int],
    budget: int,
    ranks: int = 1,
    *,
    at_least: int = 0,
    cost: Callable[[list[int]], int] | None = None,
) -> list[list[list[int]]]:
    """Divide rows into passes of a model; the ranks' rectangles cost about the same, so no rank waits long for another.

    Rows of similar lengths go together, to save padding. There are as few passes as the budget allows, and of these
    divisions the one with the smallest largest rectangle. The longest rows come first, so a lack of memory shows
    immediately.

    Args:
        lengths: each row's length, in tokens.
        budget: maximum tokens of a rank's rectangle, padding included; a longer row raises it to its own length.
        ranks: number of ranks that share each pass.
        at_least: minimum number of passes, even if the budget allows fewer.
        cost: tokens that a rank computes for some rows; by default, those of their rectangle.

    Returns:
        Row indices, by pass and rank. A part is empty only if there are fewer rows than parts.
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

    def area(part: list[int]) -> int:
        return len(part) * lengths[part[0]]

    cost = cost or area
    while len(parts) < min(count, len(order)):  # split the costliest in two, so that every rank has a part
        costliest = max((part for part in parts if len(part) > 1), key=cost)
        parts.remove(costliest)
        parts += [costliest[: len(costliest) // 2], costliest[len(costliest) // 2 :]]
    parts.sort(key=lambda part: (-cost(part), part))
    parts += [[] for _ in range(count - len(parts))]
    found = [parts[start : start + ranks] for start in range(0, count, ranks)]
    return [each[::-1] if number % 2 else each for number, each in enumerate(found)]  # not always most for rank 0


def _rectangles(lengths: Sequence[int], order: Sequence[int], size: int) -> list[list[int]]:
    """Rows, longest first, split where the next row would make the rectangle larger than `size`."""
    parts: list[list[int]] = []
    for row in order:
        if not parts or lengths[parts[-1][0]] * (len(parts[-1]) + 1) > size:
            parts.append([])
        parts[-1].append(row)
    return parts


def left_pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids as a rectangle, padded on the left. Only the mask marks the padding.

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

    No token reads the tokens to its right, so this rectangle needs neither a mask nor positions.
    """
    return pad_sequence([torch.tensor(sequence, dtype=torch.int64) for sequence in sequences], batch_first=True)


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count tokens but not padding (int64, [rows, length], like the mask)."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Keep these rows of a cache, in place; they may also repeat.

    This covers the states of all layers, as beam search needs it. Transformers' method for plain batches omits the
    states of recurrent and convolution layers.

    Args:
        cache: what a model returned.
        rows: int64, indices in the batch.
    """
    cache.reorder_cache(rows)
