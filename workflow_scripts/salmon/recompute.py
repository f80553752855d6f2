"""Decides whether to recompute activations in the backward pass or to keep them, depending on the free memory.

Recomputing costs another forward pass. With frozen weights, a step takes up to half as long again. The memory that
autograd keeps is measured on the model itself, in three short passes: c + a T + b T^2 bytes for a row of T tokens. b is
0 except for eager attention, which keeps its probabilities. c is independent of the text, for example experts' weights
with their adapters. Recurrent layers compute in chunks, and shorter texts are filled up to a chunk: if c is large,
longer passes are measured.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from salmon import distributed

log = logging.getLogger(__name__)

Setting = Literal["auto"] | bool
SHORT, CHUNK = 32, 256
"""Tokens of the shortest measured pass, and of the one for models that compute in chunks; the other passes have two and
four times as many."""
MARGIN = 1.3
"""Additional memory, as a factor of the kept memory: intermediate results and fragmentation."""
TRAINED, COPY = 12, 4
"""Bytes per trained parameter, in float32, allocated after the model is loaded: gradient and both moments of Adam; and
another copy of the parameter, which DeepSpeed makes."""


def is_wanted(
    setting: Setting,
    forward: Callable[[Tensor], Any],
    parameters: Iterable[nn.Parameter],
    *,
    longest: int,
    tokens: int,
    device: torch.device,
    besides: int = 0,
    divided: bool = False,
    sharded: bool = False,
) -> bool:
    """Whether to recompute activations. All ranks call this together and get the same answer.

    Args:
        setting: true or false decide; `auto` measures.
        forward: a pass of the model over token ids [1, T], with gradients.
        parameters: all of the model's, before it has gradients and moments.
        longest: tokens of the longest possible row.
        tokens: maximum tokens of a pass, unless a row is longer.
        device: the model's device.
        besides: bytes needed at the same time, such as logits.
        divided: whether DeepSpeed divides gradients and moments among the ranks.
        sharded: whether the weights are shared among the ranks (ZeRO-3): then memory is short, and the model
            cannot run before training begins.
    """
    if setting != "auto":
        return setting
    if sharded:
        return True
    parameters = [*parameters]
    try:
        kept = graph_bytes(forward, parameters, longest, max(tokens, longest), device)
    except torch.OutOfMemoryError:  # not enough even for a short text
        kept = math.inf
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    states = states_bytes(trained, distributed.world() if divided else 0)
    needed, free = MARGIN * kept + states + besides, free_bytes(device)
    lacks = distributed.any_true([needed > free], device)[0]
    log.info(
        "a pass of %d tokens keeps %.2f GB of activations; it needs %.2f GB in all, and %.2f GB are free: they are %s",
        max(tokens, longest),
        kept / 1e9,
        needed / 1e9,
        free / 1e9,
        "recomputed in the backward pass" if lacks else "kept",
    )
    return lacks


def states_bytes(trained: int, ranks: int) -> float:
    """Bytes per rank of gradients and moments of `trained` parameters.

    Args:
        trained: number of trained parameters.
        ranks: number of ranks among which DeepSpeed divides them; 0 without DeepSpeed.
    """
    return trained * ((TRAINED + COPY) / ranks if ranks else TRAINED)


def graph_bytes(
    forward: Callable[[Tensor], Any],
    parameters: Iterable[nn.Parameter],
    length: int,
    tokens: int,
    device: torch.device,
    short: int = SHORT,
) -> float:
    """Bytes that autograd keeps of a pass of `tokens` tokens in rows of at most `length`, estimated from short passes.

    Args:
        forward: a pass of the model over token ids [1, T], with gradients.
        parameters: all of the model's.
        length: tokens of a row.
        tokens: tokens of the pass.
        device: the model's device.
        short: tokens of the shortest measured pass.
    """
    weights = {_place(parameter) for parameter in parameters}
    constant, linear, quadratic = _parabola(forward, weights, short, device)
    if short < CHUNK and constant > 0.1 * linear * short:
        constant, linear, quadratic = _parabola(forward, weights, CHUNK, device)
    return constant + (linear + quadratic * length) * tokens


def _parabola(
    forward: Callable[[Tensor], Any], weights: set[int], short: int, device: torch.device
) -> tuple[float, float, float]:
    """Kept bytes: constant, per token, and per token and token of its row."""
    one, two, four = (_kept(forward, weights, times * short, device) for times in (1, 2, 4))
    # with S = short: one = c + a S + b S^2, two = c + 2 a S + 4 b S^2, four = c + 4 a S + 16 b S^2
    quadratic = max(0.0, (four - 3 * two + 2 * one) / (6 * short**2))
    linear = (four - two) / (2 * short) - 6 * quadratic * short
    return max(0.0, one - linear * short - quadratic * short**2), linear, quadratic


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, including the memory that PyTorch holds but does not use.

    On CPUs it is this rank's share of the machine's memory. A job may have less: then set the resource.
    """
    if device.type != "cuda":
        return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _kept(forward: Callable[[Tensor], Any], weights: set[int], tokens: int, device: torch.device) -> int:
    """Bytes of the tensors that a pass keeps, each storage once, without weights."""
    found: dict[int, Tensor] = {}  # kept alive, so no other tensor takes their place

    def keep(tensor: Tensor) -> Tensor:
        if _place(tensor) not in weights:
            found[_place(tensor)] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(torch.zeros(1, tokens, dtype=torch.int64, device=device))
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def _place(tensor: Tensor) -> int:
    """A tensor's storage. Without numbers (meta) it has no address."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata
