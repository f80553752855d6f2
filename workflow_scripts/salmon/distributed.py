"""Ranks: one process per GPU (or a few on the CPU), started by `launch.sh` through srun or torchrun."""

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from salmon.errors import UserError


def init() -> torch.device:
    """Join the process group that the environment variables of torchrun or launch.sh describe, if any.

    Returns:
        The device of this rank: its own GPU, or the CPU if there is none.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():  # also for a single process, because DeepSpeed needs a group
        # Tensors stay on their devices; those on the CPU use gloo, even if there are GPUs. Ranks wait for the slowest
        # one to load its model or to sample its share, which may take longer than the default of ten minutes.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device


def init_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed use the process group of `init` before ZeRO-3 asks it for the number of ranks."""
    if not dist.is_initialized():
        raise UserError("--deepspeed needs torchrun, even for one process (torchrun --nproc-per-node 1 …)")
    import deepspeed

    # Compile nothing (ranks on CPUs would compile sums in shared memory). A job that is killed while it compiles leaves
    # a lock in the user's cache, and every later job waits for it forever.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)


def leave() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes artifacts."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks (a new tensor, without gradient)."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def from_main(value: torch.Tensor) -> torch.Tensor:
    """The tensor of rank 0, on every rank (shape and dtype must be equal on all ranks)."""
    if dist.is_initialized():
        dist.broadcast(value, 0)
    return value


def any_true(values: Sequence[bool], device: torch.device | str) -> list[bool]:
    """For each value, whether it is true on any rank. All ranks get the result."""
    return [number > 0 for number in sum_over_ranks(torch.tensor(values, dtype=torch.int64, device=device)).tolist()]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over ranks, in a single message.

    The losses are divided by totals over all ranks, so the sum is the gradient of the joint batch. A parameter without
    a gradient on this rank counts as zero, so all ranks send the same number of bytes.
    """
    if not dist.is_initialized():
        return
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in wanted:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.float().reshape(-1) for parameter in wanted if parameter.grad is not None])
    dist.all_reduce(flat)
    offset = 0
    for parameter in wanted:
        size = parameter.numel()
        if parameter.grad is not None:
            parameter.grad.copy_(flat[offset : offset + size].view_as(parameter))
        offset += size


def over_ranks(rows: Sequence[Any], compute: Callable[[Sequence[Any]], torch.Tensor]) -> torch.Tensor:
    """Numbers for rows, computed in shares by all ranks, each with the same number of forward passes (for ZeRO-3).

    Args:
        rows: the rows, at least one.
        compute: computes the numbers of some rows, on the CPU, [rows, ...].
    """
    padded = [*rows, *[rows[-1]] * (-len(rows) % world())]
    mine = compute(padded[rank() :: world()])
    return torch.stack(gather(mine), dim=1).flatten(0, 1)[: len(rows)]
