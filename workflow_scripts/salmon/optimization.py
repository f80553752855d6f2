"""Optimisers of RL: AdamW with complete states on every rank, or sharded by DeepSpeed (ZeRO).

Losses are divided by totals over all ranks, so the gradient of a minibatch is the sum over ranks. Both kinds
take the same steps up to rounding.
"""

from pathlib import Path
from typing import Any, Protocol

import torch

from salmon import distributed
from salmon.border import read_json
from salmon.errors import UserError
from salmon.shared_base import SharedBase


class Optimizer(Protocol):
    """An optimiser: backward passes of one minibatch, then a step."""

    gathers_weights: bool
    """Whether all ranks must make the same number of passes, because passes gather the weights from all ranks."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's share of a loss."""

    def step(self, rate: float) -> float:
        """Sum gradients over ranks, clip them, update the weights, clear the gradients; returns the unclipped norm."""

    def save(self, folder: Path) -> None:
        """Write everything needed to resume into a new folder. All ranks call this."""

    def load(self, folder: Path) -> None:
        """Read the files of `save`. All ranks call this."""

    def trained_weights(self) -> dict[str, torch.Tensor] | None:
        """Complete trained weights by name, on every rank; None if the model itself holds them. All ranks call this."""


class ReplicatedOptimizer:
    """AdamW without decay, the same on every rank; on a GPU with 32-bit states that can be paged out."""

    gathers_weights = False

    def __init__(self, shared: SharedBase, max_grad_norm: float) -> None:
        self.shared, self.max_grad_norm = shared, max_grad_norm
        if shared.device.type == "cuda":
            import bitsandbytes

            self.adamw: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW32bit(shared.trained(), weight_decay=0.0)
        else:
            self.adamw = torch.optim.AdamW(shared.trained(), weight_decay=0.0)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Optimizer`."""
        loss.backward()

    def step(self, rate: float) -> float:
        """See `Optimizer`."""
        distributed.sum_gradients(self.shared.trained())
        norm = torch.nn.utils.clip_grad_norm_(self.shared.trained(), self.max_grad_norm).item()
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path) -> None:
        """See `Optimizer`; any number of ranks can read it."""
        if distributed.is_main():
            self.shared.save_trained(folder / "trained.safetensors")
            torch.save(self.adamw.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """See `Optimizer`."""
        self.shared.load_trained(folder / "trained.safetensors")
        self.adamw.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))

    def trained_weights(self) -> None:
        """See `Optimizer`."""


class ShardedOptimizer:
    """AdamW in DeepSpeed's engine: ZeRO-2 shards gradients and states, ZeRO-3 also the weights of all models.

    DeepSpeed sums gradients during each backward pass, and gathers ZeRO-3's weights during any pass. Therefore all
    ranks make the same number of passes (`ppo.parts`).
    """

    def __init__(self, shared: SharedBase, max_grad_norm: float, config: dict[str, Any]) -> None:
        import deepspeed

        self.world = distributed.world()
        self.gathers_weights = config["zero_optimization"]["stage"] == 3
        self.engine, *_ = deepspeed.initialize(
            model=shared,
            optimizer=torch.optim.AdamW(shared.trained(), weight_decay=0.0),
            config={**config, "gradient_clipping": max_grad_norm},
        )
        # ZeRO-3 adds a pass's gradients to the kept ones, except in the first pass of a minibatch, whose gradients
        # replace them. It counts passes when the engine is called; we call the model directly, so each pass would be
        # the first. A weight that a first pass does not reach (the value model) would keep the last step's gradients.
        self.kept_gradients: torch.Tensor | None = None
        if self.gathers_weights:
            self.kept_gradients = self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def backward(self, loss: torch.Tensor) -> None:
        """See `Optimizer`."""
        if self.kept_gradients is not None:
            self.engine.optimizer.micro_step_id = 1  # always add; `step` sets the gradients to zero
        self.engine.backward(loss * self.world)  # the engine takes the mean over ranks

    def step(self, rate: float) -> float:
        """See `Optimizer`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        if self.kept_gradients is not None:
            self.kept_gradients.zero_()
        return float(self.engine.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        """See `Optimizer`; only the same ZeRO on the same number of ranks can read it."""
        self.engine.save_checkpoint(str(folder), tag="shards", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """See `Optimizer`."""
        loaded, _ = self.engine.load_checkpoint(
            str(folder), tag="shards", load_module_strict=False, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise UserError(f"DeepSpeed cannot read {folder}; delete it to resume from the previous checkpoint")

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """See `Optimizer`."""
        return full_weights(self.engine.module)


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that DeepSpeed trains, by name: float32, complete, on every rank. All ranks call this."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = model.named_parameters()
    return {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in named if parameter.requires_grad}


BUCKET = 50_000_000
"""Gradients that DeepSpeed reduces at a time, if its file has no number. DeepSpeed's own default, ten times as many,
takes 4 GB for the two buffers of ZeRO-2."""


def buffer_bytes(stage: int) -> int:
    """Bytes of DeepSpeed's buffers for gradients in float32, with `BUCKET`, as in the shipped files.

    ZeRO-2 has two, and fills one while it reduces the other.
    """
    return {0: 0, 2: 2, 3: 1}[stage] * 4 * BUCKET


def read_deepspeed(file: Path) -> dict[str, Any]:
    """A DeepSpeed configuration for RL, where the training loop makes the batches.

    Entries that are `auto` in the file (transformers' Trainer fills them in) are left to DeepSpeed. The trained weights
    are and stay float32. Buffers for gradients are smaller than DeepSpeed's own (`BUCKET`).
    """
    raw = read_json(file, "", "it must be a DeepSpeed configuration in JSON")
    zero = raw.get("zero_optimization", {}) if isinstance(raw, dict) else None
    if not isinstance(zero, dict):
        raise UserError(
            f"{file} is not a DeepSpeed configuration: it must be a JSON object with zero_optimization.stage"
        )
    zero = {name: value for name, value in zero.items() if value != "auto"}
    if zero.get("stage") not in (2, 3):
        raise UserError(f"{file}: zero_optimization.stage is {zero.get('stage')}; RL accepts 2 or 3")
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # `step` marks the end of a minibatch
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"reduce_bucket_size": BUCKET, **zero},
        "steps_per_print": 10**9,
    }
