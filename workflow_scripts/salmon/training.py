"""The training loop for adapters: of the reward model and of the initial policy.

One step is one global batch, however it is divided among passes and ranks, with or without DeepSpeed. An interrupted
training resumes from its last checkpoint and gives the same bytes.
"""

import json
import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from peft import PeftModel
from pydantic import Field
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from salmon import artifacts, batching, checkpoints, distributed, likelihood, optimization, recompute, script, stopping
from salmon.border import read_json
from salmon.config import Lora, Model, Training
from salmon.errors import UserError
from salmon.randomness import rng, seed_of
from salmon.work import WorkFolder

log = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


class Arguments(script.Arguments):
    """Arguments of every script with this loop."""

    output: Path = Field(description="folder of the adapter, with metrics.json and manifest.json")
    model: Model = Field(description="section of the configuration")
    lora: Lora = Field(Lora(), description="section of the configuration")
    tokens_per_pass: int = Field(
        2048, ge=1, description="hardware: maximum tokens of a pass on each GPU, padding included; at least one example"
    )
    deepspeed: Path | None = Field(None, description="hardware: DeepSpeed configuration (JSON)")
    gradient_checkpointing: recompute.Setting = Field(
        "auto", description="hardware: recompute activations to save memory; auto: if they do not fit"
    )

    @property
    @abstractmethod
    def stage(self) -> str:
        """Name of the stage's section in the configuration."""

    @property
    @abstractmethod
    def settings(self) -> Training:
        """The stage's section."""


class Reporter(TrainerCallback):
    """Logs progress, stops on request or if the loss is not finite, and marks complete checkpoints."""

    def __init__(self, stage: str, work: WorkFolder) -> None:
        self.stage, self.work = stage, work
        self.first_step = 0
        self.started = self.last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start counting where the run begins or resumes."""
        self.first_step = state.global_step
        self.started = self.last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Log one line per interval: steps, rate, time left, loss, learning rate."""
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise UserError(f"the loss of step {state.global_step} is {logs['loss']}; lower {self.stage}.learning_rate")
        now = time.monotonic()
        if now - self.last >= script.INTERVAL or state.global_step == state.max_steps:
            line = tqdm.format_meter(
                state.global_step,
                state.max_steps,
                now - self.started,
                unit=" steps",
                initial=self.first_step,
                ncols=120,
                postfix=f"loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.2e}",
            )
            log.info("%s", line)
            self.last = now

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Request a checkpoint and an end if any rank was asked to stop and steps remain."""
        if stopping.stop_requested(args.device) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint after the last rank has written its part."""
        checkpoints.seal(self.work, self.work.path / f"checkpoint-{state.global_step}")


def start(arguments: Arguments) -> torch.device:
    """Join the other ranks, and listen for requests to stop; returns this rank's device."""
    device = distributed.init()
    stopping.listen()
    if arguments.deepspeed:
        distributed.init_deepspeed(device)
    return device


def split(rows: pl.DataFrame, eval_examples: int, seed: int, what: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split rows into training rows and held-out rows, by whole prompts.

    A prompt may give several rows: training on one of them would reveal the others. Prompts are held out in the order
    of a hash of (seed, prompt_id) until `eval_examples` is reached, so the last prompt may exceed it by a few rows.

    Args:
        rows: the rows, with a column `prompt_id`.
        eval_examples: number of rows to hold out.
        seed: seed of the hash.
        what: name of the trained model; each has a different split.
    """
    sizes = rows.group_by("prompt_id").len().rows()
    held, count = [], 0
    for prompt, size in sorted(sizes, key=lambda row: seed_of(f"{what} split", seed, row[0])):
        if count >= eval_examples:
            break
        held.append(prompt)
        count += size
    is_held = pl.col("prompt_id").is_in(held)
    return rows.filter(~is_held), rows.filter(is_held)


def training_order(rows: int, batch_size: int, epochs: float, seed: int, what: str) -> list[int]:
    """The order of the rows in training, in whole steps of `batch_size` rows; each epoch is a new permutation.

    Args:
        rows: number of rows.
        batch_size: rows per step.
        epochs: number of epochs; need not be an integer.
        seed: seed of the permutations.
        what: name of the trained model; each has a different order.

    Returns:
        Indices, without the last, incomplete batch; the list may therefore be empty.
    """
    order: list[int] = []
    for epoch in range(math.ceil(epochs)):
        order += rng(f"{what} order", seed, epoch).permutation(rows).tolist()
    return order[: int(rows * epochs) // batch_size * batch_size]


def passes_per_step(order: Sequence[int], lengths: Sequence[int], batch_size: int, budget: int, ranks: int) -> int:
    """Number of passes of each step: the Trainer requires the same in all, so it is the largest that any step needs.

    Args:
        order: the result of `training_order`.
        lengths: each row's length, in tokens.
        batch_size: rows per step; a multiple of `ranks`.
        budget: maximum tokens of a pass on a rank, padding included.
        ranks: number of ranks that share each pass.
    """
    steps = _steps(order, batch_size)
    return max(len(batching.passes([lengths[row] for row in step], budget, ranks)) for step in steps)


def micro_batches(
    order: Sequence[int],
    lengths: Sequence[int],
    batch_size: int,
    budget: int,
    ranks: int,
    number: int,
    cost: Callable[[list[int]], int] | None = None,
) -> list[list[int]]:
    """The rows of each pass of each rank, ordered by step, then pass, then rank; arguments as for `passes_per_step`.

    A step's gradient is a sum over its rows, so their division affects only speed and memory (`batching.passes`).

    Args:
        number: the result of `passes_per_step`.
        cost: tokens that a rank computes for some rows, if fewer than those of their rectangle.
    """
    found: list[list[int]] = []
    for step in _steps(order, batch_size):
        rows = partial(map, step.__getitem__)
        of_places = (lambda part, rows=rows: cost([*rows(part)])) if cost else None
        of_step = [lengths[row] for row in step]
        for each in batching.passes(of_step, budget, ranks, at_least=number, cost=of_places):
            found += [[*rows(part)] for part in each]
    return found


def _steps(order: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def count_rows(
    order: Sequence[int], train: int, held: int, arguments: Arguments, table: Path, left_out: str = ""
) -> dict[str, int]:
    """Numbers of training rows, held-out rows, unused rows, and steps.

    Args:
        order: the result of `training_order`.
        train: available training rows.
        held: held-out rows.
        arguments: the script's arguments.
        table: the rows' table, for the message.
        left_out: which rows were left out and why, for the message.

    Raises:
        UserError: if there are too few.
    """
    settings, stage = arguments.settings, arguments.stage
    if settings.batch_size % distributed.world():
        raise UserError(
            f"{stage}.batch_size {settings.batch_size} is not a multiple of the {distributed.world()} processes that "
            "train"
        )
    if not order or held < settings.eval_examples:
        raise UserError(
            f"{table} has {train + held} usable records, too few to hold out {settings.eval_examples} "
            f"({stage}.eval_examples) and train a batch of {settings.batch_size} ({stage}.batch_size) in "
            f"{settings.epochs:g} epochs ({stage}.epochs)" + (f"; {left_out}" if left_out else "")
        )
    trained = len(set(order))
    return {
        "trained_on": trained,
        "held_out": held,
        "steps": len(order) // settings.batch_size,
        "left_out_of_last_batch": train - trained,
    }


def open_work(arguments: Arguments, work: WorkFolder, fingerprint: str) -> bool:
    """Open the work folder, with the checkpoints of the same settings and inputs, if any; see `WorkFolder.open`."""
    # Other hardware may resume from a checkpoint, except for DeepSpeed's shards.
    deepspeed = arguments.deepspeed
    layout = (
        json.dumps([read_json(deepspeed, "", "it must be a DeepSpeed configuration in JSON"), distributed.world()])
        if deepspeed
        else ""
    )
    return work.open(fingerprint, layout)


def trainer_arguments(
    arguments: Arguments, folder: Path, steps: int, passes: int, device: torch.device
) -> TrainingArguments:
    """The Trainer's arguments for `steps` steps of the global batch, with the given number of passes per step.

    ZeRO-3 shards a model while it is loaded, so its configuration (in these arguments) must precede the model.
    """
    settings = arguments.settings
    warmup = math.ceil(settings.warmup_ratio * steps)
    if warmup and steps == 1:
        raise UserError(
            f"the only step is a warm-up step with a rate of 0; set {arguments.stage}.warmup_ratio to 0, or train "
            "longer"
        )
    paged = device.type == "cuda" and arguments.model.quantization == "nf4" and not arguments.deepspeed
    training = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # entry of `micro_batches`
        gradient_accumulation_steps=passes,
        num_train_epochs=1,  # pass over the order, which contains the configured epochs
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="paged_adamw_32bit" if paged else "adamw_torch",
        bf16=arguments.model.dtype == "bfloat16",
        fp16=arguments.model.dtype == "float16" and device.type == "cuda",
        deepspeed=str(arguments.deepspeed) if arguments.deepspeed else None,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=checkpoints.KEPT,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
    )
    if distributed.world() == 1:
        training._n_gpu = min(training.n_gpu, 1)  # one process per GPU: never torch's DataParallel
    return training


def choose_recomputation(
    arguments: Arguments,
    training: TrainingArguments,
    model: PeftModel,
    row: int,
    device: torch.device,
    *,
    logits: bool = False,
) -> None:
    """Decide whether to recompute activations in the backward pass. All ranks call this.

    Args:
        arguments: the script's arguments.
        training: the result of `trainer_arguments`; gains the decision.
        model: the model with the trained adapter.
        row: tokens of a pass with a single example of the maximum length.
        device: the model's device.
        logits: whether the logits of all tokens are computed, in float32.
    """
    dtype = getattr(torch, arguments.model.dtype)
    tokens = max(arguments.tokens_per_pass, row)
    buffers = optimization.buffer_bytes(2) if arguments.deepspeed else 0

    def forward(ids: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype, enabled=training.bf16 or training.fp16):  # as in the Trainer
            model.get_base_model().base_model(input_ids=ids, use_cache=False)

    training.activation_checkpointing = recompute.is_wanted(
        arguments.gradient_checkpointing,
        forward,
        model.parameters(),
        longest=arguments.settings.max_length,
        tokens=tokens,
        device=device,
        besides=buffers + (likelihood.PER_LOGIT * tokens * model.config.get_text_config().vocab_size if logits else 0),
        divided=arguments.deepspeed is not None,
        sharded=is_deepspeed_zero3_enabled(),
    )
    training.activation_checkpointing_kwargs = {"use_reentrant": False}


def trainable_in_float32(model: PeftModel) -> PeftModel:
    """A model to train, with its trained parameters in float32, because small steps vanish in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.config.use_cache = False
    return model


def train(
    model: PeftModel,
    training: TrainingArguments,
    rows: Sequence[list[int]],
    batch: Callable[[list[int]], Batch],
    loss: Callable[..., torch.Tensor],
    *,
    stage: str,
    work: WorkFolder,
) -> Trainer:
    """Train to the last step, starting from the newest checkpoint if there is one. All ranks call this.

    Args:
        model: the model with the trained adapter.
        training: the result of `trainer_arguments`.
        rows: the rows from `micro_batches`.
        batch: makes the model's inputs for some rows, with `labels`.
        loss: computes a pass's share of the global batch's loss from the model's output, the labels and the Trainer's
            count of labels.
        stage: name of the stage's section in the configuration.
        work: the folder of the checkpoints.

    Returns:
        The Trainer, with the trained model.

    Raises:
        Stopped: if it was asked to stop; a checkpoint is written.
    """
    checkpoint = checkpoints.newest(work)
    trainer = Trainer(
        model=model,
        args=training,
        data_collator=lambda micro_batch: batch(*micro_batch),
        train_dataset=rows,
        compute_loss_func=loss,
        callbacks=[Reporter(stage, work)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        raise stopping.Stopped(trainer.state.global_step)
    return trainer


def write(trainer: Trainer, work: WorkFolder, manifest: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Write the adapter, its metrics and its manifest. All ranks call this."""
    # DeepSpeed shards or rounds the trained weights.
    weights = optimization.full_weights(trainer.model) if trainer.is_deepspeed_enabled else None
    if distributed.is_main():
        training = [entry for entry in trainer.state.log_history if "loss" in entry]
        with work.finish(manifest) as folder:
            trainer.model.save_pretrained(str(folder), state_dict=weights)
            artifacts.write_json(folder / "metrics.json", {"evaluation": evaluation, "training": training})
        log.info("held out: %s", json.dumps(evaluation))
    distributed.barrier()
    distributed.leave()
